"""Feed-forward blocks made as wide as the int4 matmul wants them.

Its tensor-core kernel takes multiples of 128. The vision tower of Qwen2.5-VL has 3420 hidden
channels: 36 more, whose weights are zeros, are zeros after every activation too, so that no code,
scale or sum of the others changes, and the result is the same. Checkpoints hold the true width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from quota_jax.quantization import QuantizationConfig

UNIT = 128
WASTE = 1 / 16
"""At most this share of a block's width is added; narrower blocks are left as they are."""


def aligned_width(width: int) -> int:
    """The width that a feed-forward block of so many hidden channels gets."""
    whole = -(-width // UNIT) * UNIT
    return whole if whole - width <= WASTE * width else width


def align(params: Mapping[str, Any], quantization: QuantizationConfig) -> dict[str, Any]:
    """``params`` (by dotted name, arrays or shapes) with all packed feed-forward blocks widened.

    Only those whose products take integers: weights that are multiplied in floats (groups, 16-bit
    activations) and blocks with a scale of each hidden channel gain nothing.
    """
    out = dict(params)
    if not quantization.packs or quantization.groups or quantization.activation_bits == 16:
        return out
    for name in params:
        stem = name.removesuffix("down.packed")
        if stem == name or not stem.endswith("mlp.") or f"{stem}down.input_scale" in params:
            continue
        width = 2 * params[name].shape[-1]
        more = aligned_width(width) - width
        if not more:
            continue
        out[name] = _widen(params[name], -1, more // 2)
        for leaf, axis in (("packed", -2), ("scale", -1), ("bias", -1)):
            for expand, parts in (("gate_up", 2), ("up", 1)):
                if (key := f"{stem}{expand}.{leaf}") in params:
                    out[key] = _widen(params[key], axis, more, parts)
    return out


def _widen(array: Any, axis: int, more: int, parts: int = 1) -> Any:
    """Zeros behind each of ``parts`` equal pieces of an axis."""

    def run(array):
        at = array.ndim + axis
        shape = array.shape
        pieces = array.reshape(*shape[:at], parts, shape[at] // parts, *shape[at + 1 :])
        widths = [(0, more if i == at + 1 else 0) for i in range(pieces.ndim)]
        return jnp.pad(pieces, widths).reshape(*shape[:at], -1, *shape[at + 1 :])

    if isinstance(array, jax.ShapeDtypeStruct):
        return jax.eval_shape(run, array)
    return run(array)
