"""Scores of visual tokens; higher is kept."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from quota_jax.recipe import Selector


def text_to_visual(
    weights: Float[Array, "B N T S"], is_text: Bool[Array, "B T"]
) -> Float[Array, "B S"]:
    """Mean attention that a token receives, over heads and over the valid text queries after it
    (Eq. 6)."""
    place = jnp.arange(is_text.shape[1])
    later = is_text[:, :, None] & (place[None, :, None] > place[None, None, :])
    mass = jnp.where(later[:, None], weights, 0.0).sum(2).mean(1)
    return mass / jnp.maximum(later.sum(1), 1)


def score(
    selector: Selector,
    *,
    is_visual: Bool[Array, "B S"],
    is_text: Bool[Array, "B S"],
    target: Int[Array, " B"],
    weights: Float[Array, "B N T S"] | None,
) -> Float[Array, "B S"]:
    """Scores of every place (only visual ones are compared). ``target`` is K of each sample."""
    ordinal = jnp.cumsum(is_visual, axis=1) - 1
    if selector.name == "random":
        key = jax.random.key(selector.seed)
        draw = jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(key, i)))
        return draw(ordinal.reshape(-1)).reshape(ordinal.shape)
    if selector.name == "stride":
        count = jnp.maximum(is_visual.sum(1), 1)[:, None]
        step = target[:, None]
        return ((ordinal + 1) * step // count > ordinal * step // count).astype(jnp.float32)
    assert weights is not None, "text_attention stands after a layer's attention"
    return text_to_visual(weights, is_text)
