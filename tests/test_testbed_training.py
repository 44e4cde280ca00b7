"""Training of the small LLaVA: forward pass, optimizer, plan, learning and export, all tiny."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quota_jax.config import LlavaConfig, config_from_hf
from quota_jax.testbed import optimizer
from quota_jax.testbed.export import hf_tensors, write_hf_folder
from quota_jax.testbed.layout import UNIFORMS_PER_SCENE, Difficulty, sample_layout
from quota_jax.testbed.questions import TYPES
from quota_jax.testbed.renderer import render
from quota_jax.testbed.training import (
    EASY,
    FULL,
    TEXT_LENGTH,
    TrainingConfig,
    draw_batch,
    eval_step,
    init_state,
    majority,
    model_params,
    time_knobs,
    train_step,
)
from quota_jax.testbed.training_model import (
    PREFIX,
    SMALL_LLAVA,
    init_params,
    parameter_shapes,
    text_logits,
    vision_features,
)
from quota_jax.testbed.vocabulary import ID, IMAGE, VOCAB_SIZE, prompt

TINY = dataclasses.replace(
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
CONFIG = TrainingConfig(
    model=TINY,
    batch_size=2,
    num_questions=4,
    learning_rate=1e-2,
    warmup_steps=1,
    attention="xla",
    dtype="float32",
    eval_scenes=2,
)


def spread_params(config: LlavaConfig, seed: int = 3) -> dict[str, np.ndarray]:
    """Random parameters in which biases, norms and the class token matter too."""
    rng = np.random.default_rng(seed)
    params = init_params(config, seed)
    for name, value in params.items():
        if name.endswith((".bias", ".scale", "class_embed", "head.weight")):
            params[name] = (value + 0.2 * rng.normal(size=value.shape)).astype(np.float32)
    return params


def test_small_llava_is_small_and_deep_enough():
    count = sum(int(np.prod(shape)) for shape in parameter_shapes(SMALL_LLAVA).values())
    assert count == 11_406_528
    assert 2 * count <= 24_000_000
    assert SMALL_LLAVA.text.num_layers >= 12
    assert SMALL_LLAVA.tokens_per_image == 576
    assert SMALL_LLAVA.image_token_id == ID[IMAGE]


def test_training_batches_are_well_formed():
    batch = jax.jit(partial(draw_batch, CONFIG))(jax.random.key(0), FULL)
    assert batch.pixels.shape == (2, 3, 336, 336)
    assert batch.tokens.shape == batch.weights.shape == (2, TEXT_LENGTH)
    assert (np.asarray(batch.tokens) >= 0).all()
    assert (np.asarray(batch.tokens) < VOCAB_SIZE).all()
    weights = np.asarray(batch.weights)
    assert set(np.unique(weights)) == {0.0, 0.5, 1.0}
    # Nothing is predicted from the picture alone, and nothing behind the end.
    assert (weights[:, 0] == 0).all()
    assert (weights[np.asarray(batch.tokens) == 0] == 0).all()


def test_training_lowers_the_loss():
    step = jax.jit(partial(train_step, CONFIG))
    state, losses = init_state(CONFIG), []
    before = {name: np.asarray(value) for name, value in state.params.items()}
    for index in range(24):
        knobs = time_knobs(CONFIG, index, 0.0, 1.0)
        state, metrics = step(state, np.int32(index), knobs)
        losses.append(np.asarray(metrics))
    losses = np.array(losses)
    assert np.isfinite(losses).all()
    assert losses[0, 0] > 4  # about log(160) at the start
    assert losses[-4:, 0].mean() < 0.7 * losses[0, 0]
    assert losses[-4:, 1].mean() < 0.8 * losses[0, 1]  # the auxiliary patch loss
    for name, value in state.params.items():
        frozen = name.startswith("vision.post_norm")  # behind the last feature layer: no gradient
        moved = np.abs(np.asarray(value) - before[name]).max()
        assert (moved == 0) == frozen, name
    # The last tower layer is in the file only: nothing but weight decay touches it.
    scale = before["vision.layers.norm1.scale"][-1]
    np.testing.assert_array_equal(state.params["vision.layers.norm1.scale"][-1], scale)
    assert not any(name.startswith("aux.") for name in model_params(state))


def test_evaluation_counts_exact_answers():
    """The image switch works, and a head that always says "yes" then stops is scored as such."""
    params = {k: jnp.asarray(v) for k, v in init_params(TINY, 0).items()}
    correct, asked, answers = jax.jit(partial(eval_step, CONFIG))(params, 0, np.float32(1))
    assert correct.shape == asked.shape == (2, len(TYPES))
    assert answers.shape == (2, len(TYPES), 2)
    assert not np.asarray(correct).any()
    assert np.asarray(asked)[:, 0].all()
    table = majority(
        np.array([[[7, -1]], [[7, -1]], [[8, -1]]]).repeat(8, 1), np.ones((3, 8), bool)
    )
    assert table["presence"] == pytest.approx(200 / 3)


def test_padding_behind_the_text_changes_nothing():
    params = spread_params(TINY)
    features = np.random.default_rng(0).normal(size=(2, 576, 32)).astype(np.float32)
    tokens = np.random.default_rng(1).integers(5, 100, (2, 12)).astype(np.int32)
    short = text_logits(
        params, TINY, jnp.asarray(features), jnp.asarray(tokens[:, :8]), backend="xla"
    )
    tokens[:, 8:] = 0
    long = text_logits(params, TINY, jnp.asarray(features), jnp.asarray(tokens), backend="xla")
    np.testing.assert_allclose(short, long[:, :8], atol=1e-5)


def test_time_plan():
    budget = 100.0
    rates = [time_knobs(CONFIG, 10, t, budget).learning_rate for t in (0, 50, 65, 80, 99.9, 120)]
    assert rates[0] == rates[1] == rates[2] == np.float32(1e-2)
    assert rates[2] > rates[3] > rates[4]
    assert rates[4] == rates[5] == pytest.approx(0.02 * 1e-2)
    slow = dataclasses.replace(CONFIG, warmup_steps=100)
    assert time_knobs(slow, 49, 0.0, budget).learning_rate == pytest.approx(5e-3)
    assert time_knobs(CONFIG, 0, 0.0, budget).difficulty == EASY
    assert time_knobs(CONFIG, 0, 30.0, budget).difficulty == FULL
    middle = time_knobs(CONFIG, 0, 13.0, budget).difficulty
    assert EASY.min_size > middle.min_size > FULL.min_size


def test_config_is_validated():
    with pytest.raises(ValueError, match="flash"):
        TrainingConfig(model=TINY, attention="flash")
    with pytest.raises(ValueError, match=r"1\.5"):
        TrainingConfig(model=TINY, anneal_share=1.5)


def test_muon_orthogonalises_and_keeps_parts_apart():
    rng = np.random.default_rng(0)
    for shape in ((2, 24, 40), (2, 40, 24)):
        values = jnp.asarray(rng.normal(size=shape).astype(np.float32))
        singular = np.linalg.svd(np.asarray(optimizer.orthogonalise(values, jnp.float32)))[1]
        # The quintic iteration settles in about 0.7 .. 1.2, not at 1.
        assert singular.min() > 0.4
        assert singular.max() < 1.3
    name = "decoder.layers.attn.qkv.weight"
    queries = TINY.text.num_heads * TINY.text.head_dim
    shape = (1, queries + 2 * TINY.text.num_kv_heads * TINY.text.head_dim, 8)
    params = {name: jnp.zeros(shape), "decoder.norm.scale": jnp.ones(8)}
    grad = rng.normal(size=shape).astype(np.float32)
    larger = grad.copy()
    larger[:, :queries] *= 50
    moved = []
    for g in (grad, larger):
        grads = {name: jnp.asarray(g), "decoder.norm.scale": jnp.ones(8)}
        state = optimizer.init_optimizer(params)
        new, state, norm = optimizer.update(TINY, params, grads, state, learning_rate=0.1)
        assert float(norm) == pytest.approx(np.sqrt((g**2).sum() + 8), rel=1e-5)
        assert state.second.keys() == {"decoder.norm.scale"}
        moved.append(np.asarray(new[name]))
        np.testing.assert_allclose(new["decoder.norm.scale"], 0.9, atol=1e-3)  # Adam: sign * rate
    np.testing.assert_allclose(moved[0], moved[1], atol=2e-3)


def test_muon_takes_matrices_only():
    taken = {name for name in parameter_shapes(TINY) if optimizer.uses_muon(name)}
    assert len(taken) == 10
    assert not any("embed" in name or "head" in name or "bias" in name for name in taken)


def test_export_is_complete_and_sharded(tmp_path):
    params = spread_params(TINY)
    sizes = write_hf_folder(tmp_path / "m", params, TINY, card="# card\n", shard_bytes=60_000)
    folder = tmp_path / "m"
    shards = [name for name in sizes if name.endswith(".safetensors")]
    assert len(shards) > 2
    assert all(sizes[name] < 60_000 + 8_000 for name in shards)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(shards)
    assert index["metadata"]["total_size"] == 2 * sum(v.size for v in params.values())
    assert config_from_hf(json.loads((folder / "config.json").read_text())) == TINY
    assert (folder / "README.md").read_text() == "# card\n"
    with pytest.raises(ValueError, match=r"aux\.kind\.weight"):
        list(hf_tensors({"aux.kind.weight": np.zeros(3)}, TINY))


@pytest.mark.torch
def test_forward_agrees_with_transformers(tmp_path):
    import torch
    from transformers import AutoTokenizer

    from tests.tiny_models import load_oracle

    # Through bfloat16 once, as exported.
    params = {
        name: np.asarray(jnp.asarray(value).astype(jnp.bfloat16).astype(jnp.float32))
        for name, value in spread_params(TINY).items()
    }
    write_hf_folder(tmp_path / "m", params, TINY, card="")
    oracle = load_oracle(tmp_path / "m")
    uniforms = np.random.default_rng(0).random((2, UNIFORMS_PER_SCENE), dtype=np.float32)
    pixels = render(sample_layout(uniforms, Difficulty()))
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "m")
    ids = tokenizer(prompt("Is there a red circle in the image?"))["input_ids"]
    text = ids[ids.index(ID[IMAGE]) + 1 :]
    full = [*PREFIX, *[ID[IMAGE]] * 576, *text]
    from quota_jax.testbed.training_model import MEAN, STD

    normal = (np.asarray(pixels, np.float32) / 255 - MEAN[:, None, None]) / STD[:, None, None]
    with torch.no_grad():
        expected = oracle(
            input_ids=torch.tensor([full, full]), pixel_values=torch.tensor(normal)
        ).logits.numpy()
    with jax.default_matmul_precision("highest"):
        features = vision_features(params, TINY, pixels, dtype=jnp.float32, backend="xla")
        got = text_logits(
            params, TINY, features, jnp.asarray([text, text], jnp.int32), backend="xla"
        )
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(got, expected[:, 578:], atol=1e-4)


@pytest.mark.slow
def test_example_script_runs_on_a_cpu(tmp_path, root, monkeypatch):
    monkeypatch.syspath_prepend(str(root / "examples"))
    train_small_llava = importlib.import_module("train_small_llava")
    report = train_small_llava.main(["--tiny", "--steps", "4", "--out", str(tmp_path / "m")])
    assert report["steps"] == 4
    assert set(report["seeing"]) == set(report["blind"]) == set(TYPES)
    card = (tmp_path / "m" / "README.md").read_text()
    assert "| seeing |" in card
    assert len(list((tmp_path / "m").glob("*.safetensors"))) == 1
    sys.modules.pop("train_small_llava")
