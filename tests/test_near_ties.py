"""How far a tiny random model's logits go when its input moves by a rounding: what any comparison
of two devices has to allow (`tests/test_gpu.py` has the same model, prompts and bounds)."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import quota_jax as qj
from converters import convert
from quota_jax.quant.calibrate import calibrate
from quota_jax.quantization import QuantizationConfig
from quota_jax.recipe import Recipe
from tests.tiny_models import draw_picture
from tests.tiny_qwen import write_tiny_qwen

UNPRUNED, PRUNED = 0.995, 0.98
"""Least correlations of the logits."""
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


@pytest.mark.slow
@pytest.mark.parametrize("label", ["W8A8KV8", "W4A8KV8"])
def test_moved_pixels_change_which_tokens_are_kept_and_little_else(tmp_path, label):
    """Activations fall to the other side of a rounding boundary; in pruned programs other tokens
    are kept for it, and the logits go farther."""
    convert(write_tiny_qwen(tmp_path / "hf", num_layers=4), tmp_path / "full")
    path = calibrate(tmp_path / "full", tmp_path / label, QuantizationConfig.parse(label))
    vlm = qj.load(path, dtype="float32")
    batch = vlm.processor(
        images=[[draw_picture(0)], [draw_picture(1), draw_picture(2)], []],
        prompts=[f"{IMAGE} is there a red circle", f"{IMAGE} car {IMAGE}", "what is the color"],
    )
    recipe = Recipe.uniform(num_layers=4, layers=[1, 2], keep=0.3)
    values = np.asarray(batch.pixels.values)
    lowest, moved_tokens = {}, 0
    for name, given in (("unpruned", None), ("pruned", recipe)):
        logits, cache = qj.prefill(vlm.model, batch, recipe=given)
        correlations = []
        for seed in range(1, 9):
            noise = 1 + 1e-5 * np.random.default_rng(seed).standard_normal(values.shape)
            pixels = dataclasses.replace(
                batch.pixels, values=jnp.asarray(values * noise, "float32")
            )
            other, moved = qj.prefill(
                vlm.model, dataclasses.replace(batch, pixels=pixels), recipe=given
            )
            correlations.append(np.corrcoef(np.ravel(logits), np.ravel(other))[0, 1])
            moved_tokens += int((np.asarray(moved.kept_source) != cache.kept_source).sum())
        lowest[name] = min(correlations)
    print(label, {name: round(float(value), 4) for name, value in lowest.items()}, moved_tokens)
    assert UNPRUNED < lowest["unpruned"] < 1
    assert PRUNED < lowest["pruned"] < lowest["unpruned"]
    assert moved_tokens > 0
