"""The shipped small LLaVA: files, sizes, and that it sees, through the library's public path."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from quota_jax.config import config_from_hf
from quota_jax.errors import QuotaError
from quota_jax.testbed import evaluate as evaluation
from quota_jax.testbed import small_llava_path
from quota_jax.testbed.training_model import SMALL_LLAVA, init_params, parameter_shapes
from quota_jax.testbed.vocabulary import ID, processor_files

SHARD_LIMIT = 15_000_000
TOTAL_LIMIT = 24_000_000


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    """The shipped model, converted and loaded in float32."""
    import quota_jax as qj
    from converters import convert

    path = tmp_path_factory.mktemp("small") / "checkpoint"
    convert(small_llava_path(), path)
    return qj.load(path, dtype="float32")


def test_files_and_sizes():
    folder = small_llava_path()
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) == 2
    assert all(shard.stat().st_size <= SHARD_LIMIT for shard in shards)
    assert sum(path.stat().st_size for path in folder.iterdir()) <= TOTAL_LIMIT
    assert config_from_hf(json.loads((folder / "config.json").read_text())) == SMALL_LLAVA
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    seen, count = {}, 0
    for shard in shards:
        with safe_open(shard, framework="numpy") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                view = tensors.get_slice(name)
                assert view.get_dtype() == "BF16"
                count += int(np.prod(view.get_shape()))
                seen[name] = shard.name
    assert seen == index
    assert count == sum(int(np.prod(shape)) for shape in parameter_shapes(SMALL_LLAVA).values())


def test_tokenizer_files_are_those_of_the_vocabulary():
    folder = small_llava_path()
    for name, content in processor_files().items():
        written = (folder / name).read_bytes()
        if name.endswith(".json"):
            assert json.loads(written) == json.loads(content), name
        else:
            assert written == content, name


def test_model_card_states_the_measured_accuracies():
    card = (small_llava_path() / "README.md").read_text()
    rows = {
        cells[1].strip(): [float(cell) for cell in cells[2:-1]]
        for cells in (line.split("|") for line in card.splitlines())
        if len(cells) == 11 and cells[1].strip() in ("seeing", "picture zeroed")
    }
    for index, target in enumerate((95, 90, 90)):  # presence, color, position
        assert rows["seeing"][index] >= target
        assert rows["seeing"][index] >= rows["picture zeroed"][index] + 25


def test_a_missing_model_is_named(monkeypatch, tmp_path):
    import quota_jax.testbed as testbed

    monkeypatch.setattr(testbed, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(QuotaError, match="small LLaVA is not installed"):
        small_llava_path()


def test_training_forward_is_the_librarys():
    """Last-token logits of the training forward and of `prefill`, same random parameters."""
    from quota_jax.generation import prefill
    from quota_jax.models.params import build_model
    from quota_jax.testbed import draw_scenes
    from quota_jax.testbed.training_model import MEAN, PREFIX, STD, text_logits, vision_features

    config = dataclasses.replace(
        SMALL_LLAVA,
        vision=dataclasses.replace(
            SMALL_LLAVA.vision, hidden_size=32, intermediate_size=48, num_layers=3, num_heads=2
        ),
        text=dataclasses.replace(
            SMALL_LLAVA.text,
            hidden_size=48,
            intermediate_size=64,
            num_layers=2,
            num_heads=3,
            num_kv_heads=3,
            head_dim=16,
        ),
    )
    rng = np.random.default_rng(5)
    params = {
        name: jnp.asarray(value + 0.1 * rng.normal(size=value.shape), jnp.float32)
        for name, value in init_params(config, 1).items()
    }
    pixels = draw_scenes(0, 1)[0].image.transpose(2, 0, 1)[None]
    normal = (pixels / np.float32(255) - MEAN[:, None, None]) / STD[:, None, None]
    text = [ID[word] for word in ("where", "is", "the", "car", "?", "assistant:")]
    ids = [*PREFIX, *[config.image_token_id] * 576, *text]
    from quota_jax.batch import Batch

    batch = Batch(
        tokens=jnp.asarray([ids], jnp.int32),
        lengths=jnp.asarray([len(ids)], jnp.int32),
        visual_index=jnp.asarray([[-1, -1, *range(576), *[-1] * len(text)]], jnp.int32),
        positions=jnp.arange(len(ids), dtype=jnp.int32)[None],
        pixels=jnp.asarray(normal),
        text_bucket=len(ids) - 576,
        visual_bucket=576,
    )
    with jax.default_matmul_precision("highest"):
        library, _ = prefill(build_model(config, None, params), batch)
        features = vision_features(params, config, pixels, dtype=jnp.float32, backend="xla")
        tokens = jnp.asarray([text], jnp.int32)
        training = text_logits(params, config, features, tokens, backend="xla")[:, -1]
    np.testing.assert_allclose(library, training, atol=1e-4)
    assert np.abs(training).max() > 1


@pytest.mark.slow
def test_the_model_sees(vlm):
    """Small sample of what the card states; three standard errors below its targets."""
    seeing = evaluation.evaluate(vlm, scenes=16, batch_size=8)
    blind = evaluation.evaluate(vlm, scenes=16, batch_size=8, blind=True)
    for name, target in (("presence", 95), ("color", 90), ("position", 90)):
        spread = 3 * 100 * np.sqrt(target / 100 * (1 - target / 100) / seeing[name].asked)
        assert seeing[name].percent >= target - spread, name
        assert seeing[name].percent >= blind[name].percent + 15, name


def test_evaluation_counts_right_answers(monkeypatch):
    """With a stand-in that knows every answer but calls all colors red."""
    items = evaluation.make_items(6, 3, evaluation.MAIN_TYPES)
    truth = {question.prompt: question.answer for _, question in items}
    assert len(truth) > 6
    calls = []

    class Processor:
        def __call__(self, images, prompts):
            assert [len(row) for row in images] == [1] * len(prompts)
            pixels = jnp.ones((len(prompts), 3, 2, 2))
            return FakeBatch(prompts=tuple(prompts), pixels=pixels)

        def decode(self, tokens, lengths):
            answers = [truth[text] for text in tokens]
            return [
                "Red" if "color" in text else a for text, a in zip(tokens, answers, strict=True)
            ]

    @dataclasses.dataclass(frozen=True)
    class FakeBatch:
        prompts: tuple[str, ...]
        pixels: jax.Array

    def generate(model, batch, *, recipe, max_new_tokens):
        assert (model, recipe) == ("model", "own recipe")
        calls.append((len(batch.prompts), float(batch.pixels.sum())))
        return SimpleNamespace(tokens=batch.prompts, lengths=None)

    monkeypatch.setattr(evaluation, "generate", generate)
    vlm = SimpleNamespace(model="model", recipe="own recipe", processor=Processor())
    unique = [next(item for item in items if item[1].prompt == text) for text in truth]
    answers = evaluation.answer_items(vlm, unique, batch_size=4)
    assert len(answers) == len(unique)
    assert {size for size, _ in calls} == {4}
    table = evaluation.score(answers)
    assert table["presence"].percent == table["position"].percent == 100
    reds = sum(q.type == "color" and q.answer == "red" for _, q in unique)
    assert table["color"].correct == reds < table["color"].asked
    calls.clear()
    evaluation.answer_items(vlm, unique[:2], batch_size=2, blind=True)
    assert calls == [(2, 0.0)]
    with pytest.raises(QuotaError, match="unknown question type 'smell'"):
        evaluation.make_items(1, 0, ["smell"])
    with pytest.raises(QuotaError, match="batch_size"):
        evaluation.answer_items(vlm, unique, batch_size=0)
