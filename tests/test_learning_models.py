"""Small models in training: their forward pass is the library's and transformers', their sequences
are what the exported folder's chat template and tokenizer make, the real sizes fit and lower."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from PIL import Image

import quota_jax as qj
from converters import convert
from converters.export_params import write_params
from quota_jax.config import LlavaConfig, QwenVlConfig, config_from_hf
from quota_jax.errors import QuotaError
from quota_jax.models.vision_language import sequence_of
from quota_jax.testbed.learning import flops
from quota_jax.testbed.learning.data import FULL, normalise
from quota_jax.testbed.learning.dialect import dialect_of, write_turns
from quota_jax.testbed.learning.gpu_check import check_programs
from quota_jax.testbed.learning.layers import attention
from quota_jax.testbed.learning.models import (
    SMALL_MODELS,
    count_parameters,
    init_params,
    model_params,
    tiny_model,
)
from quota_jax.testbed.learning.processor import folder_files, special_ids
from quota_jax.testbed.learning.qwen import from_windows, picture_grid, to_windows
from quota_jax.testbed.learning.step import TrainingConfig, forward
from quota_jax.testbed.world.conversation import caption_turn, prompt_words, turns
from quota_jax.testbed.world.layout import sample_layout, scene_uniforms
from quota_jax.testbed.world.questions import UNIFORMS_PER_QUESTION, ask_layout, draw_requests
from quota_jax.testbed.world.words import HOLE, join_words

FAMILIES = ("llava", "qwen2_5_vl")
SIZES = {"llava": (70, 70), "qwen2_5_vl": (280, 364)}
"""Pictures of the exported models; Qwen2.5-VL's has windows of four sizes."""


def model_config(family: str) -> Any:
    """Tiny models with what could go wrong: an odd tower length, grouped heads, tied words."""
    config = tiny_model(family)
    if isinstance(config, LlavaConfig):
        vision = dataclasses.replace(config.vision, image_size=70)  # 25 patches and a class token
        return dataclasses.replace(config, vision=vision)
    text = dataclasses.replace(config.text, tie_word_embeddings=True)
    return dataclasses.replace(config, text=text)


def spread_params(config: Any) -> dict[str, np.ndarray]:
    """Random parameters, representable in bfloat16, in which biases and norms matter."""
    rng = np.random.default_rng(3)
    params = model_params(init_params(config, 3))
    for name, value in params.items():
        if not name.endswith("weight") or "head" in name or "class" in name:
            value = value + 0.2 * rng.normal(size=value.shape)
        params[name] = value.astype(ml_dtypes.bfloat16).astype(np.float32)
    return params


def conversations(seed: int, rows: int, count: int) -> SimpleNamespace:
    """Random scenes' turns as ids, and the same as texts put together word by word."""
    rng = np.random.default_rng(seed)
    layout = sample_layout(scene_uniforms(rng, rows), FULL)
    uniforms = rng.random((rows, count * UNIFORMS_PER_QUESTION), dtype=np.float32)
    requests = draw_requests(rng.random((rows, count), dtype=np.float32))
    questions = ask_layout(layout, uniforms, *requests)
    prompts = prompt_words(questions, rng.random((rows, count, 4), dtype=np.float32), np, 0.5)
    words, predicted = turns(prompts, questions.answers)
    caption, caption_predicted = caption_turn(layout)
    texts = [
        [(join_words(q), join_words(a)) for q, a in zip(*pair, strict=True)]
        for pair in zip(prompts, questions.answers, strict=True)
    ]
    for row, ids in enumerate(caption):
        kept = ids[caption_predicted[row]]
        texts[row].append(("Describe the image.", join_words(kept[kept != HOLE][:-1])))
    return SimpleNamespace(
        words=np.concatenate([words, caption], axis=1),
        weights=np.concatenate([predicted, caption_predicted], axis=1).astype(np.float32),
        texts=texts,
    )


def messages_of(texts: list[tuple[str, str]]) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    for number, (question, answer) in enumerate(texts):
        content = [{"type": "image"}] * (number == 0) + [{"type": "text", "text": question}]
        messages += [{"role": "user", "content": content}]
        messages += [{"role": "assistant", "content": answer}]
    return messages


