"""The paired bootstrap against one that draws unit by unit, and what the tables say."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from quota_jax.errors import QuotaError
from quota_jax.evaluate.compare import Interval, compare, resample
from quota_jax.evaluate.summary import summarize
from quota_jax.evaluate.task import Scores

STRATA = {"a": 40, "b": 90, "c": 7}
WEIGHTS = {"a": 100.0, "b": 100.0, "c": 50.0}


def scores(values: np.ndarray, chance: float = 60.0, **changes) -> Scores:
    names = [stratum for stratum, count in STRATA.items() for _ in range(count)]
    fields: dict[str, Any] = {
        "headline": "sum",
        "metrics": {"sum": 1.5, "other": 2.0},
        "units": {f"q{place}": float(value) for place, value in enumerate(values)},
        "chance": chance,
        "strata": {f"q{place}": name for place, name in enumerate(names)},
        "weights": WEIGHTS,
    }
    return Scores(**{**fields, **changes})


def draw(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Values 0, .5 or 1 of two runs that mostly agree."""
    rng = np.random.default_rng(seed)
    base = rng.choice([0.0, 0.5, 1.0], 137, p=[0.2, 0.2, 0.6])
    return np.where(rng.random(137) < 0.15, rng.choice([0.0, 1.0], 137), base), base


def headline(values: np.ndarray) -> float:
    ends = np.cumsum([0, *STRATA.values()])
    return sum(
        WEIGHTS[name] * values[start:end].mean()
        for name, (start, end) in zip(STRATA, pairwise(ends), strict=True)
    )


def test_intervals_equal_those_of_drawing_units_one_by_one():
    ours, base = draw(0)
    both = resample([scores(ours), scores(base)], "task", resamples=20_000)
    result = compare(both)
    assert result.score == pytest.approx(headline(ours))
    assert result.baseline == pytest.approx(headline(base))
    assert result.difference.value == pytest.approx(headline(ours) - headline(base))

    rng = np.random.default_rng(1)
    ends = np.cumsum([0, *STRATA.values()])
    figures = []
    for _ in range(4000):
        places = np.concatenate([rng.integers(a, b, b - a) for a, b in pairwise(ends)])
        top, bottom = headline(ours[places]), headline(base[places])
        figures.append((top - bottom, top / bottom, (top - 60) / (bottom - 60)))
    slow = np.quantile(figures, [0.025, 0.975], axis=0)
    found = [result.difference, result.retention, result.corrected]
    for interval, (low, high) in zip(found, slow.T, strict=True):
        assert interval is not None
        # Quantiles of 4000 draws are exact to some 3 % of the interval's width.
        assert interval.low == pytest.approx(low, abs=0.06 * (high - low))
        assert interval.high == pytest.approx(high, abs=0.06 * (high - low))
    # Pairing matters: unpaired, the interval of the difference is much wider.
    unpaired = np.std(both.draws[0]) ** 2 + np.std(both.draws[1]) ** 2
    assert np.std(both.draws[0] - both.draws[1]) ** 2 < 0.6 * unpaired


def test_equal_seeds_give_equal_draws_and_tasks_differ():
    ours, base = draw(2)
    pair = [scores(ours), scores(base)]
    first, again, other = (resample(pair, name, resamples=50) for name in ("x", "x", "y"))
    np.testing.assert_array_equal(first.draws, again.draws)
    assert (first.draws != other.draws).any()
    reordered = scores(base, units=dict(list(scores(base).units.items())[::-1]))
    swapped = resample([pair[0], reordered], "x", resamples=50)
    np.testing.assert_array_equal(first.draws, swapped.draws)


def test_a_run_against_itself_and_against_a_guesser():
    ours, base = draw(3)
    same = compare(resample([scores(base), scores(base)], "x"))
    assert same.difference == Interval(value=0.0, low=0.0, high=0.0)
    assert same.retention == same.corrected == Interval(value=1.0, low=1.0, high=1.0)
    # Below chance there is nothing to retain; near it, not in every resample.
    below = compare(resample([scores(ours, 240.0), scores(base, 240.0)], "x"))
    assert below.corrected is None
    close = [scores(each, headline(base) - 0.1) for each in (ours, base)]
    corrected = compare(resample(close, "x")).corrected
    assert corrected is not None
    assert (corrected.low, corrected.high) == (None, None)
    with pytest.raises(QuotaError, match="x: the runs differ in unit 'q136'"):
        resample([scores(ours), scores(base[:-1])], "x")


def test_the_summary_holds_both_retentions_and_their_means():
    runs = {name: draw(seed) for name, seed in (("one", 4), ("two", 5))}
    ours = {name: scores(pair[0]) for name, pair in runs.items()}
    base = {name: scores(pair[1]) for name, pair in runs.items()}
    counts = {"one": 137, "two": 137}
    summary = summarize("pruned", ours, counts, base, "full")
    plain = [headline(pair[0]) / headline(pair[1]) for pair in runs.values()]
    above = [(headline(pair[0]) - 60) / (headline(pair[1]) - 60) for pair in runs.values()]
    content = summary.to_json()
    assert content["mean_retention"]["value"] == pytest.approx(np.mean(plain))
    assert content["mean_corrected_retention"]["value"] == pytest.approx(np.mean(above))
    assert content["tasks"]["one"]["comparison"]["retention"]["value"] == pytest.approx(plain[0])
    text = summary.to_markdown()
    rows = [line for line in text.splitlines() if line.startswith("| one")]
    assert f"{headline(runs['one'][1]):.2f}" in rows[0]
    assert f"{100 * above[0]:.1f} % [" in rows[0]
    assert {line.count("|") for line in text.splitlines() if line.startswith("| ")} == {9, 4}
    alone = summarize("full", base, counts)
    assert "baseline" not in alone.to_markdown()
    assert "comparison" not in alone.to_json()["tasks"]["one"]
