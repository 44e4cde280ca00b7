"""Feed-forward blocks that are widened for the int4 matmul compute what they computed before."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quota_jax as qj
import quota_jax.models.params as params_module
from quota_jax.bench import example_batch
from quota_jax.config import PRESETS
from quota_jax.models.alignment import align, aligned_width
from quota_jax.models.params import abstract_params, build_model
from quota_jax.quantization import QuantizationConfig
from quota_jax.recipe import Recipe
from tests.decode_samples import METHODS, random_model, tiny_config
from tests.test_fused_tower import run, tower


@pytest.mark.parametrize(
    ("width", "aligned"),
    [(3420, 3456), (11008, 11008), (4304, 4352), (124, 128), (130, 130), (48, 48), (1, 1)],
)
def test_widths(width, aligned):
    assert aligned_width(width) == aligned


@pytest.mark.parametrize("family", ["llava", "qwen"])
@pytest.mark.parametrize("method", ["RTN", "RTN, 8-bit activations", "FlatQuant"])
def test_a_widened_tower_computes_the_same_bits(monkeypatch, family, method):
    """Fused and module by module, against a model that was left as it is."""
    wide, pixels = tower(family, method, "bfloat16", vision_intermediate_size=124)
    with monkeypatch.context() as patch:
        patch.setattr(params_module, "align", lambda params, quantization: params)
        narrow, _ = tower(family, method, "bfloat16", vision_intermediate_size=124)
    widths = [model.vision.layers.mlp.down.packed.shape[-1] * 2 for model in (narrow, wide)]
    assert widths == [124, 128]
    expected = run(narrow, pixels)
    assert expected.std() > 0.1
    np.testing.assert_array_equal(run(wide, pixels), expected)
    np.testing.assert_array_equal(run(wide, pixels, monkeypatch), expected)


@pytest.mark.parametrize("family", ["llava", "qwen"])
def test_a_widened_decoder_computes_the_same_bits(monkeypatch, family):
    """A pruned prefill and four steps, with FlatQuant's transforms of the true width."""
    config, found = tiny_config(family, intermediate_size=124), []
    batch = example_batch(config, 2, 16)
    recipe = Recipe.uniform(num_layers=4, layers=[1], keep=0.5)
    for aligned in (False, True):
        with monkeypatch.context() as patch:
            if not aligned:
                patch.setattr(params_module, "align", lambda params, quantization: params)
            model = random_model(config, METHODS["FlatQuant"], jnp.dtype("bfloat16"))
        assert 2 * model.decoder.layers.mlp.down.packed.shape[-1] == (128 if aligned else 124)
        logits, _ = qj.prefill(model, batch, recipe=recipe)
        tokens = qj.generate(model, batch, recipe=recipe, max_new_tokens=5).tokens
        found.append((np.asarray(logits), np.asarray(tokens)))
    for one, other in zip(*found, strict=True):
        assert np.ptp(one) > 0.1
        np.testing.assert_array_equal(one, other)


def test_shapes_of_a_real_tower_are_widened_without_arrays():
    config, quantization = PRESETS["qwen2_5_vl_7b"], METHODS["FlatQuant"]
    specs = abstract_params(config, quantization, jnp.bfloat16)
    layers = build_model(config, quantization, specs).vision.layers
    assert layers.mlp.gate_up.packed.shape == (32, 6912, 640)
    assert layers.mlp.gate_up.scale.shape == layers.mlp.gate_up.bias.shape == (32, 6912)
    assert layers.mlp.down.packed.shape == (32, 1280, 1728)
    assert layers.mlp.down.left.shape[-1] * layers.mlp.down.right.shape[-1] == 3420


@pytest.mark.parametrize("label", ["W16A16KV16", "W8A8KV4", "W4A16KV4", "W4A16KV4G20"])
def test_other_precisions_are_left_as_they_are(label):
    config, quantization = PRESETS["qwen2_5_vl_7b"], QuantizationConfig.parse(label)
    specs = abstract_params(config, quantization, jnp.bfloat16)
    assert align(specs, quantization) == specs


def test_a_scale_of_hidden_channels_keeps_the_width():
    stem = "vision.layers.mlp."
    params: dict[str, Any] = {
        f"{stem}up.packed": jnp.zeros((2, 124, 8), jnp.uint8),
        f"{stem}down.packed": jnp.zeros((2, 16, 62), jnp.uint8),
    }
    quantization = QuantizationConfig.parse("W4A4KV4")
    assert align(params, quantization)[f"{stem}up.packed"].shape == (2, 128, 8)
    params[f"{stem}down.input_scale"] = jax.ShapeDtypeStruct((2, 124), jnp.float32)
    assert align(params, quantization) == params
