"""LUQ (arXiv 2509.23729): decoder layers whose output activations have little entropy get fewer
bits. Free of models.

The publication names neither the estimator nor the bins; ours is a stated choice. A layer's output
values over all real tokens are standardized, z = (x - mean) / std, so that the growth of the
residual stream with depth does not decide; the Shannon entropy is that of ``bins`` equal bins over
[-4, 4], the outer ones open. A normal distribution in 256 bins has 7.05 bits, a few huge channels
over a quiet rest have few. The authors binarize low layers (BiLLM); here they have 2 or 3 bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from quota_jax.errors import QuotaError
from quota_jax.quant.gptq import GptqOptions

HIGH_BITS = 4
_SPAN = 4.0


@dataclass(frozen=True, kw_only=True, slots=True)
class LuqOptions:
    """mean_bits: at most so many on average over the decoder's layers. low_bits: those of layers
    with little entropy, 2 or 3; the others have 4. All layers are rounded by GPTQ."""

    mean_bits: float = 3.0
    low_bits: int = 2
    bins: int = 256
    gptq: GptqOptions = field(default_factory=GptqOptions)

    def __post_init__(self):
        if self.low_bits not in (2, 3):
            raise QuotaError(f"low_bits must be 2 or 3, got {self.low_bits}")
        if not self.low_bits <= self.mean_bits <= HIGH_BITS:
            raise QuotaError(
                f"mean_bits must lie between low_bits ({self.low_bits}) and {HIGH_BITS}, got "
                f"{self.mean_bits}"
            )
        if self.bins < 2:
            raise QuotaError(f"bins must be at least 2, got {self.bins}")

    @property
    def batch_size(self) -> int:
        return self.gptq.batch_size

    @property
    def feed(self) -> str:
        return self.gptq.feed


def entropy(parts: Sequence[np.ndarray], bins: int = 256) -> float:
    """Entropy in bits of all values of ``parts`` together, standardized, in ``bins`` bins.

    0 for values that are all equal.

    Raises:
      QuotaError: there are no values, or some are not finite.
    """
    count = sum(part.size for part in parts)
    if not count:
        raise QuotaError("no values to take the entropy of")
    # Centered before they are squared: a large mean must not swallow a small spread.
    mean = sum(part.sum(dtype=np.float64) for part in parts) / count
    spread = sum(np.square(part - mean, dtype=np.float64).sum() for part in parts) / count
    if not math.isfinite(spread):
        raise QuotaError("the activations are not finite")
    if spread == 0:
        return 0.0
    counts = np.zeros(bins, np.int64)
    for part in parts:
        z = (part - mean) / math.sqrt(spread)
        place = np.floor((z + _SPAN) * (bins / (2 * _SPAN)))
        counts += np.bincount(np.clip(place, 0, bins - 1).astype(np.int64).ravel(), minlength=bins)
    share = counts[counts > 0] / count
    return float(-(share * np.log2(share)).sum())


def allocate(entropies: Sequence[float], mean_bits: float, low_bits: int) -> tuple[int, ...]:
    """Bits of each layer: as few layers as reach the mean get ``low_bits``, in order of ascending
    entropy (ties: the lower layer first)."""
    layers = len(entropies)
    # The guard keeps 3.2 of 10 layers at 4 or 2 from becoming 5 layers by the last digit of 0.8.
    low = math.ceil((HIGH_BITS - mean_bits) * layers / (HIGH_BITS - low_bits) - 1e-9)
    chosen = set(sorted(range(layers), key=lambda layer: entropies[layer])[:low])
    return tuple(low_bits if layer in chosen else HIGH_BITS for layer in range(layers))
