"""Writes a table as JSON and as Markdown: scores, retention with intervals, further columns."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quota_jax.checkpoint.format import encode_json, write_file
from quota_jax.errors import QuotaError
from quota_jax.evaluate.compare import Interval
from quota_jax.evaluate.summary import Summary
from quota_jax.reproduce.study import Row, Study
from quota_jax.reproduce.tables import Table


def as_run(study: Study, table: Table) -> Table:
    """The rows and pairs that were run; a note names the others.

    Raises:
      QuotaError: nothing was run, or not what all rows are compared with.
    """
    done = {row.run_name for row in (*table.rows, table.baseline) if study.complete(row)}
    rows = tuple(row for row in table.rows if row.run_name in done)
    if not rows or table.baseline.run_name not in done:
        raise QuotaError(f"{table.name}: no row was run, or not {table.baseline.label!r}")
    unrun = [row.label for row in table.rows if row.run_name not in done]
    notes = table.notes
    if unrun:
        notes += (f"{len(unrun)} of {len(table.rows)} rows not run: {'; '.join(unrun)}",)
    pairs = tuple(pair for pair in table.pairs if {row.run_name for row in pair} <= done)
    return dataclasses.replace(table, rows=rows, pairs=pairs, notes=notes)


def collect(study: Study, table: Table) -> list[dict[str, Any]]:
    """One entry for each row: label, facts, scores in the tasks' own units, mean retention and
    retention above chance of the row's run against the baseline's, as fractions with 95 %
    intervals."""
    entries = []
    for row in table.rows:
        baseline = None if row.run_name == table.baseline.run_name else table.baseline
        summary = study.summary(row, baseline)
        entries.append(_entry(row, summary))
    return entries


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


def for_card(
    table: Table, entries: Sequence[Mapping[str, Any]], provenance: Mapping[str, Any]
) -> dict[str, Any]:
    """The scores as a table of a model card (`testbed.learning.card`)."""
    told = ", ".join(f"{name} {value}" for name, value in provenance.items())
    counts = ", ".join(f"{name} {count}" for name, count in entries[0]["questions"].items())
    return {
        "title": table.title,
        "text": f"Headline of each benchmark (MME: points). Questions: {counts}. {told}.",
        "columns": list(entries[0]["scores"]),
        "rows": {entry["label"]: entry["scores"] for entry in entries},
    }


def write_table(
    study: Study,
    table: Table,
    folder: Path,
    *,
    provenance: Mapping[str, Any],
    paper: Sequence[str] = (),
) -> tuple[Path, ...]:
    """Writes NAME.json and NAME.md into ``folder``, and NAME.card.json for a model card.

    provenance: command, machine, versions: stored, and told under the table. paper: Markdown lines
    with the paper's own figures.
    """
    table = as_run(study, table)
    entries, pairs = collect(study, table), collect_pairs(study, table)
    text = markdown(table, entries, provenance, paper, pairs)
    files = store(folder, table, {**provenance, "pairs": pairs}, entries, text)
    card = folder / f"{table.name}.card.json"
    write_file(card, encode_json(for_card(table, entries, provenance), str(card)))
    return (*files, card)


def store(
    folder: Path,
    table: Table,
    told: Mapping[str, Any],
    entries: Sequence[Mapping[str, Any]],
    text: str,
) -> tuple[Path, Path]:
    """Writes NAME.json (what is ``told``, a row for each entry, notes) and NAME.md (``text``)."""
    content = {"table": table.name, "title": table.title, **told, "rows": list(entries)}
    content["left out"] = list(table.notes)
    folder.mkdir(parents=True, exist_ok=True)
    data, page = (folder / f"{table.name}.{ending}" for ending in ("json", "md"))
    write_file(data, encode_json(content, str(data)))
    write_file(page, text.encode())
    return data, page


def markdown(
    table: Table,
    entries: Sequence[Mapping[str, Any]],
    provenance: Mapping[str, Any],
    paper: Sequence[str] = (),
    pairs: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The table for readers."""
    tasks = list(entries[0]["scores"])
    facts = list(dict.fromkeys(name for entry in entries for name in entry["facts"]))
    header = ["", *facts, *tasks, "retention", "above chance"]
    lines = [f"# {table.title}", "", _line(header), _line(["---", *["---:"] * (len(header) - 1)])]
    for entry in entries:
        lines.append(
            _line(
                [
                    entry["label"],
                    *(entry["facts"].get(name, "") for name in facts),
                    *(f"{entry['scores'][name]:.1f}" for name in tasks),
                    percent(entry["retention"]),
                    percent(entry["corrected"]),
                ]
            )
        )
    counts = ", ".join(f"{name} {count}" for name, count in entries[0]["questions"].items())
    lines += [
        "",
        f"Retention: mean over the tasks of score / score of {table.baseline.label}; above chance: "
        "of (score - chance) / (baseline - chance). In brackets: paired 95 % intervals, bootstrap "
        f"over questions. Questions: {counts}.",
        "",
        *_means(entries),
        *_pairs(pairs),
        *(f"- {name}: {value}" for name, value in provenance.items()),
        *(f"- left out: {note}" for note in table.notes),
        *(["", *paper] if paper else []),
        "",
    ]
    return "\n".join(lines)


def collect_pairs(study: Study, table: Table) -> list[dict[str, Any]]:
    """Retention of rows against other rows than the table's baseline."""
    return [
        {"baseline": other.label, **_entry(row, study.summary(row, other))}
        for row, other in table.pairs
    ]


SEED = re.compile(r" \(seed \d+\)$")


def _means(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Mean and range of the retention of rows that differ in their seed only, as Markdown."""
    groups: dict[str, list[float]] = {}
    for entry in entries:
        if SEED.search(entry["label"]) and entry["retention"] is not None:
            name = SEED.sub("", entry["label"])
            groups.setdefault(name, []).append(100 * entry["retention"]["value"])
    if not groups:
        return []
    lines = ["## Retention over calibration seeds", ""]
    lines += [_line(["", "seeds", "mean", "lowest", "highest"]), _line(["---", *["---:"] * 4])]
    for name, values in groups.items():
        cells = (sum(values) / len(values), min(values), max(values))
        lines.append(_line([name, str(len(values)), *(f"{value:.1f}" for value in cells)]))
    return [*lines, ""]


def _pairs(pairs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Rows against each other, as Markdown."""
    if not pairs:
        return []
    lines = ["## In pairs", "", _line(["", "against", "retention"]), _line(["---", "---", "---:"])]
    for pair in pairs:
        lines.append(_line([pair["label"], pair["baseline"], percent(pair["retention"])]))
    return [*lines, ""]


def percent(interval: Mapping[str, Any] | None) -> str:
    """`98.1 [97.2, 99.0]`, of fractions."""
    if interval is None:
        return ""
    value = f"{100 * interval['value']:.1f}"
    if interval["low"] is None or interval["high"] is None:
        return value
    return f"{value} [{100 * interval['low']:.1f}, {100 * interval['high']:.1f}]"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
