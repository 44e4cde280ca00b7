"""Scores of visual tokens; higher is kept.

QUOTA's four metrics (arXiv 2604.17320, Eq. 6) come from a layer's deployed operators, are rescaled
per sample (Eq. 7) and added with fixed weights (Eq. 8). Everything is a pure function of arrays
with one row per sample; places that are not real visual tokens score 0 and are never compared. On
CPU a sample's scores depend neither on padding nor on batch neighbours, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.attention_mass import attention_mass
from pallas_kernels.stable import fixed_order_sum, rounded
from quota_jax.errors import QuotaError
from quota_jax.prune.mmtok import mmtok_ranks
from quota_jax.prune.options import MmtokOptions, QaprunerOptions, SqapOptions
from quota_jax.prune.qapruner import qapruner_score, relevance
from quota_jax.prune.rescale import rescale
from quota_jax.prune.select import Sequence, grid_of, picture_shares
from quota_jax.prune.selectors import (
    div_prune_ranks,
    fastv_scores,
    pyramid_drop_scores,
    random_scores,
    stride_scores,
)
from quota_jax.prune.sqap import sqap_ranks
from quota_jax.prune.weights import METRICS, QuotaWeights
from quota_jax.quant.quantizers import quantize_activation
from quota_jax.recipe import Selector


@dataclass(frozen=True, kw_only=True)
class Signals:
    """What a stage can be scored by. Queries, keys and the residual exist only inside a layer.

    hidden: input states of the layer (of the decoder, for a stage at its input). query, key: after
    rotation, keys as the cache stores them. residual: norm of the quantization error of the input
    of q, k and v (None where inputs are not quantized). vision: features of the vision tower before
    the projector (None but at the decoder's input, for a selector that reads them). weights: of the
    metrics of QUOTA's score in place of the selector's, as arrays: one program for all weights.
    """

    hidden: Float[Array, "B S D"]
    sequence: Sequence
    query: Float[Array, "B S N H"] | None = None
    key: Float[Array, "B S K H"] | None = None
    residual: Float[Array, "B S"] | None = None
    vision: Float[Array, "B S F"] | None = None
    sm_scale: float = 1.0
    weights: Mapping[str, Float[Array, ""]] | None = None

    def mass(self) -> tuple[Float[Array, "B S"], Float[Array, "B S"]]:
        """Attention that each token receives from text and from visual queries."""
        query, key = self.heads()
        sequence = self.sequence
        return attention_mass(
            query, key, sequence.lengths, sequence.is_visual, sm_scale=self.sm_scale
        )

    def text_attention(self) -> Float[Array, "B S"]:
        """Mean attention from the text queries after each token."""
        return inter(self.mass()[0], self.sequence.is_text)

    def heads(self) -> tuple[Float[Array, "B S N H"], Float[Array, "B S K H"]]:
        assert self.query is not None, "this selector stands inside a layer"
        assert self.key is not None
        return self.query, self.key


def score(
    selector: Selector, signals: Signals, target: Int[Array, " B"], limit: int
) -> Float[Array, "B S"]:
    """Scores of every place (only visual ones are compared). ``target`` is K of each sample, at
    most ``limit``."""
    sequence, options = signals.sequence, selector.options
    visual, text = sequence.is_visual, sequence.is_text
    if isinstance(options, MmtokOptions):
        if signals.vision is None:
            raise QuotaError("selector 'mmtok' needs the features of the vision tower")
        ranks = mmtok_ranks(signals.hidden, signals.vision, visual, text, limit, options)
        return -ranks.astype(jnp.float32)
    if isinstance(options, QaprunerOptions):
        inside = options.prior == "text_attention"
        prior = signals.text_attention() if inside else relevance(signals.hidden, text)
        return qapruner_score(
            signals.hidden, prior, visual, alpha=options.alpha, group_size=options.group_size
        )
    if isinstance(options, SqapOptions):
        attention, share = signals.text_attention(), options.preserved
        grid = grid_of(sequence)
        ranks = sqap_ranks(attention, grid, visual, target, limit, preserved=share)
        return -ranks.astype(jnp.float32)
    if selector.name == "visionzip":
        # The new tokens already stand in the first places of each picture.
        place, share = picture_shares(sequence, target)
        return (place < share).astype(jnp.float32)
    if selector.name == "random":
        return random_scores(visual, selector.seed)
    if selector.name == "stride":
        return stride_scores(visual, target)
    if selector.name == "div_prune":
        ranks = div_prune_ranks(signals.hidden, visual, limit)
        return -ranks.astype(jnp.float32)
    if selector.name == "fastv":
        return fastv_scores(*signals.heads(), sequence.lengths, sm_scale=signals.sm_scale)
    if selector.name == "pyramid_drop":
        # The prompt ends where the answer begins: its last token is the last of the instruction.
        last = sequence.lengths - 1
        return pyramid_drop_scores(*signals.heads(), last, sm_scale=signals.sm_scale)
    if selector.name == "text_attention":
        return signals.text_attention()
    from_text, from_visual = signals.mass()
    metrics = {
        "inter": inter(from_text, text),
        "magnitude": magnitude(signals.hidden),
        "intra": intra(from_visual, visual, causal_mean=selector.causal_intra),
    }
    if signals.residual is not None:
        metrics["residual"] = signals.residual
    weights, redistribute = signals.weights or selector.weights, selector.redistribute
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


def quota_score(
    metrics: Mapping[str, Float[Array, "B S"]],
    is_visual: Bool[Array, "B S"],
    weights: QuotaWeights | Mapping[str, Float[Array, ""]] | None = None,
    *,
    redistribute: bool = False,
    percentiles: tuple[float, float] = (5.0, 95.0),
) -> Float[Array, "B S"]:
    """``.45 inter + .25 magnitude + .10 intra + .20 residual`` of rescaled metrics (Eq. 8).

    ``metrics`` maps names to raw values. A metric that has a weight but is not given is an error,
    or with ``redistribute`` its weight goes to the others in equal parts. Weights may also be
    arrays by name, of given metrics.
    """
    total = jnp.zeros(is_visual.shape, jnp.float32)
    if isinstance(weights, Mapping):
        return _weighted(total, metrics, weights, is_visual, percentiles)
    weights = weights or QuotaWeights()
    missing = [name for name in weights.used if name not in metrics]
    if missing and not redistribute:
        raise QuotaError(
            f"no {', '.join(missing)} to score by (inputs not quantized have no residual): give "
            "it, or set redistribute=True"
        )
    weights = weights.without(*missing) if missing else weights
    shares = {name: getattr(weights, name) for name in weights.used}
    return _weighted(total, metrics, shares, is_visual, percentiles)


def _weighted(total, metrics, shares: Mapping[str, Any], is_visual, percentiles):
    """Adds the rescaled metrics times their shares."""
    for name in METRICS:
        if name in shares:
            scaled = rescale(metrics[name], is_visual, percentiles=percentiles)
            total = total + rounded(shares[name] * scaled)
    return total
