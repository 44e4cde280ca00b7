"""Costs as executed: equal to the matrix products of the traced programs."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels.attention.reference as attention_reference
import pallas_kernels.attention_mass.reference as mass_reference
import quota_jax.prune.mmtok as mmtok
from quota_jax.batch import Batch, Patches
from quota_jax.config import (
    LlavaConfig,
    QwenVisionConfig,
    QwenVlConfig,
    TextConfig,
    VisionConfig,
)
from quota_jax.errors import QuotaError
from quota_jax.flops import executed_flops, paper_flops
from quota_jax.generation import _prefill
from quota_jax.models.params import build_model, init_params
from quota_jax.recipe import Recipe, Selector, Stage

RANDOM = Selector(name="random")


def traced(jaxpr: Any) -> int:
    """Multiply-accumulates of all matrix products in a jaxpr; scan bodies count per turn."""
    total = 0
    for equation in jaxpr.eqns:
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += math.prod(equation.outvars[0].aval.shape) * math.prod(
                shape[axis] for axis in contracted
            )
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += times * traced(inner)
    return total


def tiny_llava() -> LlavaConfig:
    return LlavaConfig(
        vision=VisionConfig(
            hidden_size=16,
            intermediate_size=24,
            num_layers=3,
            num_heads=2,
            image_size=56,
            patch_size=14,
        ),
        text=text_config(),
        image_token_id=60,
        vision_feature_layers=(-3, -2),
    )


def text_config(**changes: Any) -> TextConfig:
    fields: dict[str, Any] = {
        "vocab_size": 61,
        "hidden_size": 40,
        "intermediate_size": 48,
        "num_layers": 4,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
    }
    return TextConfig(**{**fields, **changes})


def tiny_qwen() -> QwenVlConfig:
    return QwenVlConfig(
        vision=QwenVisionConfig(
            hidden_size=16,
            intermediate_size=24,
            num_layers=3,
            num_heads=2,
            window_size=56,
            full_attention_layers=(1,),
        ),
        text=text_config(mrope_section=(2, 3, 3), attention_bias=True),
        image_token_id=60,
        video_token_id=59,
        vision_start_token_id=58,
        vision_end_token_id=57,
    )


def full_batch(pixels: Any, visual: int, text: int, streams: tuple[int, ...] = ()) -> Batch:
    """Two equal samples without any padding; nothing here is ever computed."""
    width = visual + text
    index = np.full((2, width), -1, np.int32)
    index[:, 2 : 2 + visual] = np.arange(2 * visual).reshape(2, visual)
    return Batch(
        tokens=jnp.ones((2, width), jnp.int32),
        lengths=jnp.full(2, width, jnp.int32),
        visual_index=jnp.asarray(index),
        positions=jnp.zeros((2, width, *streams), jnp.int32),
        pixels=pixels,
        text_bucket=text,
        visual_bucket=visual,
    )


def llava_program():
    pixels = jnp.zeros((2, 3, 56, 56), jnp.float32)
    return tiny_llava(), full_batch(pixels, 16, 7), None


def qwen_program():
    # One picture per sample, 4 x 4 visual tokens: 64 patches in 4 full windows of 16.
    patches = Patches(
        values=jnp.zeros((2, 64, 3 * 2 * 14 * 14), jnp.float32),
        coordinates=jnp.zeros((2, 64, 2), jnp.int32),
        lengths=jnp.full(2, 64, jnp.int32),
        window_starts=jnp.tile(jnp.arange(0, 64, 16, dtype=jnp.int32), (2, 1)),
        window_lengths=jnp.full((2, 4), 16, jnp.int32),
        window_slots=jnp.tile(jnp.arange(64, dtype=jnp.int32), (2, 1)),
    )
    return tiny_qwen(), full_batch(patches, 16, 7, (3,)), [(4, 4)]


@pytest.mark.parametrize("program", [llava_program, qwen_program])
@pytest.mark.parametrize(
    "recipe",
    [
        Recipe.none(4),
        Recipe.uniform(num_layers=4, layers=[1, 2], keep=0.3),
        Recipe.uniform(num_layers=4, layers=[0, 3], keep=0.0),
        Recipe.uniform(
            num_layers=4, layers=[1, 3], keep=0.2, point="before_attention", selector="random"
        ),
        Recipe(
            num_layers=4,
            stages=(
                Stage(layer=0, keep=0.5, point="input", selector=Selector(name="mmtok")),
                Stage(layer=2, keep=0.3, selector=Selector(name="sqap")),
            ),
        ),
    ],
    ids=["none", "quota", "withdrawn", "entry", "mmtok"],
)
def test_executed_flops_equal_the_matrix_products_of_the_program(monkeypatch, program, recipe):
    config, batch, grids = program()
    # Attention pads to whole blocks; blocks of one token leave the real products.
    monkeypatch.setattr(attention_reference, "BLOCK", 1)
    monkeypatch.setattr(mass_reference, "BLOCK", 1)
    monkeypatch.setattr(mmtok, "BLOCK", 1)
    assert_products(config, batch, grids, recipe)


def test_executed_flops_of_visionzip_equal_the_matrix_products_of_the_program(monkeypatch):
    config, batch, grids = llava_program()
    monkeypatch.setattr(attention_reference, "BLOCK", 1)
    first = Stage(layer=0, keep=0.5, point="input", selector=Selector(name="visionzip"))
    recipe = Recipe(num_layers=4, stages=(first,), positions="renumber")
    assert_products(config, batch, grids, recipe)


def assert_products(config, batch, grids, recipe):
    model = build_model(config, None, init_params(config, jax.random.key(0)))
    traced_prefill: Any = _prefill
    made = jax.make_jaxpr(
        lambda model, batch: traced_prefill.__wrapped__(model, batch, recipe=recipe, room=0)
    )(model, batch)
    expected = executed_flops(
        config, recipe, visual_tokens=16, text_tokens=7, grids=grids if grids else None
    )
    assert traced(made.jaxpr) == 2 * expected.total
    assert all(
        part > 0 for part in (expected.vision, expected.projector, expected.head, expected.decoder)
    )


def test_window_pairs_of_grids_by_brute_force():
    config = tiny_qwen()
    rows, columns, side = 5, 3, config.vision.window_units
    windows: dict[tuple[int, int], int] = {}
    for r in range(rows):
        for c in range(columns):
            key = r // side, c // side
            windows[key] = windows.get(key, 0) + 4
    pairs = 2 * sum(size**2 for size in windows.values()) + (4 * rows * columns) ** 2
    n, d = 4 * rows * columns, 16
    linear = n * 3 * 2 * 14 * 14 * d + 3 * n * (4 * d * d + 3 * d * 24)
    one = executed_flops(
        config, Recipe.none(4), visual_tokens=15, text_tokens=1, grids=[(rows, columns)]
    )
    assert one.vision == linear + 2 * d * pairs
    two = executed_flops(
        config, Recipe.none(4), visual_tokens=30, text_tokens=1, grids=[(rows, columns)] * 2
    )
    assert two.vision == 2 * one.vision
    assert two.projector == 2 * one.projector


def test_executed_attention_sees_the_incoming_and_the_mlp_the_kept_tokens():
    recipe = Recipe(
        num_layers=4,
        stages=(
            Stage(layer=0, keep=0.75, point="input", selector=RANDOM),
            Stage(layer=1, keep=0.5),
            Stage(layer=2, keep=0.25, point="before_attention", selector=RANDOM),
            Stage(layer=2, keep=0.125),
        ),
    )
    found = executed_flops(tiny_llava(), recipe, visual_tokens=16, text_tokens=3)
    assert [(layer.attention_tokens, layer.mlp_tokens) for layer in found.layers] == [
        (15, 15),
        (15, 11),
        (7, 5),
        (5, 5),
    ]
    entry = paper_flops(tiny_llava().text, recipe, visual_tokens=16, text_tokens=3)
    assert [layer.mlp_tokens for layer in entry.layers] == [15, 11, 5, 5]
    late = paper_flops(tiny_llava().text, recipe, visual_tokens=16, text_tokens=3, counted="exit")
    assert [layer.mlp_tokens for layer in late.layers] == [15, 15, 7, 5]
    none = executed_flops(tiny_llava(), Recipe.none(4), visual_tokens=0, text_tokens=3)
    assert none.vision == none.projector == 0


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: executed_flops(tiny_llava(), Recipe.none(4), visual_tokens=17, text_tokens=1),
            "17 visual tokens are no whole pictures of 16",
        ),
        (
            lambda: executed_flops(
                tiny_llava(), Recipe.none(4), visual_tokens=16, text_tokens=1, grids=[(4, 4)]
            ),
            r"got \[\(4, 4\)\]",
        ),
        (
            lambda: executed_flops(
                tiny_qwen(), Recipe.none(4), visual_tokens=8, text_tokens=1, grids=[(3, 3)]
            ),
            r"\[\(3, 3\)\] do not make 8",
        ),
    ],
)
def test_bad_values_are_named(call: Any, words):
    with pytest.raises(QuotaError, match=words):
        call()
