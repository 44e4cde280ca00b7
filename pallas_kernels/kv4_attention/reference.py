"""Attention over keys and values, in plain jnp.

Bitwise contract on CPU: a row's result depends neither on the capacity of the key axis nor on batch
neighbours. XLA picks other code (other summation orders) for other shapes, so the key axis is
walked in fixed blocks and decode rows are computed one query at a time; see also
``pallas_kernels.stable``.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from pallas_kernels.packing import unpack_uint4
from pallas_kernels.stable import exp_difference, fixed_order_sum

BLOCK = 64
NEGATIVE = -1e30


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


def causal_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    lengths: Int[Array, " B"],
    *,
    sm_scale: float,
    causal: bool = True,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T S"]]:
    """Full attention (causal + length mask). Returns outputs and probabilities, both float32.

    ``T`` is padded to a multiple of BLOCK inside: on CPU the bits of a row then do not depend on
    the padded length. XLA drops the probabilities where the caller does not use them.
    """
    _, length, num_heads, _ = query.shape
    padded = -(-length // BLOCK) * BLOCK
    pad = [(0, 0), (0, padded - length), (0, 0), (0, 0)]
    group = num_heads // key.shape[2]
    query = jnp.pad(query.astype(jnp.float32) * sm_scale, pad)
    key = jnp.repeat(jnp.pad(key.astype(jnp.float32), pad), group, axis=2)
    value = jnp.repeat(jnp.pad(value.astype(jnp.float32), pad), group, axis=2)
    scores = jnp.einsum("btnh,bsnh->bnts", query, key, precision="highest")
    place = jnp.arange(padded)
    valid: Bool[Array, "B 1 T S"] = place[None, None, None, :] < lengths[:, None, None, None]
    if causal:
        valid = valid & (place[None, :] <= place[:, None])
    scores = jnp.where(valid, scores, NEGATIVE)
    weights = exp_difference(scores, scores.max(-1, keepdims=True))
    total = weights.sum(-1, keepdims=True)
    out = jnp.einsum("bnts,bsnh->btnh", weights, value, precision="highest")
    out = out / total[..., 0].swapaxes(1, 2)[..., None]
    return out[:, :length], (weights / total)[:, :, :length, :length]
