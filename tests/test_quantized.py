"""Simulated equals packed, slots equal batches, and quantized checkpoints are really small."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quota_jax as qj
from converters import convert
from quota_jax.checkpoint import open_checkpoint
from quota_jax.errors import QuotaError
from quota_jax.generation import begin, decode_chunk, insert
from quota_jax.models.params import abstract_params, build_model, flatten_params
from quota_jax.quant.calibrate import calibrate, quantize_params
from quota_jax.quantization import QuantizationConfig
from quota_jax.recipe import Recipe
from tests.tiny_models import draw_picture, write_tiny_llava

PROMPT = "USER: <image>\nis there a red circle ? ASSISTANT:"
RECIPE = Recipe.uniform(num_layers=2, layers=[0], keep=0.5)


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    root = tmp_path_factory.mktemp("quantized")
    convert(write_tiny_llava(root / "hf", image_size=56), root / "ckpt")
    return root / "ckpt"


@pytest.mark.parametrize(
    "label",
    ["W4A4KV4"]
    + [
        pytest.param(label, marks=pytest.mark.slow) for label in ("W4A16KV16", "W4A8KV4", "W8A8KV8")
    ],
)
def test_simulated_equals_packed_bit_for_bit(full, label):
    vlm = qj.load(full, dtype="float32")
    quantization = QuantizationConfig.parse(label)
    params = flatten_params(vlm.model)
    simulated = build_model(vlm.config, quantization, params)
    packed_params = quantize_params(
        {name: np.asarray(value) for name, value in params.items()}, quantization
    )
    specs = abstract_params(vlm.config, quantization)
    assert {n: (a.shape, a.dtype) for n, a in packed_params.items()} == {
        n: (s.shape, s.dtype) for n, s in specs.items()
    }
    packed = build_model(
        vlm.config, quantization, {n: jnp.asarray(a) for n, a in packed_params.items()}
    )
    batch = vlm.processor(images=[[draw_picture(0)], []], prompts=[PROMPT, "USER: car"])
    # A pruned program has all that the full one has: one precision stands for the others.
    for recipe in (None, RECIPE) if label == "W4A4KV4" else (RECIPE,):
        left, _ = qj.prefill(simulated, batch, recipe=recipe)
        right, _ = qj.prefill(packed, batch, recipe=recipe)
        np.testing.assert_array_equal(left, right)
        left, right = (
            qj.generate(model, batch, recipe=recipe, max_new_tokens=8).tokens
            for model in (simulated, packed)
        )
        np.testing.assert_array_equal(left, right)


def test_quantization_changes_the_logits_but_not_wildly(full):
    vlm = qj.load(full, dtype="float32")
    batch = vlm.processor(images=[[draw_picture(0)]], prompts=[PROMPT])
    exact, _ = qj.prefill(vlm.model, batch)
    errors = []
    for label in ("W8A8KV8", "W4A8KV4", "W4A4KV4"):
        model = build_model(vlm.config, QuantizationConfig.parse(label), flatten_params(vlm.model))
        logits, _ = qj.prefill(model, batch)
        errors.append(float(jnp.linalg.norm(logits - exact) / jnp.linalg.norm(exact)))
    assert 0 < errors[0] < 0.05
    assert errors[0] < min(errors[1:]) < max(errors[1:]) < 1.0


def test_a_w4_checkpoint_and_its_device_arrays_take_half_a_byte_per_weight(full, tmp_path):
    calibrate(full, tmp_path / "q", QuantizationConfig.parse("W4A4KV4"))
    checkpoint = open_checkpoint(tmp_path / "q")
    model = checkpoint.load_model()
    original = flatten_params(qj.load(full).model)
    for name, array in flatten_params(model).items():
        if name.endswith(".packed"):
            weights = original[name.removesuffix("packed") + "weight"].size
            assert array.dtype == jnp.uint8
            assert array.on_device_size_in_bytes() == weights // 2
    for block, arrays in checkpoint.sizes()["blocks"].items():
        assert arrays >= 0, block
    twice = calibrate(full, tmp_path / "again", QuantizationConfig.parse("W4A4KV4"))
    for name in checkpoint.block_names:
        other = open_checkpoint(twice).read_block(name)
        for key, value in checkpoint.read_block(name).items():
            np.testing.assert_array_equal(value, other[key])


def test_calibrate_refuses_what_makes_no_sense(full, tmp_path):
    with pytest.raises(QuotaError, match="quantizes nothing"):
        calibrate(full, tmp_path / "a", QuantizationConfig.none)
    calibrate(full, tmp_path / "q", QuantizationConfig.parse("W4A8"))
    with pytest.raises(QuotaError, match="already quantized"):
        calibrate(tmp_path / "q", tmp_path / "b", QuantizationConfig.parse("W4A4"))
    with pytest.raises(QuotaError, match="do not read like"):
        QuantizationConfig.parse("4bit")
    with pytest.raises(QuotaError, match="must be 2, 3, 4, 8 or 16, got 5"):
        QuantizationConfig.parse("W5A16")


@pytest.mark.parametrize(
    "recipe", [pytest.param(None, marks=pytest.mark.slow), RECIPE], ids=["full", "pruned"]
)
def test_a_prompt_inserted_into_a_busy_slot_machine_generates_as_alone(full, recipe):
    """Four slots; a finished one is replaced while the others go on."""
    vlm = qj.load(full)
    prompts = [PROMPT, PROMPT.replace("red", "blue"), PROMPT.replace("circle", "car")]
    pictures = [[draw_picture(i)] for i in range(3)]
    one = {"text_bucket": 32}

    def slot(i, max_new):
        batch = vlm.processor(images=[pictures[i]], prompts=[prompts[i]], **one)
        return begin(vlm.model, batch, recipe=recipe, max_new_tokens=max_new)

    alone = [
        np.asarray(decode_chunk(vlm.model, slot(i, n), jnp.int32(99)).tokens)[0, :n]
        for i, n in enumerate((4, 20, 12))
    ]
    batch = vlm.processor(images=pictures[:2], prompts=prompts[:2], **one)
    state = begin(vlm.model, batch, recipe=recipe, max_new_tokens=[4, 20])
    state = decode_chunk(vlm.model, state, jnp.int32(6))
    assert np.asarray(state.done).tolist() == [True, False]
    np.testing.assert_array_equal(np.asarray(state.tokens)[0, :4], alone[0])
    state = insert(state, slot(2, 12), jnp.int32(0))
    state = decode_chunk(vlm.model, state, jnp.int32(99))
    assert np.asarray(state.count).tolist() == [12, 20]
    np.testing.assert_array_equal(np.asarray(state.tokens)[0, :12], alone[2])
    np.testing.assert_array_equal(np.asarray(state.tokens)[1, :20], alone[1])


def test_stop_ids_and_chunks(full):
    vlm = qj.load(full)
    batch = vlm.processor(images=[[draw_picture(0)]], prompts=[PROMPT])
    free = qj.generate(vlm.model, batch, max_new_tokens=10).tokens[0]
    stop = int(free[3])
    first = int(np.flatnonzero(free == stop)[0])
    out = qj.generate(vlm.model, batch, max_new_tokens=10, stop_ids=[stop])
    assert out.lengths[0] == first + 1
    assert (out.tokens[0, first + 1 :] == 0).all()
    state = begin(vlm.model, batch, max_new_tokens=10)
    for _ in range(9):
        state = decode_chunk(vlm.model, state, jnp.int32(1))
    np.testing.assert_array_equal(np.asarray(state.tokens)[0, :10], free)
    with pytest.raises(QuotaError, match="exceeds the model's 1024 positions"):
        qj.generate(vlm.model, batch, max_new_tokens=2000)


def test_a_group_is_a_pytree_and_its_bits_are_static(full):
    vlm = qj.load(full)
    batch = vlm.processor(images=[[draw_picture(0)]], prompts=[PROMPT])
    _, cache = qj.prefill(vlm.model, batch)
    leaves, tree = jax.tree.flatten(cache.groups[0])
    again = jax.tree.unflatten(tree, leaves)
    assert dataclasses.asdict(again)["bits"] == 16
