"""A table that was written before, to go on from where its runs are gone.

A row of it is the table's row of equal ``run`` (`Row.run_name`), which tells weights, recipe and
seed; label and facts are those that the table has now. How weights were calibrated (samples, steps)
is not part of the name: that both studies do it alike is left to the caller.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quota_jax.checkpoint.format import read_json
from quota_jax.errors import QuotaError
from quota_jax.evaluate.task import Scores
from quota_jax.reproduce.credits import decode_credits, digest_questions
from quota_jax.reproduce.study import Row, Study
from quota_jax.reproduce.tables import Table

TOLERANCE = 0.02
"""Share of its value by which a score of the baseline may differ between the days: an answer or two
differ on another device or with other versions, more is another model or other questions."""
THEN = "baseline scores"
"""In a kept row: the scores that its retention is against, where the baseline's are others now."""
DIGEST = "questions digest"
OWN = ("table", "title", "pairs", "rows", "left out", "notes", "earlier", DIGEST)
"""What a table's file holds besides the provenance that was told with it."""


@dataclass(frozen=True, kw_only=True)
class Earlier:
    """rows: by run. pairs: by both runs. baseline: its scores. told: what stood under the table,
    the newest measurement first."""

    file: Path
    rows: Mapping[str, Mapping[str, Any]]
    pairs: Mapping[tuple[str, str], Mapping[str, Any]]
    baseline: Mapping[str, float]
    told: Sequence[Mapping[str, Any]]

    def scores(self, row: Row, like: Mapping[str, Scores]) -> dict[str, Scores] | None:
        """Scores of a row from its credits (`decode_credits`); None where it has none."""
        entry = self.rows[row.run_name]
        if "credits" not in entry:
            return None
        where = f"{self.file}: {entry['label']!r}"
        return decode_credits(entry["credits"], entry["scores"], like, where)

    def entry(self, row: Row, baseline: Mapping[str, float]) -> dict[str, Any]:
        """A row as it is, marked; ``baseline``: the scores now."""
        entry: dict[str, Any] = {
            **self.rows[row.run_name],
            "label": row.label,
            "facts": dict(row.facts),
        }
        entry["earlier"] = True
        then: Mapping[str, float] = entry.pop(THEN, self.baseline)
        if _differing(baseline, then):
            entry[THEN] = then
        return entry

    def pair(self, row: Row, other: Row) -> dict[str, Any] | None:
        """A pair as it is, marked, if it was compared."""
        found = self.pairs.get((row.run_name, other.run_name))
        if found is None:
            return None
        labels = {"baseline": other.label, "label": row.label, "facts": dict(row.facts)}
        return {**found, **labels, "earlier": True}

    def check_baseline(self, label: str, baseline: Mapping[str, float]) -> None:
        """Refuses to go on with another baseline than all rows were compared with.

        Raises:
          QuotaError: a score of it differs by more than `TOLERANCE`.
        """
        for then in (self.baseline, *(row[THEN] for row in self.rows.values() if THEN in row)):
            for name, value in baseline.items():
                if abs(value - then[name]) > TOLERANCE * abs(then[name]):
                    raise QuotaError(
                        f"{self.file}: {label!r} had {then[name]:.2f} in {name} and has "
                        f"{value:.2f} now, more than {100 * TOLERANCE:g} % apart"
                    )

    def told_beside(self, provenance: Mapping[str, Any]) -> list[dict[str, Any]]:
        """What was told of kept rows, without what holds for new ones too."""
        parts = [
            {name: value for name, value in part.items() if provenance.get(name) != value}
            for part in self.told
        ]
        return [part for part in parts if part]


def read_earlier(file: Path, study: Study, table: Table) -> Earlier:
    """The table in ``file``, which `report.write_table` wrote.

    Raises:
      QuotaError: it is another table or of other questions, it lacks what all rows are compared
        with, or it has rows that ``table`` has not.
    """
    content = read_json(file)
    try:
        found = _read(file, content, table)
        counts = {entry["label"]: entry["questions"] for entry in found.rows.values()}
        labels = {run: entry["label"] for run, entry in found.rows.items()}
        _ = [entry["scores"][name] for entry in found.rows.values() for name in entry["questions"]]
        digests = dict(content.get(DIGEST, {}))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise QuotaError(f"{file}: no table of a study: {error!r}") from None
    for label, there in counts.items():
        for name in dict.fromkeys([*study.counts, *there]):
            asked, before = study.counts.get(name, 0), there.get(name, 0)
            if asked != before:
                raise QuotaError(
                    f"{file}: {label!r} answers {before} questions of {name}, this study {asked}"
                )
    for name, digest in digest_questions(study.questions).items() if digests else ():
        if digests.get(name) != digest:
            raise QuotaError(f"{file}: other questions of {name} than this study's")
    known = {row.run_name for row in (*table.rows, table.baseline)}
    if strange := [label for run, label in labels.items() if run not in known]:
        raise QuotaError(
            f"{file}: {len(strange)} rows are none of this table, first {strange[0]!r}; are seeds "
            "and visual tokens the same?"
        )
    return found


def _read(file: Path, content: Mapping[str, Any], table: Table) -> Earlier:
    if content["table"] != table.name:
        raise QuotaError(f"{file}: is table {content['table']!r}, not {table.name!r}")
    rows: dict[str, Mapping[str, Any]] = {}
    for entry in content["rows"]:  # rows of one run have one score
        rows.setdefault(entry["run"], entry)
    if table.baseline.run_name not in rows:
        raise QuotaError(
            f"{file}: lacks {table.baseline.label!r}, which all rows are compared with"
        )
    runs = {entry["label"]: entry["run"] for entry in content["rows"]}
    return Earlier(
        file=file,
        rows=rows,
        pairs={(pair["run"], runs[pair["baseline"]]): pair for pair in content.get("pairs", [])},
        baseline=rows[table.baseline.run_name]["scores"],
        told=[told_in(content), *content.get("earlier", [])],
    )


def told_in(content: Mapping[str, Any]) -> dict[str, Any]:
    """The provenance in a table's file."""
    return {name: value for name, value in content.items() if name not in OWN}


def rows_to_run(table: Table, earlier: Earlier | None) -> list[Row]:
    """The rows that the earlier table lacks, and the one that all are compared with."""
    if earlier is None:
        return list(table.rows)
    runs = set(earlier.rows) - {table.baseline.run_name}
    return [row for row in table.rows if row.run_name not in runs]


def baseline_notes(
    label: str, baseline: Mapping[str, float], entries: Sequence[Mapping[str, Any]], then: Earlier
) -> list[str]:
    """What to tell of kept rows where the baseline's scores are others now."""
    notes = []
    days = [then.baseline, *(entry[THEN] for entry in entries if THEN in entry)]
    for day in (day for place, day in enumerate(days) if day not in days[:place]):
        if differing := _differing(baseline, day):
            both = ", ".join(f"{name} {baseline[name]:.2f} ({day[name]:.2f})" for name in differing)
            note = f"scores of {label}, in brackets an earlier measurement's: {both}"
            if against := sum(entry.get(THEN) == day for entry in entries):
                note += f"; retention of {against} rows with * is against the earlier ones"
            notes.append(note)
    return notes


def _differing(scores: Mapping[str, float], others: Mapping[str, float]) -> list[str]:
    """Tasks whose scores are not equal up to rounding."""
    return [name for name in scores if not math.isclose(scores[name], others[name], rel_tol=1e-9)]
