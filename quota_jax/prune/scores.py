"""Scores of visual tokens; higher is kept.

QUOTA's four metrics (arXiv 2604.17320, Eq. 6) come from a layer's deployed operators, are rescaled
per sample (Eq. 7) and added with fixed weights (Eq. 8). Everything is a pure function of arrays
with one row per sample; places that are not real visual tokens score 0 and are never compared. On
CPU a sample's scores depend neither on padding nor on batch neighbours, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.attention_mass import attention_mass
from pallas_kernels.stable import fixed_order_sum, rounded
from quota_jax.errors import QuotaError
from quota_jax.prune.selectors import (
    div_prune_ranks,
    fastv_scores,
    pyramid_drop_scores,
    random_scores,
    stride_scores,
)
from quota_jax.prune.weights import QuotaWeights
from quota_jax.quant.quantizers import quantize_activation
from quota_jax.recipe import Selector


@dataclass(frozen=True, kw_only=True)
class Signals:
    """What a stage can be scored by. Queries, keys and the residual exist only inside a layer.

    hidden: input states of the layer (of the decoder, for a stage at its input). query, key: after
    rotation, keys as the cache stores them. residual: norm of the quantization error of the input
    of q, k and v (None where inputs are not quantized).
    """

    hidden: Float[Array, "B S D"]
    lengths: Int[Array, " B"]
    is_visual: Bool[Array, "B S"]
    is_text: Bool[Array, "B S"]
    query: Float[Array, "B S N H"] | None = None
    key: Float[Array, "B S K H"] | None = None
    residual: Float[Array, "B S"] | None = None
    sm_scale: float = 1.0

    def mass(self) -> tuple[Float[Array, "B S"], Float[Array, "B S"]]:
        """Attention that each token receives from text and from visual queries."""
        query, key = self.heads()
        return attention_mass(query, key, self.lengths, self.is_visual, sm_scale=self.sm_scale)

    def heads(self) -> tuple[Float[Array, "B S N H"], Float[Array, "B S K H"]]:
        assert self.query is not None, "this selector stands inside a layer"
        assert self.key is not None
        return self.query, self.key


def score(selector: Selector, signals: Signals, target: Int[Array, " B"]) -> Float[Array, "B S"]:
    """Scores of every place (only visual ones are compared). ``target`` is K of each sample."""
    visual, text = signals.is_visual, signals.is_text
    if selector.name == "random":
        return random_scores(visual, selector.seed)
    if selector.name == "stride":
        return stride_scores(visual, target)
    if selector.name == "div_prune":
        ranks = div_prune_ranks(signals.hidden, visual, visual.shape[1])
        return -ranks.astype(jnp.float32)
    if selector.name == "fastv":
        return fastv_scores(*signals.heads(), signals.lengths, sm_scale=signals.sm_scale)
    if selector.name == "pyramid_drop":
        # The prompt ends where the answer begins: its last token is the last of the instruction.
        last = signals.lengths - 1
        return pyramid_drop_scores(*signals.heads(), last, sm_scale=signals.sm_scale)
    from_text, from_visual = signals.mass()
    if selector.name == "text_attention":
        return inter(from_text, text)
    metrics = {
        "inter": inter(from_text, text),
        "magnitude": magnitude(signals.hidden),
        "intra": intra(from_visual, visual, causal_mean=selector.causal_intra),
    }
    if signals.residual is not None:
        metrics["residual"] = signals.residual
    weights, redistribute = selector.weights, selector.redistribute
    return quota_score(metrics, visual, weights, redistribute=redistribute)


def magnitude(x: Float[Array, "B S D"]) -> Float[Array, "B S"]:
    """``||v_i||`` of the layer's input hidden state."""
    x = x.astype(jnp.float32)
    return jnp.sqrt(fixed_order_sum(rounded(jnp.square(x))))


def residual(
    x: Float[Array, "*rows K"], bits: int, clip: Float[Array, " 2"] | None = None
) -> Float[Array, "*rows"]:
    """``||Q(x_i) - x_i||`` of the input of q, k and v as it is quantized, i.e. after the online
    transform; Q is the deployed activation quantizer, ``clip`` its learned clipping."""
    if bits >= 16:
        raise QuotaError(
            f"{bits}-bit activations have no quantization residual: leave the metric out with "
            "redistribute=True"
        )
    x = x.astype(jnp.float32)
    codes, scale = quantize_activation(x, bits, clip)
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
