"""Means and breakdowns that several tasks report."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from quota_jax.evaluate.tasks.subset import grouped


def percent(values: Iterable[float]) -> float:
    """100 times the mean."""
    values = list(values)
    return 100 * sum(values) / len(values)


def percent_by(prefix: str, labels: Sequence[str], values: Sequence[float]) -> dict[str, float]:
    """``prefix/label`` -> percentage of the values with that label; empty labels are left out."""
    pairs = [pair for pair in zip(labels, values, strict=True) if pair[0]]
    groups = zip(dict(pairs), grouped(pairs), strict=True)
    return {f"{prefix}/{label}": percent(group) for label, group in groups}


def best_constant(credits: Iterable[dict[str, float]]) -> float:
    """The percentage that the best answer given to every question earns.

    credits: for each question, answer -> what it would earn, answers that earn nothing left out.
    """
    total: defaultdict[str, float] = defaultdict(float)
    questions = 0
    for credit in credits:
        questions += 1
        for answer, value in credit.items():
            total[answer] += value
    return 100 * max(total.values()) / questions
