"""How much each candidate layer keeps (QUOTA, arXiv 2604.17320, Eq. 1-5).

Layers that quantization disturbs little drop many tokens. Runs once per calibration, on the host in
float64; what the paper leaves open is a named argument.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from quota_jax.errors import QuotaError
from quota_jax.recipe import Recipe, Selector, Stage

PER = ("sample", "token")


def relative_error(
    x_fp: np.ndarray,
    x_q: np.ndarray,
    *,
    eta: float = 1e-6,
    per: str = "sample",
) -> float:
    """``||x_q - x_fp|| / (||x_fp|| + eta)`` of one sample's real tokens ``[tokens, D]``.

    ``per="sample"``: one Frobenius norm over all tokens and features; ``per="token"``: the mean
    over tokens of each token's own ratio.
    """
    if per not in PER:
        raise QuotaError(f"per must be one of {PER}, got {per!r}")
    x_fp, x_q = np.asarray(x_fp, np.float64), np.asarray(x_q, np.float64)
    if x_fp.shape != x_q.shape or x_fp.ndim != 2 or 0 in x_fp.shape:
        raise QuotaError(
            f"activations must be two equal [tokens, D], got {x_fp.shape} and {x_q.shape}"
        )
    axis = -1 if per == "token" else None
    error = np.sqrt(((x_q - x_fp) ** 2).sum(axis)) / (np.sqrt((x_fp**2).sum(axis)) + eta)
    return float(np.mean(error))


def sensitivity(
    x_fp: Sequence[np.ndarray],
    x_q: Sequence[np.ndarray],
    *,
    eta: float = 1e-6,
    per: str = "sample",
) -> float:
    """S_l: the median of ``relative_error`` over samples (Eq. 1).

    One ``[tokens, D]`` array of layer outputs per sample, in full precision and under the deployed
    operators; padding must be cut off before.
    """
    if not len(x_fp) or len(x_fp) != len(x_q):
        raise QuotaError(
            f"sensitivity needs samples in equal numbers, got {len(x_fp)} and {len(x_q)}"
        )
    pairs = zip(x_fp, x_q, strict=True)
    return float(np.median([relative_error(a, b, eta=eta, per=per) for a, b in pairs]))


def normalise(
    sensitivities: Sequence[float],
    *,
    percentiles: tuple[float, float] = (10.0, 90.0),
    clip: tuple[float, float] = (0.1, 0.9),
) -> np.ndarray:
    """``clip((S - P10) / (P90 - P10), .1, .9)`` (Eq. 2); all equal where P90 = P10.

    Percentiles interpolate linearly between the candidates' values.
    """
    values = np.asarray(sensitivities, np.float64)
    for value in values:
        if not (math.isfinite(value) and value >= 0):
            raise QuotaError(f"sensitivities must be finite and not negative, got {value}")
    if not values.size:
        raise QuotaError("no sensitivities: at least one candidate layer is needed")
    if not 0 <= percentiles[0] < percentiles[1] <= 100:
        raise QuotaError(f"percentiles must ascend within [0, 100], got {percentiles}")
    if not 0 <= clip[0] <= clip[1] <= 1:
        raise QuotaError(f"clip bounds must ascend within [0, 1], got {clip}")
    low, high = np.percentile(values, percentiles)
    if high <= low:
        return np.full(values.shape, sum(clip) / 2)
    return np.clip((np.clip(values, low, high) - low) / (high - low), *clip)


@dataclass(frozen=True, kw_only=True, slots=True)
class Allocation:
    """Budgets of the candidate layers, one value per candidate.

    ``weights`` is pi and sums to 1; ``drops`` is d = (1 - rho) pi, fractions of the original visual
    tokens; ``ratios`` is what remains after each candidate, not increasing, the last one exactly
    rho.
    """

    candidates: tuple[int, ...]
    sensitivities: tuple[float, ...]
    normalised: tuple[float, ...]
    weights: tuple[float, ...]
    drops: tuple[float, ...]
    ratios: tuple[float, ...]


def allocate(
    sensitivities: Sequence[float],
    candidates: Sequence[int],
    rho: float,
    tau: float = 1.0,
    *,
    percentiles: tuple[float, float] = (10.0, 90.0),
    clip: tuple[float, float] = (0.1, 0.9),
) -> Allocation:
    """Shares the drop ``1 - rho`` out among the candidate layers (Eq. 2-4).

    ``pi = softmax((1 - S^) / tau)``, ``d = (1 - rho) pi``, ``r_i = max(rho, 1 - sum_{j<=i} d_j)``:
    the first candidate already drops. One candidate takes the whole drop.
    """
    layers = _layers(candidates)
    if len(sensitivities) != len(layers):
        raise QuotaError(f"{len(sensitivities)} sensitivities for {len(layers)} candidate layers")
    if not 0 <= rho <= 1:
        raise QuotaError(f"rho must lie in [0, 1], got {rho}")
    if not (math.isfinite(tau) and tau > 0):
        raise QuotaError(f"tau must be positive, got {tau}")
    scaled = normalise(sensitivities, percentiles=percentiles, clip=clip)
    exponent = (1 - scaled) / tau
    weights = np.exp(exponent - exponent.max())
    weights /= weights.sum()
    drops = (1 - rho) * weights
    ratios = np.maximum(rho, 1 - np.cumsum(drops))
    ratios[-1] = rho
    return Allocation(
        candidates=layers,
        sensitivities=tuple(map(float, sensitivities)),
        normalised=tuple(scaled.tolist()),
        weights=tuple(weights.tolist()),
        drops=tuple(drops.tolist()),
        ratios=tuple(ratios.tolist()),
    )


def quota_recipe(
    num_layers: int,
    candidates: Sequence[int],
    ratios: Sequence[float],
    *,
    selector: str | Selector = "text_attention",
    point: str | None = None,
    positions: str = "keep",
    trim_own_cache: bool = True,
    min_keep_per_image: int = 0,
    reference_tokens: int | None = None,
) -> Recipe:
    """One stage per candidate layer that keeps ``ratios`` of the original visual tokens; the
    budgets K = ceil(r n) follow from ``recipe.kept`` (Eq. 5).

    ``point`` None takes the selector's own. ``reference_tokens``: n is this V_0 for every sample,
    see ``Recipe``.
    """
    layers = _layers(candidates)
    if len(ratios) != len(layers):
        raise QuotaError(f"{len(ratios)} ratios for {len(layers)} candidate layers")
    named = Selector(name=selector) if isinstance(selector, str) else selector
    stages = tuple(
        Stage(
            layer=layer,
            keep=float(ratio),
            point=point or named.points[-1],
            selector=named,
            trim_own_cache=trim_own_cache,
            min_keep_per_image=min_keep_per_image,
        )
        for layer, ratio in zip(layers, ratios, strict=True)
    )
    return Recipe(
        num_layers=num_layers,
        stages=stages,
        positions=positions,
        budget="sample" if reference_tokens is None else "reference",
        reference_tokens=reference_tokens,
    )


def _layers(candidates: Sequence[int]) -> tuple[int, ...]:
    layers = tuple(candidates)
    if not layers:
        raise QuotaError("no candidate layers: at least one is needed")
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
            raise QuotaError(f"candidate layers must be non-negative integers, got {layer!r}")
    if any(a >= b for a, b in pairwise(layers)):
        raise QuotaError(f"candidate layers must ascend, got {list(layers)}")
    return layers