@pytest.fixture(scope="module", params=FAMILIES)
def exported(request, tmp_path_factory):
    """An exported folder of random weights, the model loaded from it, and one batch of both."""
    family = request.param
    config, folder = model_config(family), tmp_path_factory.mktemp(family) / "hf"
    folder.mkdir()
    params = spread_params(config)
    special = special_ids(family)
    write_params(folder, params, config, max_shard_size=200_000, text_fields=special)
    for name, content in folder_files(family).items():
        (folder / name).write_bytes(content)
    if family == "llava":  # the files are those of the real picture size
        path = folder / "preprocessor_config.json"
        settings = json.loads(path.read_text())
        settings |= {"size": {"shortest_edge": 70}, "crop_size": {"height": 70, "width": 70}}
        path.write_text(json.dumps(settings))
    convert(folder, folder.parent / "checkpoint")
    vlm = qj.load(folder.parent / "checkpoint", dtype="float32")
    rng = np.random.default_rng(5)
    pixels = rng.integers(0, 256, (1, *SIZES[family], 3), np.uint8)
    talk = conversations(7, 1, 3)
    prompt = vlm.processor.tokenizer.apply_chat_template(messages_of(talk.texts[0]), tokenize=False)
    batch = vlm.processor(images=[[Image.fromarray(pixels[0])]], prompts=[prompt])
    return SimpleNamespace(
        family=family, config=config, folder=folder, params=params, vlm=vlm, batch=batch,
        pixels=pixels.transpose(0, 3, 1, 2), talk=talk,
    )  # fmt: skip


def training_sequence(exported, length: int) -> Any:
    dialect = dialect_of(exported.config)
    return write_turns(dialect, exported.talk.words, exported.talk.weights, length, np)


def test_training_forward_is_the_librarys(exported):
    """From uint8 pixels and the world's turns on one side, an image and a prompt on the other."""
    batch, vlm = exported.batch, exported.vlm
    real = int(batch.lengths[0])
    visual = np.asarray(batch.is_visual[0])[:real]
    before = int(visual.argmax())
    count = real - before - int(visual.sum())
    tokens, _ = training_sequence(exported, 250)
    text = np.asarray(batch.tokens[0])[:real][~visual]
    assert tuple(text[:before]) == dialect_of(exported.config).before
    np.testing.assert_array_equal(tokens[0, :count], text[before:])
    assert not tokens[0, count:].any()

    @jax.jit
    def library(model, batch):
        x = model.embed(batch, model.visual_features(batch.pixels))
        recipe = qj.Recipe.none(exported.config.text.num_layers)
        x, _, _ = model.decoder.prefill(x, sequence_of(batch), recipe)
        return model.decoder.logits(x)

    expected = np.asarray(library(vlm.model, batch))[0, :real][~visual][before:]
    config = TrainingConfig(
        model=exported.config,
        sizes=(SIZES[exported.family],),
        attention="xla",
        dtype="float32",
    )
    with jax.default_matmul_precision("highest"):
        got, _ = jax.jit(lambda p, x, t: forward(config, p, x, t))(
            exported.params, normalise(exported.pixels), tokens
        )
    got = np.asarray(got)[0, :count]
    assert np.abs(expected).max() > 1
    assert np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.torch
def test_export_agrees_with_transformers(exported):
    import torch
    from transformers import AutoTokenizer

    from tests.tiny_tensors import load_oracle

    batch, vlm = exported.batch, exported.vlm
    oracle = load_oracle(exported.folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(exported.folder)
    prompt = tokenizer.apply_chat_template(messages_of(exported.talk.texts[0]), tokenize=False)
    image = vlm.processor.placeholders["image"]
    visual = int(batch.is_visual.sum())
    ids = tokenizer(prompt.replace(image, image * visual))["input_ids"]
    real = int(batch.lengths[0])
    assert ids == np.asarray(batch.tokens[0])[:real].tolist()
    inputs: dict[str, Any] = {"input_ids": torch.tensor([ids])}
    if exported.family == "llava":
        inputs["pixel_values"] = torch.tensor(np.asarray(batch.pixels))
    else:
        from transformers import AutoImageProcessor

        picture = Image.fromarray(exported.pixels[0].transpose(1, 2, 0))
        processor = AutoImageProcessor.from_pretrained(exported.folder, backend="pil")
        made = processor(picture, return_tensors="pt")
        inputs |= {key: made[key] for key in ("pixel_values", "image_grid_thw")}
        token = exported.config.image_token_id
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == token).long()
    with torch.no_grad():
        expected = oracle(**inputs).logits[0].numpy()
    config = TrainingConfig(
        model=exported.config, sizes=(SIZES[exported.family],), attention="xla", dtype="float32"
    )
    tokens, _ = training_sequence(exported, 250)
    with jax.default_matmul_precision("highest"):
        got, _ = jax.jit(lambda p, x, t: forward(config, p, x, t))(
            exported.params, normalise(exported.pixels), tokens
        )
    count = real - len(dialect_of(exported.config).before) - visual
    expected = expected[-count:]
    assert np.abs(np.asarray(got)[0, :count] - expected).max() <= 1e-4 * np.abs(expected).max()


