"""MMTok (arXiv 2508.18264): tokens that together cover the prompt's text and the picture.

Reads the decoder's input and the vision tower's features before the projector. Positions: the
paper's decoder sees a shorter sequence, numbered without gaps (``renumber``).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.stable import exp_difference, fixed_order_sum, rounded
from quota_jax.prune.options import MmtokOptions

BLOCK = 64
NEGATIVE = -1e30


def mmtok_ranks(
    hidden: Float[Array, "B S D"],
    vision: Float[Array, "B S F"],
    is_visual: Bool[Array, "B S"],
    is_text: Bool[Array, "B S"],
    count: int,
    options: MmtokOptions,
) -> Int[Array, "B S"]:
    """The turn, from 0, in which greedy maximum coverage picks each visual token.

    ``M[i, s]``: softmax over a sample's visual tokens s of cosine / temperature, for text rows i of
    ``hidden`` (all text of the prompt) and visual rows i of ``vision``. Each turn adds the token
    that raises ``mean_text max_{s in S} M[i, s] + alpha mean_visual max_{s in S} M[i, s]`` most;
    ties go to the lowest index. Tokens not picked within ``count`` turns, and places that are not
    visual, rank ``S``. Holds a few ``S x S`` matrices.
    """
    batch, length, _ = hidden.shape
    padded = -(-length // BLOCK) * BLOCK
    is_visual, is_text = (
        jnp.pad(mask, [(0, 0), (0, padded - length)]) for mask in (is_visual, is_text)
    )
    gains = _coverage(_unit(hidden, padded), _unit(vision, padded), is_visual, is_text, options)

    def turn(index, state):
        covered, candidates, ranks = state
        gain = fixed_order_sum(jnp.maximum(rounded(gains - covered[:, None]), 0.0))
        pick = jnp.where(candidates, gain, -jnp.inf).argmax(1)
        chosen = (jnp.arange(padded)[None] == pick[:, None]) & candidates
        row = jnp.take_along_axis(gains, pick[:, None, None], axis=1)[:, 0]
        covered = jnp.maximum(covered, row)
        return covered, candidates & ~chosen, jnp.where(chosen, index, ranks)

    ranks = jnp.full((batch, padded), length, jnp.int32)
    covered = jnp.zeros((batch, padded), jnp.float32)
    state = jax.lax.fori_loop(0, min(count, length), turn, (covered, is_visual, ranks))
    return state[2][:, :length]


def _coverage(hidden, vision, is_visual, is_text, options: MmtokOptions) -> Float[Array, "B S S"]:
    """How much token s (second axis) covers of row i (last axis), weights of the rows included."""
    from_text, from_visual = (
        jnp.einsum("bid,bsd->bis", unit, unit, precision="highest") for unit in (hidden, vision)
    )
    text = is_text[..., None]
    cosine = jnp.where(
        text, from_text / options.text_temperature, from_visual / options.vision_temperature
    )
    columns = is_visual[:, None]
    cosine = jnp.where(columns, rounded(cosine), NEGATIVE)
    weights = exp_difference(cosine, cosine.max(-1, keepdims=True))
    weights = rounded(jnp.where(columns, weights, 0.0))
    total = jnp.maximum(fixed_order_sum(weights), 1e-30)
    share = is_text / jnp.maximum(is_text.sum(1, keepdims=True), 1)
    share += options.alpha * is_visual / jnp.maximum(is_visual.sum(1, keepdims=True), 1)
    return rounded(rounded(weights / total[..., None]) * rounded(share)[..., None]).swapaxes(1, 2)


def _unit(x: Float[Array, "B S D"], padded: int) -> Float[Array, "B P D"]:
    x = jnp.pad(x.astype(jnp.float32), [(0, 0), (0, padded - x.shape[1]), (0, 0)])
    norm = rounded(jnp.sqrt(fixed_order_sum(rounded(jnp.square(x)))))
    return x / jnp.maximum(norm, 1e-12)[..., None]
