"""SQAP-VLA's selection (arXiv 2509.09090) as far as it applies to a vision-language model.

Two of its three criteria: tokens of most attention under the quantized operators are preserved, the
others are spread over the picture by farthest-point sampling. The third protects the tokens of a
robot's arm; there is none here. Positions: ``keep`` (nothing is published).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

FAR = 2**30
"""Squared distance between tokens of different pictures."""


def sqap_ranks(
    attention: Float[Array, "B S"],
    grid: Int[Array, "B S 3"],
    is_visual: Bool[Array, "B S"],
    target: Int[Array, " B"],
    count: int,
    *,
    preserved: float,
) -> Int[Array, "B S"]:
    """The turn, from 0, in which each visual token is picked.

    The first ``round(preserved * target)`` turns (halves up) take the tokens of most attention;
    then each turn takes the token farthest from its nearest picked one, by row and column inside a
    picture; a picture without a picked token is farthest of all. Ties go to the lowest index.
    Tokens not picked within ``count`` turns, and places that are not visual, rank ``S``.
    """
    length = attention.shape[1]
    table = np.floor(np.arange(length + 1) * preserved + 0.5).astype(np.int32)
    first = jnp.asarray(table)[jnp.minimum(target, length)]
    attention = attention.astype(jnp.float32)

    def turn(index, state):
        nearest, candidates, ranks = state
        by_attention = jnp.where(candidates, attention, -jnp.inf).argmax(1)
        by_distance = jnp.where(candidates, nearest, -1).argmax(1)
        pick = jnp.where(index < first, by_attention, by_distance)
        chosen = (jnp.arange(length)[None] == pick[:, None]) & candidates
        here = jnp.take_along_axis(grid, pick[:, None, None], axis=1)
        apart = jnp.square(grid[..., 1:] - here[..., 1:]).sum(-1)
        apart = jnp.where(grid[..., 0] == here[..., 0], apart, FAR)
        nearest = jnp.minimum(nearest, apart)
        return nearest, candidates & ~chosen, jnp.where(chosen, index, ranks)

    ranks = jnp.full(is_visual.shape, length, jnp.int32)
    nearest = jnp.full(is_visual.shape, FAR, jnp.int32)
    state = jax.lax.fori_loop(0, min(count, length), turn, (nearest, is_visual, ranks))
    return state[2]
