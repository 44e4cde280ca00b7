"""Percentile clipping and rescaling of a metric over a sample's visual tokens (QUOTA, Eq. 7)."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.stable import rounded
from quota_jax.errors import QuotaError


def rescale(
    metric: Float[Array, "B S"],
    is_visual: Bool[Array, "B S"],
    *,
    percentiles: tuple[float, float] = (5.0, 95.0),
) -> Float[Array, "B S"]:
    """Clips to the percentiles over a sample's real visual tokens and rescales to [0, 1] (Eq. 7).

    Percentiles interpolate linearly, as numpy's. A metric whose percentiles are equal becomes 0.
    """
    low, high = percentiles
    if not 0 <= low < high <= 100:
        raise QuotaError(f"percentiles must ascend within [0, 100], got {percentiles}")
    metric = metric.astype(jnp.float32)
    count = is_visual.sum(1)
    ordered = jnp.sort(jnp.where(is_visual, metric, jnp.inf), axis=1)
    # Places past the last visual token would make inf - inf where a sample has none.
    ordered = jnp.where(jnp.arange(metric.shape[1])[None] < count[:, None], ordered, 0.0)
    bottom, top = (_percentile(ordered, count, q)[:, None] for q in percentiles)
    span = top - bottom
    scaled = (jnp.clip(metric, bottom, top) - bottom) / jnp.where(span > 0, span, 1.0)
    return jnp.where(is_visual & (span > 0), scaled, 0.0)


def _percentile(
    ordered: Float[Array, "B S"], count: Int[Array, " B"], q: float
) -> Float[Array, " B"]:
    """Percentile of the first ``count`` of ascending values; place and fraction by tables made in
    Python (float32 on the device would round them)."""
    place = np.maximum(np.arange(ordered.shape[1] + 1) - 1, 0) * q / 100
    below = np.floor(place).astype(np.int32)
    fraction = jnp.asarray((place - below).astype(np.float32))[count]
    above = jnp.asarray(np.ceil(place).astype(np.int32))[count]
    at = jnp.stack([jnp.asarray(below)[count], above], axis=1)
    lower, upper = jnp.take_along_axis(ordered, at, axis=1).T
    return lower + rounded((upper - lower) * fraction)
