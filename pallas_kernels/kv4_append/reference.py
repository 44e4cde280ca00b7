"""Rotation, 4-bit quantization and append of one token per sample, in plain jnp."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.kv4_encode.reference import Packed, encode_heads
from pallas_kernels.kv4_encode.reference import Sites as HeadSites
from pallas_kernels.stable import rounded


class Sites(NamedTuple):
    """Parameters of a stack of layers; each may be absent. See ``kv4_append``."""

    query: Float[Array, "L H H"] | None = None
    key: Float[Array, "L H H"] | None = None
    clip: Float[Array, "L 2 2"] | None = None
    bias: Float[Array, "L rows"] | None = None


class Appended(NamedTuple):
    """Rotated queries, and the caches ``[L, B, K, S, ...]`` with the new token."""

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
    if own.bias is not None:
        qkv = rounded(qkv.astype(jnp.float32)) + own.bias.astype(jnp.float32)
    made = encode_heads(
        qkv.astype(dtype),
        cos,
        sin,
        HeadSites(own.query, own.key, own.clip),
        kv_heads=key[0].shape[2],
        scale_dtype=key[1].dtype,
    )
    samples = jnp.arange(qkv.shape[0])

    def write(cache, new):
        # Beyond the capacity nothing is written: such an index is dropped.
        return tuple(
            array.at[layer, samples, :, lengths].set(part)
            for array, part in zip(cache, new, strict=True)
        )

    return Appended(made.query, write(key, made.stored[0]), write(value, made.stored[1]))
