"""Weight-only product in plain jnp: the weight of one layer is dequantized, then multiplied."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from pallas_kernels.packing import unpack_int4, unpack_uint4
from pallas_kernels.stable import matmul, rounded


def w4a16_matmul_reference(
    x: Float[Array, "M K"],
    packed: Array,
    scale: Array,
    zeros: Array | None = None,
    layer: Array | int | None = None,
    *,
    group_size: int = 0,
    group_index: Array | None = None,
    parts: Sequence[int] = (),
) -> Float[Array, "M N"]:
    """See ``pallas_kernels.w4a16_matmul.w4a16_matmul``; float32, without bias."""
    if layer is not None:
        packed, scale, zeros, group_index = jax.tree.map(
            lambda stack: jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False),
            (packed, scale, zeros, group_index),
        )
    codes = unpack_int4(packed) if zeros is None else unpack_uint4(packed)
    if scale.ndim == 1:
        return matmul(x.astype(jnp.float32), codes.astype(jnp.float32)) * scale[None, :]
    weight = dequantize_groups(
        codes, scale, zeros, size=group_size, group_index=group_index, parts=parts
    )
    return matmul(x, weight.astype(x.dtype))


def dequantize_groups(
    codes: Int[Array, "N K"],
    scale: Float[Array, "N G"],
    zeros: UInt8[Array, "N G"] | None = None,
    *,
    size: int = 0,
    group_index: Int[Array, "P K"] | None = None,
    parts: Sequence[int] = (),
) -> Float[Array, "N K"]:
    """``scale (code - zero)`` in float32: exact for scales of at most 16 bits.

    ``size``: input channels of a group, 0 for whole rows. ``group_index`` names the group of each
    input channel, one row for each part of the rows (q, k and v of a fused matrix); ``parts`` are
    the parts' heights.
    """

    def spread(values: Array) -> Float[Array, "N K"]:
        """One value of each group -> one of each weight."""
        columns = codes.shape[1]
        if group_index is None:
            return jnp.repeat(values, size or columns, axis=1)[:, :columns]
        edges = [sum(parts[: i + 1]) for i in range(len(group_index) - 1)]
        rows = zip(jnp.split(values, edges), group_index, strict=True)
        return jnp.concatenate([jnp.take(part, index, axis=1) for part, index in rows])

    values = codes.astype(jnp.float32)
    if zeros is not None:
        values = values - spread(zeros).astype(jnp.float32)
    return rounded(values * spread(scale).astype(jnp.float32))
