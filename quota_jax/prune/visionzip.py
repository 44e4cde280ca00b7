"""VisionZip (dvlab-research/VisionZip): few dominant tokens, the others merged into a few more.

Works on the states that the vision tower gives to the projector, by the attention and the keys of
the layer that made them. Needs a class token. The new tokens are no subset of the old ones, so the
sequence is renumbered: the shorter sequence's own places, in the order class token, dominant
tokens, contextual tokens.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.stable import rounded
from quota_jax.prune.options import VisionZipOptions


def contextual_count(budget: int, options: VisionZipOptions) -> int:
    """How many of ``budget`` tokens are merged ones; the class token always has a place."""
    return max(0, min(budget - 1, int(budget * options.contextual + 0.5)))


def visionzip(
    states: Float[Array, "P V F"],
    attention: Float[Array, "P V"],
    keys: Float[Array, "P V H"],
    budget: Int[Array, " P"],
    limit: int,
    options: VisionZipOptions,
) -> tuple[Float[Array, "P limit F"], Int[Array, "P limit"]]:
    """New states of each picture, the first ``budget`` of ``limit``, and the patch behind each.

    ``V`` is the class token (place 0) and the patches; ``attention`` what the class token pays
    each of them, summed over heads; ``keys`` the mean over heads, before normalising. With c
    contextual tokens: the class token and the ``budget - c - 1`` patches of most attention are
    dominant, in ascending order. Of the r remaining patches every ``max(1, r // c)``-th is a
    target, c of them; every other one joins its most similar target by cosine of the keys, and a
    contextual token is the target's state plus the mean of those that joined it. Ties go to the
    lowest place. The second result is the place of the dominant patch or target, 0 for the class
    token.
    """
    count = states.shape[1]
    table = [contextual_count(k, options) for k in range(count + 1)]
    contextual = jnp.asarray(np.array(table, np.int32))[budget][:, None]
    patches = jnp.arange(count)[None] > 0
    order = jnp.argsort(jnp.where(patches, -attention, jnp.inf), axis=1, stable=True)
    rank = jnp.argsort(order, axis=1, stable=True)
    dominant = patches & (rank < budget[:, None] - contextual - 1)

    rest = patches & ~dominant
    ordinal = jnp.cumsum(rest, axis=1) - 1
    step = jnp.maximum(1, rest.sum(1, keepdims=True) // jnp.maximum(contextual, 1))
    target = rest & (ordinal % step == 0) & (ordinal // step < contextual)
    merged = _merge(states, keys, rest & ~target, target)

    values = jnp.where(target[..., None], merged, states.astype(jnp.float32))
    group = jnp.where(dominant, 1, jnp.where(target, 2, 3)).at[:, 0].set(0)
    chosen = jnp.argsort(group, axis=1, stable=True)[:, :limit]
    out = jnp.take_along_axis(values, chosen[..., None], axis=1)
    return out.astype(states.dtype), chosen


def _merge(states, keys, joins, target) -> Float[Array, "P V F"]:
    """States of the targets plus the mean of the states that join them."""
    states, keys = states.astype(jnp.float32), keys.astype(jnp.float32)
    norm = jnp.sqrt(jnp.square(keys).sum(-1, keepdims=True))
    unit = rounded(keys / jnp.maximum(norm, 1e-12))
    similarity = jnp.einsum("pjh,pth->pjt", unit, unit, precision="highest")
    nearest = jnp.where(target[:, None], similarity, -jnp.inf).argmax(-1)
    places = jnp.arange(states.shape[1])
    joined = (nearest[..., None] == places) & joins[..., None] & target[:, None]
    joined = joined.astype(jnp.float32)
    total = jnp.einsum("pjt,pjf->ptf", joined, states, precision="highest")
    return states + total / jnp.maximum(joined.sum(1), 1)[..., None]
