"""One query per sample over its cached keys and values, in plain jnp.

Bitwise contract on CPU: a row's result depends neither on the capacity of the key axis nor on batch
neighbours. XLA picks other code (other summation orders) for other shapes, so the key axis is
walked in fixed blocks; see also ``pallas_kernels.stable``.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from pallas_kernels.attention.reference import BLOCK, NEGATIVE
from pallas_kernels.packing import unpack_uint4
from pallas_kernels.stable import exp_difference, fixed_order_sum


def dequantize(
    packed: UInt8[Array, "*rows bytes"], scale: Float[Array, "*rows"], zero: UInt8[Array, "*rows"]
) -> Float[Array, "*rows H"]:
    """``scale * (code - zero)`` in float32."""
    codes = unpack_uint4(packed).astype(jnp.int32) - zero.astype(jnp.int32)[..., None]
    return codes.astype(jnp.float32) * scale.astype(jnp.float32)[..., None]


def decode_attention(
    query: Float[Array, "B N H"],
    key_block,
    value_block,
    capacity: int,
    lengths: Int[Array, " B"],
    *,
    sm_scale: float,
) -> Float[Array, "B N H"]:
    """One query per sample against its first ``lengths`` keys; online softmax over key blocks.

    ``key_block(start)`` and ``value_block(start)`` return float32 ``[B, K, BLOCK, H]`` starting at
    key ``start``; ``capacity`` is a multiple of BLOCK.
    """
    batch, num_heads, head_dim = query.shape
    query = query.astype(jnp.float32) * sm_scale

    def step(carry, index):
        top, total, out = carry
        keys, values = key_block(index * BLOCK), value_block(index * BLOCK)
        group = num_heads // keys.shape[1]
        keys, values = (jnp.repeat(part, group, axis=1) for part in (keys, values))
        scores = jnp.einsum("bnh,bnsh->bns", query, keys, precision="highest")
        valid = index * BLOCK + jnp.arange(BLOCK)[None, None, :] < lengths[:, None, None]
        scores = jnp.where(valid, scores, NEGATIVE)
        new_top = jnp.maximum(top, scores.max(-1))
        weights = jnp.where(valid, exp_difference(scores, new_top[..., None]), 0.0)
        decay = exp_difference(top, new_top)
        total = total * decay + fixed_order_sum(weights)
        out = out * decay[..., None] + jnp.einsum(
            "bns,bnsh->bnh", weights, values, precision="highest"
        )
        return (new_top, total, out), None

    start = (
        jnp.full((batch, num_heads), NEGATIVE, jnp.float32),
        jnp.zeros((batch, num_heads), jnp.float32),
        jnp.zeros((batch, num_heads, head_dim), jnp.float32),
    )
    (_, total, out), _ = jax.lax.scan(step, start, jnp.arange(capacity // BLOCK))
    return out / jnp.maximum(total, 1e-30)[..., None]


def dense_decode_attention(
    query: Float[Array, "B N H"],
    key: Float[Array, "B K S H"],
    value: Float[Array, "B K S H"],
    lengths: Int[Array, " B"],
    *,
    sm_scale: float,
) -> Float[Array, "B N H"]:
    """The same over dense keys at once: fewer, larger operations, for GPUs. float32 result."""
    batch, num_heads, head_dim = query.shape
    query = (query.astype(jnp.float32) * sm_scale).astype(key.dtype)
    query = query.reshape(batch, key.shape[1], -1, head_dim)
    wide = {"precision": "highest", "preferred_element_type": jnp.float32}
    scores = jnp.einsum("bkgh,bksh->bkgs", query, key, **wide)
    valid = jnp.arange(key.shape[2]) < lengths[:, None, None, None]
    weights = jax.nn.softmax(jnp.where(valid, scores, NEGATIVE), axis=-1).astype(key.dtype)
    out = jnp.einsum("bkgs,bksh->bkgh", weights, value, **wide)
    return out.reshape(batch, num_heads, head_dim)
