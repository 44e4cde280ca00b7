"""QAPruner (arXiv 2604.02816): tokens that 4-bit quantization would hurt are kept.

Positions: nothing is published; ``keep`` inside a layer, ``renumber`` at the decoder's input, where
the pruner that the paper builds on works.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels.stable import fixed_order_sum, rounded
from quota_jax.prune.rescale import rescale


def qapruner_score(
    x: Float[Array, "B S D"],
    prior: Float[Array, "B S"],
    is_visual: Bool[Array, "B S"],
    *,
    alpha: float,
    group_size: int,
) -> Float[Array, "B S"]:
    """``alpha S^P + (1 - alpha) (E + R) / 2``, each min-max rescaled over a sample's visual tokens.

    ``E_i = ||x_i - Q(x_i)||`` under symmetric 4-bit quantization by groups (a group's largest
    magnitude is 7), ``R_i = max_j x_ij - min_j x_ij``. A constant term becomes 0.
    """
    x = x.astype(jnp.float32)
    spread = x.max(-1) - x.min(-1)
    terms = (prior, group_error(x, group_size), spread)
    prior, error, spread = (rescale(term, is_visual, percentiles=(0.0, 100.0)) for term in terms)
    sensitivity = rounded(0.5 * rounded(error + spread))
    return rounded(alpha * prior) + rounded((1 - alpha) * sensitivity)


def group_error(x: Float[Array, "*rows D"], group_size: int) -> Float[Array, "*rows"]:
    """``||x - Q(x)||``; the last group is the shorter one where ``group_size`` does not divide."""
    width = x.shape[-1]
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -width % group_size)])
    groups = x.reshape(*x.shape[:-1], -1, group_size)
    scale = rounded(jnp.abs(groups).max(-1, keepdims=True) / 7)
    codes = jnp.round(groups / jnp.where(scale > 0, scale, 1.0))
    error = rounded(rounded(codes * scale) - groups)
    return jnp.sqrt(fixed_order_sum(rounded(jnp.square(error.reshape(x.shape)))))


def relevance(x: Float[Array, "B S D"], is_text: Bool[Array, "B S"]) -> Float[Array, "B S"]:
    """Mean cosine of each token to the text tokens of its sample; 0 without text."""
    x = x.astype(jnp.float32)
    norm = rounded(jnp.sqrt(fixed_order_sum(rounded(jnp.square(x)))))
    unit = rounded(x / jnp.maximum(norm, 1e-12)[..., None])
    total = fixed_order_sum(jnp.where(is_text[..., None], unit, 0.0).swapaxes(1, 2))
    mean = rounded(total / jnp.maximum(is_text.sum(1, keepdims=True), 1))
    return fixed_order_sum(rounded(unit * mean[:, None]))
