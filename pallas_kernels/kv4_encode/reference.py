"""Rotation, transform and 4-bit quantization of queries, keys and values, in plain jnp."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.packing import pack_int4
from pallas_kernels.stable import as_stored, matmul, rounded

TINY = 1e-8
LEVELS = 15

Packed = tuple[Array, Array, Array]
"""Codes ``[..., H/2]``, scales and zeros ``[...]`` of heads ``[..., H]``."""


class Sites(NamedTuple):
    """Parameters of one layer, or of a stack of them; each may be absent. See ``kv4_encode``."""

    query: Float[Array, "*L H H"] | None = None
    key: Float[Array, "*L H H"] | None = None
    clip: Float[Array, "*L 2 2"] | None = None


class Encoded(NamedTuple):
    """Rotated queries, keys and values read back, and what is stored of keys and of values."""

    query: Float[Array, "M N H"]
    key: Float[Array, "M K H"]
    value: Float[Array, "M K H"]
    stored: tuple[Packed, Packed]


def kv4_encode_reference(
    qkv: Float[Array, "M rows"],
    cos: Float[Array, "M half"],
    sin: Float[Array, "M half"],
    key: Packed,
    value: Packed,
    layer: Int[Array, ""],
    site_layer: Int[Array, ""],
    sites: Sites,
    *,
    read_dtype: Any,
) -> Encoded:
    """See ``pallas_kernels.kv4_encode.kv4_encode``."""
    own = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, site_layer, keepdims=False), sites)
    made = encode_heads(qkv, cos, sin, own, kv_heads=key[0].shape[2], scale_dtype=key[1].dtype)
    stored = jax.tree.map(
        lambda stack, new: jax.lax.dynamic_update_index_in_dim(stack, new, layer, 0),
        (key, value),
        made.stored,
    )
    return Encoded(made.query, made.key.astype(read_dtype), made.value.astype(read_dtype), stored)


def encode_heads(
    qkv: Float[Array, "M rows"],
    cos: Float[Array, "M half"],
    sin: Float[Array, "M half"],
    sites: Sites,
    *,
    kv_heads: int,
    scale_dtype: Any,
) -> Encoded:
    """Queries in the dtype of ``qkv``, keys and values read back in float32, and what is stored of
    this one layer; ``sites`` of one layer."""
    heads = qkv.reshape(qkv.shape[0], -1, 2 * cos.shape[-1])
    first = heads.shape[1] - 2 * kv_heads
    query, key, value = jnp.split(heads, (first, first + kv_heads), axis=1)
    query = _transformed(_rotated(query, cos, sin), sites.query)
    key = _transformed(_rotated(key, cos, sin), sites.key)
    clips = (None, None) if sites.clip is None else sites.clip
    keys, key = _quantized(key, scale_dtype, clips[0])
    values, value = _quantized(value, scale_dtype, clips[1])
    return Encoded(query, key, value, (keys, values))


def query_heads(operation: str, width: int, head_dim: int, kv_heads: int) -> int:
    """Heads of a joined projection of ``width`` values that are queries.

    Raises:
      ValueError: it is no whole number of heads, or none is left beside keys and values.
    """
    heads = width // head_dim - 2 * kv_heads
    if width % head_dim or heads <= 0:
        raise ValueError(
            f"{operation}: {width} values are no queries beside 2 x {kv_heads} heads of {head_dim}"
        )
    return heads


def _rotated(x: Float[Array, "M n H"], cos: Array, sin: Array) -> Float[Array, "M n H"]:
    """Pair ``(i, i + H/2)`` of each head turned, in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, None], sin[:, None]
    real = rounded(first * cos) - rounded(second * sin)
    imaginary = rounded(second * cos) + rounded(first * sin)
    return jnp.concatenate([real, imaginary], axis=-1).astype(x.dtype)


def _transformed(x: Float[Array, "M n H"], matrix: Array | None) -> Float[Array, "M n H"]:
    if matrix is None:
        return x
    rows = x.astype(jnp.float32).reshape(-1, x.shape[-1])
    return rounded(matmul(rows, matrix.T)).reshape(x.shape).astype(x.dtype)


def _quantized(
    x: Float[Array, "M K H"], scale_dtype: Any, clip: Float[Array, " 2"] | None
) -> tuple[Packed, Float[Array, "M K H"]]:
    """``x ~ scale * (code - zero)`` over each head, and that product in float32."""
    x = x.astype(jnp.float32)
    low, high = jnp.minimum(x.min(-1), 0.0), jnp.maximum(x.max(-1), 0.0)
    if clip is not None:
        low, high = low * clip[1], high * clip[0]
    step = as_stored(jnp.maximum(high - low, TINY) / LEVELS, scale_dtype)
    zero = jnp.clip(jnp.round(-low / step), 0, LEVELS)
    codes = jnp.clip(jnp.round(x / step[..., None]) + zero[..., None], 0, LEVELS)
    # Read from the codes before they are packed: unpacking them again would be work of its own.
    read = (codes - zero[..., None]) * step[..., None]
    packed = pack_int4(codes.astype(jnp.uint8))
    return (packed, step.astype(scale_dtype), zero.astype(jnp.uint8)), read
