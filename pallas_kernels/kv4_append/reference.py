"""Rotation, 4-bit quantization and append of one token per sample, in plain jnp."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.packing import pack_int4
from pallas_kernels.stable import as_stored, rounded

TINY = 1e-8
LEVELS = 15

Packed = tuple[Array, Array, Array]
"""Codes ``[L, B, K, S, H/2]``, scales and zeros ``[L, B, K, S]`` of a stack of layers."""


class Sites(NamedTuple):
    """Parameters of a stack of layers; each may be absent. See ``kv4_append``."""

    query: Float[Array, "L H H"] | None = None
    key: Float[Array, "L H H"] | None = None
    clip: Float[Array, "L 2 2"] | None = None
    bias: Float[Array, "L rows"] | None = None


class Appended(NamedTuple):
    """Rotated queries, and the caches with the new token."""

    query: Float[Array, "B N H"]
    key: Packed
    value: Packed


def kv4_append_reference(
    qkv: Float[Array, "B rows"],
    cos: Float[Array, "B half"],
    sin: Float[Array, "B half"],
    key: Packed,
    value: Packed,
    lengths: Int[Array, " B"],
    layer: Int[Array, ""],
    site_layer: Int[Array, ""],
    sites: Sites,
    *,
    dtype: Any,
) -> Appended:
    """See ``pallas_kernels.kv4_append.kv4_append``."""
    own = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, site_layer, keepdims=False), sites)
    clips = (None, None) if own.clip is None else own.clip
    batch, head_dim, kv_heads = qkv.shape[0], 2 * cos.shape[-1], key[0].shape[2]
    if own.bias is not None:
        qkv = rounded(qkv.astype(jnp.float32)) + own.bias.astype(jnp.float32)
    heads = qkv.astype(dtype).reshape(batch, -1, head_dim)
    turned = _rotate(heads[:, :-kv_heads], cos, sin).astype(dtype)
    samples = jnp.arange(batch)

    def transformed(x, matrix):
        if matrix is None:
            return x
        rows = x.astype(jnp.float32).reshape(-1, head_dim)
        out = jax.lax.dot_general(
            rows,
            matrix.T,
            (((1,), (1,)), ((), ())),
            precision="highest",
            preferred_element_type=jnp.float32,
        )
        return rounded(out).reshape(x.shape).astype(dtype)

    def write(cache, new, clip):
        # Beyond the capacity nothing is written: such an index is dropped.
        return tuple(
            array.at[layer, samples, :, lengths].set(part)
            for array, part in zip(cache, _quantize(new, cache[1].dtype, clip), strict=True)
        )

    query = transformed(turned[:, :-kv_heads], own.query)
    keys = transformed(turned[:, -kv_heads:], own.key)
    values = heads[:, -kv_heads:]
    return Appended(query, write(key, keys, clips[0]), write(value, values, clips[1]))


def _rotate(x: Float[Array, "B N H"], cos: Array, sin: Array) -> Float[Array, "B N H"]:
    """Pair ``(i, i + H/2)`` of each head, float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, None], sin[:, None]
    real = rounded(first * cos) - rounded(second * sin)
    imaginary = rounded(second * cos) + rounded(first * sin)
    return jnp.concatenate([real, imaginary], axis=-1)


def _quantize(x: Float[Array, "B K H"], scale_dtype, clip: Array | None) -> Packed:
    """``x ~ scale * (code - zero)`` over each head; the range always contains 0."""
    x = x.astype(jnp.float32)
    low, high = jnp.minimum(x.min(-1), 0.0), jnp.maximum(x.max(-1), 0.0)
    if clip is not None:
        low, high = low * clip[1], high * clip[0]
    step = as_stored(jnp.maximum(high - low, TINY) / LEVELS, scale_dtype)
    zero = jnp.clip(jnp.round(-low / step), 0, LEVELS)
    codes = jnp.clip(jnp.round(x / step[..., None]) + zero[..., None], 0, LEVELS)
    return pack_int4(codes.astype(jnp.uint8)), step.astype(scale_dtype), zero.astype(jnp.uint8)
