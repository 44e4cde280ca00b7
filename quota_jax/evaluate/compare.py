"""Two runs over the same questions: difference and retention with paired 95 % intervals.

Bootstrap over resampling units (questions, or groups of them that are scored as one): a unit is
drawn together with both runs' values, inside its stratum, so what makes a question hard for both
cancels out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from quota_jax.errors import QuotaError
from quota_jax.evaluate.task import Scores

RESAMPLES = 10_000
CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """A figure and the bounds of its percentile interval; None where some resamples have no such
    figure (a baseline at or below zero)."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """One task of a run beside the same task of its baseline.

    difference: score less baseline, exact, in the headline's unit. retention: score / baseline.
    corrected: (score - chance) / (baseline - chance), what is left of what the baseline does better
    than guessing. Both None where the baseline is not above zero, or not above chance.
    """

    score: float
    baseline: float
    chance: float
    difference: Interval
    retention: Interval | None
    corrected: Interval | None


@dataclass(frozen=True, kw_only=True)
class Resampled:
    """Headlines of one or two runs, and those of every resample ``[runs, resamples]``."""

    values: Float[np.ndarray, " runs"]
    draws: Float[np.ndarray, "runs resamples"]
    chance: float

    def interval(self, statistic: np.ndarray, value: float) -> Interval:
        """The percentile interval of one figure per resample."""
        tail = (1 - CONFIDENCE) / 2
        if np.isnan(statistic).any():
            return Interval(value=float(value), low=None, high=None)
        low, high = np.quantile(statistic, [tail, 1 - tail])
        return Interval(value=float(value), low=float(low), high=float(high))

    def score(self) -> Interval:
        """The first run's headline."""
        return self.interval(self.draws[0], self.values[0])

    def retention(self, chance: float) -> tuple[float, np.ndarray] | None:
        """Share of the second run's headline above ``chance`` that the first one has: the figure
        and that of each resample (NaN where it has none); None where the second run is not above
        chance."""
        (ours, base), (top, bottom) = self.values - chance, self.draws - chance
        if base <= 0:
            return None
        draws = np.full(bottom.shape, np.nan)
        return float(ours / base), np.divide(top, bottom, out=draws, where=bottom > 0)


def resample(
    runs: Sequence[Scores], name: str, *, resamples: int = RESAMPLES, seed: int = 0
) -> Resampled:
    """Stratified paired bootstrap of the headlines of one or two runs of the task ``name``.

    Equal names and seeds give equal draws; those of different tasks are independent.

    Raises:
        QuotaError: the runs do not have the same units.
    """
    keys = list(runs[0].units)
    for other in runs[1:]:
        if odd := sorted(set(keys) ^ set(other.units)):
            raise QuotaError(f"{name}: the runs differ in unit {odd[0]!r}")
    values = np.array([[run.units[key] for key in keys] for run in runs], np.float64)
    members: dict[str, list[int]] = {}
    for place, key in enumerate(keys):
        members.setdefault(runs[0].strata.get(key, ""), []).append(place)
    rng = np.random.default_rng([seed, *name.encode()])
    exact = np.zeros(len(runs))
    draws = np.zeros((len(runs), resamples))
    for stratum in sorted(members):
        own = values[:, members[stratum]]
        weight = runs[0].weights.get(stratum, 1.0)
        exact += weight * own.mean(1)
        draws += weight * _means(own, rng, resamples)
    return Resampled(values=exact, draws=draws, chance=runs[0].chance)


def _means(values: np.ndarray, rng: np.random.Generator, resamples: int) -> np.ndarray:
    """Means of resamples of the columns of [runs, units] -> [runs, resamples].

    Scores take few values, so what counts is how often each different column is drawn: a
    multinomial draw, the same distribution as drawing the units one by one.
    """
    columns, counts = np.unique(values, axis=1, return_counts=True)
    units = values.shape[1]
    drawn = rng.multinomial(units, counts / units, size=resamples)
    return columns @ drawn.T / units


def compare(both: Resampled) -> Comparison:
    """The figures of two resampled runs, the second one being the baseline."""
    ours, base = both.values
    plain, corrected = both.retention(0.0), both.retention(both.chance)
    return Comparison(
        score=float(ours),
        baseline=float(base),
        chance=both.chance,
        difference=both.interval(both.draws[0] - both.draws[1], ours - base),
        retention=both.interval(plain[1], plain[0]) if plain else None,
        corrected=both.interval(corrected[1], corrected[0]) if corrected else None,
    )


def mean_retention(tasks: Sequence[Resampled], *, chance: bool) -> Interval | None:
    """Mean over tasks of the retention, tasks drawn independently; None where one has none."""
    parts = [task.retention(task.chance if chance else 0.0) for task in tasks]
    known = [part for part in parts if part is not None]
    if not known or len(known) < len(parts):
        return None
    value = float(np.mean([part[0] for part in known]))
    return tasks[0].interval(np.mean([part[1] for part in known], axis=0), value)