def test_the_folder_is_complete(exported):
    index = json.loads((exported.folder / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert index["metadata"]["total_size"] == 2 * count_parameters(exported.config)
    hf = json.loads((exported.folder / "config.json").read_text())
    assert config_from_hf(hf) == exported.config
    ends = {"llava": "</s>", "qwen2_5_vl": "<|im_end|>"}
    stop = exported.vlm.processor.stop_ids
    assert exported.vlm.processor.tokenizer.convert_tokens_to_ids(ends[exported.family]) in stop
    tokenizer = exported.vlm.processor.tokenizer
    assert hf["text_config"]["eos_token_id"] == tokenizer.eos_token_id
    assert hf["text_config"]["pad_token_id"] == tokenizer.pad_token_id
    params = dict(exported.params)
    params.pop("decoder.norm.scale")
    with pytest.raises(QuotaError, match=r"decoder\.norm\.scale"):
        write_params(exported.folder, params, exported.config)


@pytest.mark.parametrize("family", FAMILIES)
def test_sequences_are_those_of_the_chat_template(family, tmp_path):
    """Many conversations, and which tokens are to be predicted: answers and what ends them."""
    from transformers import AutoTokenizer

    for name, content in folder_files(family).items():
        (tmp_path / name).write_bytes(content)
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path)
    config = SMALL_MODELS[family]
    dialect = dialect_of(config)
    talk = conversations(11, 12, 6)
    tokens, weights = write_turns(dialect, talk.words, talk.weights, 500, np)
    end = {"llava": "</s>", "qwen2_5_vl": "<|im_end|>"}[family]
    unknown = tokenizer.unk_token_id
    for row, texts in enumerate(talk.texts):
        ids = tokenizer(tokenizer.apply_chat_template(messages_of(texts), tokenize=False))[
            "input_ids"
        ]
        place = ids.index(config.image_token_id)
        assert tuple(ids[:place]) == dialect.before
        assert unknown not in ids
        text = ids[place + 1 :]
        assert tokens[row, : len(text)].tolist() == text
        assert not tokens[row, len(text) :].any()
        wanted = []
        for _, answer in texts:
            wanted += [*tokenizer(answer, add_special_tokens=False)["input_ids"]]
            wanted.append(tokenizer.convert_tokens_to_ids(end))
        assert tokens[row][weights[row] > 0].tolist() == wanted


def test_windows_and_their_inverse():
    """Against a plain assignment of patches to squares of 112 pixels."""
    vision = tiny_model("qwen2_5_vl").vision
    grid = picture_grid(vision, (280, 364))
    assert sorted(set(grid.window_lengths)) == [8, 16, 32, 64]
    squares = [tuple(c) for c in grid.coordinates // 8]
    starts = np.cumsum(grid.window_lengths) - grid.window_lengths
    for start, length in zip(starts, grid.window_lengths, strict=True):
        assert len(set(squares[start : start + length])) == 1
    assert len(set(map(tuple, grid.coordinates))) == 20 * 26
    x = jnp.arange(2 * 520 * 2 * 3).reshape(2, 520, 2, 3)
    cut = to_windows(x, grid.window_lengths, 64)
    assert cut.shape == (2 * len(grid.window_lengths), 64, 2, 3)
    np.testing.assert_array_equal(cut[3, : grid.window_lengths[3]], x[0, starts[3] : starts[4]])
    np.testing.assert_array_equal(from_windows(cut, grid.window_lengths), x)


def test_attention_repeats_grouped_heads_and_hides_padding():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 6, n, 8)), jnp.float32) for n in (4, 2, 2))
    valid = np.array([6, 4])
    got = attention(q, k, v, causal=False, backend="xla", valid=valid)
    for b, head in np.ndindex(2, 4):
        keys, values = (part[b, : valid[b], head // 2] for part in (k, v))
        scores = np.exp(np.asarray(q[b, :, head] @ keys.T) / np.sqrt(8))
        expected = scores / scores.sum(1, keepdims=True) @ values
        np.testing.assert_allclose(got[b, :, head], expected, atol=1e-5)


@pytest.mark.parametrize("family", ["llava", pytest.param("qwen2_5_vl", marks=pytest.mark.slow)])
def test_real_sizes_fit_and_lower_for_a_gpu(family):
    import importlib.util
    from pathlib import Path

    path = Path(__file__).parent.parent / "examples" / "train_small_vlm.py"
    spec = importlib.util.spec_from_file_location("train_small_vlm", path)
    assert spec is not None
    assert spec.loader is not None
    script: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    config = script.real_config(family)
    assert 2 * count_parameters(config.model) <= 23_900_000
    text = config.model.text
    assert text.num_layers >= 12
    assert all(size % 128 == 0 for size in (text.hidden_size, text.intermediate_size))
    assert flops.pictures_per_second(config) * 600 >= 500_000
    if isinstance(config.model, QwenVlConfig):
        config = dataclasses.replace(config, sizes=((280, 448),))
    for size in config.sizes:
        assert flops.sequence_length(config, size) % 2 == 0
    calls = check_programs(config)
    runs = 5 if family == "qwen2_5_vl" else 2  # scans over layers with one kind of attention
    assert calls[config.sizes[0]] == 2 * runs
    assert calls["answer"] == runs
