"""Scores of visual tokens; higher is kept.

QUOTA's four metrics (arXiv 2604.17320, Eq. 6) come from a layer's deployed operators, are rescaled
per sample (Eq. 7) and added with fixed weights (Eq. 8). Everything is a pure function of arrays
with one row per sample; places that are not real visual tokens score 0 and are never compared. On
CPU a sample's scores depend neither on padding nor on batch neighbours, bit for bit.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.stable import fixed_order_sum, rounded
from quota_jax.errors import QuotaError
from quota_jax.prune.selectors import random_scores, stride_scores
from quota_jax.quant.quantizers import quantize_activation
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
    if selector.name == "random":
        return random_scores(is_visual, selector.seed)
    if selector.name == "stride":
        return stride_scores(is_visual, target)
    assert weights is not None, "text_attention stands after a layer's attention"
    return text_to_visual(weights, is_text)


@dataclass(frozen=True, kw_only=True, slots=True)
class QuotaWeights:
    """Weights of the four metrics (Eq. 8), the paper's by default; 0 leaves a metric out."""

    inter: float = 0.45
    magnitude: float = 0.25
    intra: float = 0.10
    residual: float = 0.20

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if not (math.isfinite(value) and value >= 0):
                raise QuotaError(f"weight of {name} must be finite and not negative, got {value}")
        if not any(dataclasses.astuple(self)):
            raise QuotaError("all weights of the score are 0")

    @property
    def used(self) -> tuple[str, ...]:
        """Metrics of positive weight."""
        return tuple(name for name, value in dataclasses.asdict(self).items() if value)

    def without(self, *metrics: str) -> QuotaWeights:
        """Leaves metrics out; their weight goes to the remaining ones in equal parts (Table 5)."""
        values = dataclasses.asdict(self)
        for name in metrics:
            if name not in values:
                raise QuotaError(f"unknown metric {name!r}; known: {', '.join(values)}")
        remaining = [name for name in self.used if name not in metrics]
        if not remaining:
            raise QuotaError(f"no metric remains without {', '.join(metrics)}")
        share = sum(values[name] for name in values if name in metrics) / len(remaining)
        changed = {name: values[name] + share if name in remaining else 0.0 for name in values}
        return QuotaWeights(**changed)


def magnitude(x: Float[Array, "B S D"]) -> Float[Array, "B S"]:
    """``||v_i||`` of the layer's input hidden state."""
    x = x.astype(jnp.float32)
    return jnp.sqrt(fixed_order_sum(rounded(jnp.square(x))))


def residual(x: Float[Array, "B S K"], bits: int) -> Float[Array, "B S"]:
    """``||Q(x_i) - x_i||`` of the input of q, k and v as it is quantized, i.e. after the online
    transform; Q is the deployed activation quantizer."""
    if bits >= 16:
        raise QuotaError(
            f"{bits}-bit activations have no quantization residual: leave the metric out with "
            "redistribute=True"
        )
    x = x.astype(jnp.float32)
    codes, scale = quantize_activation(x, bits)
    back = rounded(codes.astype(jnp.float32) * scale[..., None])
    return jnp.sqrt(fixed_order_sum(rounded(jnp.square(back - x))))


def inter(mass: Float[Array, "B S"], is_text: Bool[Array, "B S"]) -> Float[Array, "B S"]:
    """Mean attention from the text queries after each token, of the sum that ``attention_mass``
    returns; 0 where no text follows."""
    after = is_text.sum(1, keepdims=True) - jnp.cumsum(is_text, axis=1)
    return mass / jnp.maximum(after, 1)


def intra(
    mass: Float[Array, "B S"], is_visual: Bool[Array, "B S"], *, causal_mean: bool = False
) -> Float[Array, "B S"]:
    """Attention from visual queries over the number n of visual tokens, of the sum that
    ``attention_mass`` returns. ``causal_mean`` divides by the visual queries that can see the
    token instead, so that early tokens have no advantage."""
    count = is_visual.sum(1, keepdims=True)
    if causal_mean:
        count = count - jnp.cumsum(is_visual, axis=1) + is_visual
    return mass / jnp.maximum(count, 1)


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


def quota_score(
    metrics: Mapping[str, Float[Array, "B S"]],
    is_visual: Bool[Array, "B S"],
    weights: QuotaWeights | None = None,
    *,
    redistribute: bool = False,
    percentiles: tuple[float, float] = (5.0, 95.0),
) -> Float[Array, "B S"]:
    """``.45 inter + .25 magnitude + .10 intra + .20 residual`` of rescaled metrics (Eq. 8).

    ``metrics`` maps names to raw values. A metric that has a weight but is not given is an error,
    or with ``redistribute`` its weight goes to the others in equal parts.
    """
    weights = weights or QuotaWeights()
    missing = [name for name in weights.used if name not in metrics]
    if missing and not redistribute:
        raise QuotaError(
            f"no {', '.join(missing)} to score by (inputs not quantized have no residual): give "
            "it, or set redistribute=True"
        )
    weights = weights.without(*missing) if missing else weights
    total = jnp.zeros(is_visual.shape, jnp.float32)
    for name in weights.used:
        scaled = rescale(metrics[name], is_visual, percentiles=percentiles)
        total = total + rounded(getattr(weights, name) * scaled)
    return total
