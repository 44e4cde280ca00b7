"""Attention of a whole sequence, in plain jnp.

Bitwise contract on CPU: a row's result depends neither on the padded length nor on batch
neighbours. XLA picks other code (other summation orders) for other shapes, so lengths are padded to
whole blocks; see also ``pallas_kernels.stable``.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.stable import exp_difference

BLOCK = 64
NEGATIVE = -1e30


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
