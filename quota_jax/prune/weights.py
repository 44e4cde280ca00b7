"""The weights of QUOTA's score (Eq. 8)."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from quota_jax.errors import QuotaError

METRICS = ("inter", "magnitude", "intra", "residual")
"""What the score is made of (Eq. 6 and 7), in the order in which it is added up."""


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
