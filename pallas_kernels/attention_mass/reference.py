"""Column sums of causal attention, in plain jnp.

Walks the queries in blocks; a block holds its scores against all keys, ``[B, N, BLOCK, T]``, takes
the log-sum-exp of each row, then adds the rows' probabilities to the columns. Bitwise contract on
CPU: a sample's result depends neither on padding nor on batch neighbours (see
``pallas_kernels.stable``); all sums have one fixed order.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.stable import exp_difference, fixed_order_sum, rounded

BLOCK = 64
NEGATIVE = -1e30


def row_log_sum_exp(scores: Float[Array, "*rows S"]) -> Float[Array, "*rows"]:
    """``log sum exp`` over keys; masked scores are NEGATIVE."""
    top = scores.max(-1)
    total = fixed_order_sum(exp_difference(scores, top[..., None]))
    return rounded(top + jnp.log(total))


def column_mass(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    lengths: Int[Array, " B"],
    is_visual: Bool[Array, "B T"],
    *,
    sm_scale: float,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """See ``attention_mass``. ``T`` is padded to a multiple of BLOCK inside."""
    batch, length, num_heads, _ = query.shape
    padded = -(-length // BLOCK) * BLOCK
    pad = [(0, 0), (0, padded - length), (0, 0), (0, 0)]
    query = jnp.pad(query.astype(jnp.float32) * sm_scale, pad)
    key = jnp.repeat(jnp.pad(key.astype(jnp.float32), pad), num_heads // key.shape[2], axis=2)
    place = jnp.arange(padded)
    is_real: Bool[Array, "B T"] = place[None] < lengths[:, None]
    is_visual = jnp.pad(is_visual, pad[:2]) & is_real
    is_text = is_real & ~is_visual

    def add_block(mass, index):
        start = index * BLOCK
        rows, text, visual = (
            jax.lax.dynamic_slice_in_dim(array, start, BLOCK, axis=1)
            for array in (query, is_text, is_visual)
        )
        scores = jnp.einsum("btnh,bsnh->bnts", rows, key, precision="highest")
        later = place[None, :] <= (start + jnp.arange(BLOCK))[:, None]  # BLOCK T
        strictly = place[None, :] < (start + jnp.arange(BLOCK))[:, None]
        valid = later[None] & is_real[:, None, :]
        scores = jnp.where(valid[:, None], scores, NEGATIVE)
        weights = exp_difference(scores, row_log_sum_exp(scores)[..., None])
        masks = strictly[None] & text[..., None], later[None] & visual[..., None]
        parts = (_sum_of_rows(jnp.where((mask & valid)[:, None], weights, 0.0)) for mask in masks)
        return tuple(old + new for old, new in zip(mass, parts, strict=True)), None

    zeros = jnp.zeros((batch, padded), jnp.float32)
    mass, _ = jax.lax.scan(add_block, (zeros, zeros), jnp.arange(padded // BLOCK))
    inter, intra = (total[:, :length] / num_heads for total in mass)
    return inter, intra


def _sum_of_rows(weights: Float[Array, "B N T S"]) -> Float[Array, "B S"]:
    """Sum over heads and queries in a fixed order."""
    batch, *_, keys = weights.shape
    return fixed_order_sum(weights.reshape(batch, -1, keys).swapaxes(1, 2))
