"""Weights with one scale for every group of neighboring input channels (W4A16, W8A16).

A row of K weights is cut into ``ceil(K / size)`` groups, the last one perhaps shorter. Scales are
rounded to the dtype that they are stored in before anything is divided by them, so codes made here
and codes made from stored scales are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from pallas_kernels.stable import as_stored
from pallas_kernels.w4a16_matmul import dequantize_groups
from quota_jax.quant.quantizers import TINY, symmetric_limit


@dataclass(frozen=True, kw_only=True, slots=True)
class Groups:
    """The grid of a weight: ``value = scale (code - zero)`` with a scale and zero for each group.

    bits: 4 or 8. size: input channels of a group; 0 for whole rows. symmetric: zero is 0 and codes
    are signed, else zero and codes are unsigned. scale_dtype: None for the weight's own.
    """

    bits: int
    size: int = 0
    symmetric: bool = True
    scale_dtype: str | None = None

    def count(self, columns: int) -> int:
        """Groups of a row."""
        return -(-columns // self.size) if self.size else 1

    @property
    def lowest(self) -> int:
        """The smallest code."""
        return -symmetric_limit(self.bits) - 1 if self.symmetric else 0

    @property
    def highest(self) -> int:
        """The largest code."""
        return symmetric_limit(self.bits) if self.symmetric else 2**self.bits - 1

    def cut(self, weight: Float[Array, "*rows K"]) -> Float[Array, "*rows G size"]:
        """Rows cut into groups, a short last one filled up with zeros."""
        columns = weight.shape[-1]
        count, size = self.count(columns), self.size or columns
        pad = [(0, 0)] * (weight.ndim - 1) + [(0, count * size - columns)]
        return jnp.pad(weight, pad).reshape(*weight.shape[:-1], count, size)

    def grid(
        self, low: Float[Array, "*groups"], high: Float[Array, "*groups"], dtype: Any = jnp.float32
    ) -> tuple[Float[Array, "*groups"], Float[Array, "*groups"]]:
        """Scale and zero (both float32) that cover [low, high] and 0.

        ``dtype`` is the scale's where ``scale_dtype`` is None.
        """
        low, high = jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)
        span = jnp.maximum(high, -low) if self.symmetric else high - low
        scale = jnp.maximum(span, TINY) / (self.highest if self.symmetric else 2**self.bits - 1)
        scale = self.storable(scale, self.scale_dtype or dtype)
        if self.symmetric:
            return scale, jnp.zeros_like(scale)
        return scale, jnp.clip(jnp.round(-low / scale), self.lowest, self.highest)

    def storable(self, scale: Float[Array, "*groups"], dtype: Any) -> Float[Array, "*groups"]:
        """Scales rounded to ``dtype``, as float32."""
        kind = jnp.dtype(dtype)
        info = jnp.finfo(kind)
        # Half precision ends early: no scale may round to zero or infinity.
        return as_stored(jnp.clip(scale, float(info.smallest_normal), float(info.max)), kind)

    def codes(self, weight: Array, scale: Array, zero: Array) -> Array:
        """Nearest codes (ties to even) as float32; the arguments broadcast."""
        return jnp.clip(jnp.round(weight / scale) + zero, self.lowest, self.highest)

    def quantize(
        self, weight: Float[Array, "*rows K"], step: Float[Array, "*rows G"] | None = None
    ) -> tuple[Int[Array, "*rows K"], Float[Array, "*rows G"], UInt8[Array, "*rows G"] | None]:
        """Round to nearest: codes, scales in their storage dtype, zeros (None where symmetric).

        ``step`` holds the scales of a symmetric grid; None: they cover each group's range.
        """
        kind = jnp.dtype(self.scale_dtype or weight.dtype)
        cut = self.cut(weight.astype(jnp.float32))
        if step is None:
            scale, zero = self.grid(cut.min(-1), cut.max(-1), kind)
        else:
            scale, zero = self.storable(step, kind), jnp.zeros_like(step)
        codes = self.codes(cut, scale[..., None], zero[..., None])
        codes = codes.reshape(*weight.shape[:-1], -1)[..., : weight.shape[-1]]
        return self.stored(codes, scale.astype(kind), zero)

    def stored(self, codes: Array, scale: Array, zero: Array) -> tuple[Array, Array, Array | None]:
        """The three arrays as a checkpoint holds them, before packing."""
        if self.symmetric:
            return codes.astype(jnp.int8), scale, None
        return codes.astype(jnp.uint8), scale, zero.astype(jnp.uint8)

    def dequantize(
        self,
        codes: Int[Array, "N K"],
        scale: Float[Array, "N G"],
        zero: UInt8[Array, "N G"] | None = None,
        index: Int[Array, "P K"] | None = None,
        parts: Sequence[int] = (),
    ) -> Float[Array, "N K"]:
        """``scale (code - zero)`` in float32; see ``dequantize_groups``."""
        return dequantize_groups(codes, scale, zero, size=self.size, group_index=index, parts=parts)
