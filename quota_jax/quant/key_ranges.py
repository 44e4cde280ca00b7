"""Ranges of key channels before rotation, measured on calibration samples, for caches that store
keys by channel (KVQuant, Hooper et al., NeurIPS 2024, section 3.1)."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from quota_jax.errors import QuotaError
from quota_jax.models.params import CACHE
from quota_jax.quant.blocks import Block, Params, partial_model
from quota_jax.quant.calibration_data import CalibrationData
from quota_jax.quant.streaming import Transform
from quota_jax.quantization import QuantizationConfig


def key_ranger(data: CalibrationData) -> Transform:
    """What ``write_blocks`` does first to each decoder layer: adds the largest and the smallest
    value that each key channel has over all real tokens, as ``key_range`` ``[2, K, H]``.

    Keys are those of the block in full precision on the inputs it is given. The later transforms of
    a block leave its keys before rotation as they are.
    """

    def transform(name, block, stored, inputs, outputs):
        if block.kind != "decoder":
            return stored
        if not inputs:
            raise QuotaError(f"block {name!r} has no inputs to measure its keys on")
        found = [
            _extremes(stored, jnp.asarray(x), mask, block=block)
            for x, mask in zip(inputs, data.masks(block), strict=True)
        ]
        highs, lows = zip(*found, strict=True)
        measured = np.stack([np.max(highs, axis=0), np.min(lows, axis=0)])
        return {**stored, f"{CACHE}.key_range": measured.astype(np.float32)}

    return transform


@functools.partial(jax.jit, static_argnames="block")
def _extremes(params: Params, x: jax.Array, mask: jax.Array, *, block: Block) -> Any:
    """Largest and smallest key of each channel over the rows of ``mask``, ``[K, H]`` each."""
    layers = partial_model(block.config, QuantizationConfig.none, params).decoder.layers
    first = jnp.int32(0)
    _, keys, _ = layers.attn.project(layers.norm1(x, first), first)
    keys, real = keys.astype(jnp.float32), mask[..., None, None]
    high = jnp.where(real, keys, -jnp.inf).max((0, 1))
    return high, jnp.where(real, keys, jnp.inf).min((0, 1))
