"""Padding, buckets and batch neighbours change nothing, bit for bit, in every precision."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

import quota_jax as qj
from converters import convert
from quota_jax.generation import _prefill, decode_chunk
from quota_jax.quant.calibrate import calibrate
from quota_jax.quantization import QuantizationConfig
from quota_jax.recipe import Recipe
from tests.tiny_models import draw_picture, write_tiny_llava

PROMPTS = [
    "USER: <image>\nis there a red circle ? ASSISTANT:",
    "USER: <image> <image> what color is the square ASSISTANT:",
    "USER: what is a car ? ASSISTANT:",
    "USER: <image> car ASSISTANT:",
]
PICTURES = [[draw_picture(0)], [draw_picture(1), draw_picture(2)], [], [draw_picture(3)]]
RECIPE = Recipe.uniform(num_layers=4, layers=[1, 2], keep=0.3)


def programs() -> list[int]:
    """How many programs prefill and decode have compiled so far."""
    jitted: list[Any] = [_prefill, decode_chunk]
    return [function._cache_size() for function in jitted]


@pytest.fixture(
    scope="module",
    params=["W4A4KV4"]
    + [
        pytest.param(label, marks=pytest.mark.slow)
        for label in ("W16A16KV16", "W8A8KV8", "W4A16KV4")
    ],
)
def vlm(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("invariance")
    folder = write_tiny_llava(root / "hf", num_layers=4, num_heads=4, num_kv_heads=2, image_size=56)
    convert(folder, root / "ckpt")
    if request.param == "W16A16KV16":
        return qj.load(root / "ckpt")
    calibrate(root / "ckpt", root / "q", QuantizationConfig.parse(request.param))
    return qj.load(root / "q")


def test_a_sample_alone_equals_itself_in_any_batch_and_bucket(vlm):
    def run(rows, recipe, options):
        batch = vlm.processor(
            images=[PICTURES[r] for r in rows], prompts=[PROMPTS[r] for r in rows], **options
        )
        logits, _ = qj.prefill(vlm.model, batch, recipe=recipe)
        out = qj.generate(vlm.model, batch, recipe=recipe, max_new_tokens=12)
        return np.asarray(logits), out.tokens

    # Every shape and every recipe is two programs to compile. A pruned program has all that the
    # full one has: two precisions stand for the others. Shapes: one that differs in all bounds,
    # and the smallest one where tokens leave.
    wide = {"text_bucket": 192, "images_per_prompt": 3}
    for recipe in (None, RECIPE):
        if recipe is None and vlm.quantization.label in ("W8A8KV8", "W4A16KV4"):
            continue
        whole_logits, whole_tokens = run([0, 1, 2, 3], recipe, {})
        alone = [(row, wide) for row in range(4)] + ([] if recipe is None else [(0, {})])
        for row, options in alone:
            logits, tokens = run([row], recipe, options)
            np.testing.assert_array_equal(logits[0], whole_logits[row])
            np.testing.assert_array_equal(tokens[0], whole_tokens[row])


def test_prompts_of_one_bucket_and_sampling_parameters_compile_once(vlm):
    # Other text lengths, other pictures, other temperature, seed, stop ids and max_new.
    def run(row, **options):
        batch = vlm.processor(images=[PICTURES[row]], prompts=[PROMPTS[row]])
        return qj.generate(vlm.model, batch, recipe=RECIPE, **options)

    run(0, max_new_tokens=3, temperature=1.0)
    run(0, max_new_tokens=3)
    before = programs()
    run(3, max_new_tokens=5)
    run(3, max_new_tokens=9, temperature=0.5, top_k=3, top_p=0.9, seed=5, stop_ids=[7, 8])
    run(0, max_new_tokens=16, temperature=2.0)
    assert programs() == before


def test_equal_recipes_are_one_program_and_a_full_recipe_is_no_recipe(vlm):
    batch = vlm.processor(images=[PICTURES[0]], prompts=[PROMPTS[0]])
    plain, _ = qj.prefill(vlm.model, batch)
    before = programs()
    everything = Recipe.uniform(num_layers=4, layers=[0, 2], keep=1.0)
    same, _ = qj.prefill(vlm.model, batch, recipe=everything)
    assert programs() == before
    np.testing.assert_array_equal(plain, same)


def test_caches_hold_what_each_layer_kept_and_are_really_packed(vlm):
    batch = vlm.processor(images=[PICTURES[0]], prompts=[PROMPTS[0]])
    _, cache = qj.prefill(vlm.model, batch, recipe=RECIPE)
    text = int(batch.lengths[0]) - 16
    expected = [16, 11, 5]  # ceil(.65 * 16), ceil(.3 * 16)
    assert [int(group.lengths[0]) - text for group in cache.groups] == expected
    assert [group.num_layers for group in cache.groups] == [1, 1, 2]
    bits = vlm.quantization.kv_bits
    group = cache.groups[0]
    stored = {16: 4 * 16, 8: 16 + 3, 4: 8 + 3}[bits]  # bytes per head and token, head_dim 16
    assert group.nbytes == 2 * stored * 2 * group.capacity
    assert jax.tree.leaves(group.key)[0].on_device_size_in_bytes() > 0
