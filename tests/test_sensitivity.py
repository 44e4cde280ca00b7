"""S_l on the device against float64 numpy over hidden states that are walked layer by layer."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quota_jax.errors import QuotaError
from quota_jax.models.vision_language import sequence_of
from quota_jax.prune.allocator import relative_error
from quota_jax.prune.calibration_pass import Journal, first_difference
from quota_jax.prune.sensitivity import Sensitivities, layer_errors
from quota_jax.quantization import QuantizationConfig
from tests.tiny_models import draw_picture, write_tiny_llava
from tests.tiny_params import random_model, read_tiny

LAYERS = 3
PROMPTS = ["USER: <image>\nis there a red circle ? ASSISTANT:", "USER: car"]
TEXTS = ["USER: is there a red circle ? ASSISTANT:", "USER: car"]


# Errors accumulate from the pixels on; local ones need no picture.
@pytest.mark.parametrize(("local", "per"), [(False, "sample"), (True, "token")])
def test_errors_of_each_layer_equal_a_slow_walk(tmp_path: Path, local: bool, per: str):
    folder = write_tiny_llava(tmp_path / "hf", num_layers=LAYERS)
    config, processor = read_tiny(folder)
    if local:
        batch = processor(prompts=TEXTS)
    else:
        batch = processor(images=[[draw_picture(0)], []], prompts=PROMPTS)
    plain, quantized = (
        random_model(config, 0, bits) for bits in (None, QuantizationConfig.parse("W4A4KV4"))
    )

    found = np.asarray(layer_errors(quantized, plain, batch, eta=1e-6, local=local, per=per))

    embed = jax.jit(lambda model: model.embed(batch, model.visual_features(batch.pixels)))
    step = jax.jit(lambda model, x, index: model.decoder.layer(x, sequence_of(batch), index)[0])
    x, x_q = embed(plain), embed(quantized)
    lengths = np.asarray(batch.lengths)
    assert lengths[0] != lengths[1]
    for layer in range(LAYERS):
        index = jnp.int32(layer)
        x_q = step(quantized, x if local else x_q, index)
        x = step(plain, x, index)
        expected = [
            relative_error(np.asarray(x)[row, :n], np.asarray(x_q)[row, :n], per=per)
            for row, n in enumerate(lengths)
        ]
        np.testing.assert_allclose(found[:2, layer], expected, rtol=2e-4)
        assert min(expected) > 0.01


def test_a_journal_goes_on_behind_the_last_whole_line(tmp_path: Path):
    path, identity = tmp_path / "notes", {"data": "abc", "samples": 3}
    notes = Journal(path, identity)
    assert (notes.rows, notes.values()) == ([], {})
    first = np.array([[0.1, np.nan], [1 / 3, 2e-9]])
    notes.append({"error": first})
    with open(path, "ab") as file:
        file.write(b'{"error": [[0.')  # what a kill leaves behind
    again = Journal(path, identity)
    np.testing.assert_array_equal(again.values()["error"], first)
    again.append({"error": np.array([[7.0, 8.0]])})
    found = Journal(path, identity).values()["error"]
    np.testing.assert_array_equal(found, [*first, [7.0, 8.0]])
    with pytest.raises(QuotaError, match="other data or options"):
        Journal(path, {**identity, "samples": 4})
    path.write_bytes(b"nonsense\n")
    with pytest.raises(QuotaError, match="damaged"):
        Journal(path, identity)


def test_files_of_sensitivities_are_sealed(tmp_path: Path):
    made = Sensitivities(
        values=(0.1, 1 / 3), lower=(0.0, 0.1), upper=(0.2, 1.0), provenance={"samples": 2}
    )
    path = tmp_path / "s.json"
    made.write(path)
    assert Sensitivities.read(path) == made
    assert made.at([1]) == (1 / 3,)
    with pytest.raises(QuotaError, match="no sensitivity of layer 2: there are 2"):
        made.at([0, 2])
    path.write_text(path.read_text().replace("0.1", "0.2", 1))
    with pytest.raises(QuotaError, match="checksum"):
        Sensitivities.read(path)
    path.write_text("{}")
    with pytest.raises(QuotaError, match="no file of sensitivities"):
        Sensitivities.read(path)


def test_the_first_difference_is_named_by_its_path():
    one = {"text": {"num_layers": 4, "hidden_size": 8}, "type": "llava"}
    assert first_difference(one, {**one}) is None
    other = {**one, "text": {"num_layers": 2, "hidden_size": 8}}
    assert first_difference(one, other) == "text.num_layers is 4, not 2"
    assert first_difference(one, {"text": one["text"]}) == "type is 'llava', not None"
