"""The figures of a table's rows, of the study's runs and of an earlier table."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quota_jax.errors import QuotaError
from quota_jax.evaluate.compare import Interval
from quota_jax.evaluate.summary import Summary, summarize
from quota_jax.evaluate.task import Scores
from quota_jax.reproduce.credits import encode_credits
from quota_jax.reproduce.earlier import Earlier
from quota_jax.reproduce.study import Row, Study
from quota_jax.reproduce.tables import Table


def as_run(study: Study, table: Table, earlier: Earlier | None = None) -> Table:
    """The rows and pairs that were run, here or for the earlier table; a note names the others.

    Raises:
      QuotaError: nothing was run here, or not what all rows are compared with.
    """
    here = {row.run_name for row in (*table.rows, table.baseline) if study.complete(row)}
    if not any(row.run_name in here for row in table.rows) or table.baseline.run_name not in here:
        raise QuotaError(f"{table.name}: no row was run, or not {table.baseline.label!r}")
    done = here | set(earlier.rows if earlier else ())
    rows = tuple(row for row in table.rows if row.run_name in done)
    unrun = [row.label for row in table.rows if row.run_name not in done]
    notes = table.notes
    if unrun:
        notes += (f"{len(unrun)} of {len(table.rows)} rows not run: {'; '.join(unrun)}",)
    pairs = tuple(pair for pair in table.pairs if {row.run_name for row in pair} <= done)
    return dataclasses.replace(table, rows=rows, pairs=pairs, notes=notes)


@dataclass(frozen=True, kw_only=True)
class _Source:
    """Where the scores of a table's rows are: in the study's runs, or in the earlier table."""

    study: Study
    earlier: Earlier | None
    baseline: Mapping[str, Scores]

    def here(self, row: Row) -> bool:
        """Whether the run is the study's."""
        return self.earlier is None or self.study.complete(row)

    def scores(self, row: Row) -> Mapping[str, Scores] | None:
        """None where an earlier row has no credits."""
        if self.here(row):
            return self.study.scores(row)
        assert self.earlier is not None
        return self.earlier.scores(row, self.baseline)

    def entry(
        self,
        row: Row,
        scores: Mapping[str, Scores],
        against: Mapping[str, Scores] | None = None,
        other: Row | None = None,
    ) -> dict[str, Any]:
        """The figures of a row, marked where it, or what it is compared with, is an earlier one."""
        name = None if other is None else other.label
        summary = summarize(row.label, scores, self.study.counts, against, name)
        old = not self.here(row) or (other is not None and not self.here(other))
        return {**_entry(row, summary), **({"earlier": True} if old else {})}


def _source(study: Study, table: Table, earlier: Earlier | None) -> _Source:
    return _Source(study=study, earlier=earlier, baseline=study.scores(table.baseline))


def collect(study: Study, table: Table, earlier: Earlier | None = None) -> list[dict[str, Any]]:
    """One entry for each row of a table that is `as_run`: label, facts, scores in the tasks' own
    units, mean retention and retention above chance of the row's run against the baseline's, as
    fractions with 95 % intervals, and credits (`credits`).

    Rows of an earlier table are marked; one without credits keeps the retention that it had.
    """
    source = _source(study, table, earlier)
    now = headlines(source.baseline)
    entries = []
    for row in table.rows:
        scores = source.scores(row)
        if scores is None:
            assert earlier is not None
            entries.append(earlier.entry(row, now))
            continue
        alone = row.run_name == table.baseline.run_name
        pair = (None, None) if alone else (source.baseline, table.baseline)
        entries.append({**source.entry(row, scores, *pair), "credits": encode_credits(scores)})
    return entries


def collect_pairs(
    study: Study, table: Table, earlier: Earlier | None = None
) -> tuple[list[dict[str, Any]], list[str]]:
    """Retention of rows against other rows than the table's baseline, and the names of pairs that
    are not to be had: a row without credits beside one that was run here, or never compared."""
    source = _source(study, table, earlier)
    entries, lost = [], []
    for row, other in table.pairs:
        ours, theirs = source.scores(row), source.scores(other)
        if ours is not None and theirs is not None:
            found = source.entry(row, ours, theirs, other)
            entries.append({"baseline": other.label, **found})
        elif (
            earlier is not None
            and not (source.here(row) or source.here(other))
            and (kept := earlier.pair(row, other))
        ):
            entries.append(kept)
        else:
            lost.append(f"{row.label} against {other.label}")
    return entries, lost


def headlines(scores: Mapping[str, Scores]) -> dict[str, float]:
    """The number of each task that stands in tables."""
    return {name: task.metrics[task.headline] for name, task in scores.items()}


def _entry(row: Row, summary: Summary) -> dict[str, Any]:
    def interval(found: Interval | None) -> dict[str, Any] | None:
        return None if found is None else dataclasses.asdict(found)

    return {
        "label": row.label,
        "run": row.run_name,
        "facts": dict(row.facts),
        "scores": {name: task.score.value for name, task in summary.tasks.items()},
        "questions": {name: task.instances for name, task in summary.tasks.items()},
        "retention": interval(summary.retention),
        "corrected": interval(summary.corrected),
    }
