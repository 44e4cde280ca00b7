"""Writes a table as JSON and as Markdown: scores, retention with intervals, further columns."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from quota_jax.checkpoint.format import encode_json, write_file
from quota_jax.errors import QuotaError
from quota_jax.reproduce.collect import as_run, collect, collect_pairs, headlines
from quota_jax.reproduce.credits import digest_questions
from quota_jax.reproduce.earlier import DIGEST, OWN, baseline_notes, read_earlier
from quota_jax.reproduce.study import Study
from quota_jax.reproduce.tables import Table


def for_card(
    table: Table, entries: Sequence[Mapping[str, Any]], provenance: Mapping[str, Any]
) -> dict[str, Any]:
    """The scores as a table of a model card (`testbed.learning.card`)."""
    told = ", ".join(f"{name} {value}" for name, value in provenance.items())
    if kept := _kept(entries):
        told += f". Measured earlier: {', '.join(kept)}"
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
    earlier: Path | None = None,
) -> tuple[Path, ...]:
    """Writes NAME.json and NAME.md into ``folder``, and NAME.card.json for a model card.

    provenance: command, machine, versions: stored, and told under the table. paper: Markdown lines
    with the paper's own figures. earlier: a NAME.json to go on from, which may be the one that is
    written: its rows that were not run in this study are kept and marked, and what it told of them
    is told too where ``provenance`` says otherwise.

    Raises:
      QuotaError: nothing was run; the earlier table does not fit (`earlier.read_earlier`,
        `Earlier.check_baseline`); or ``provenance`` has a name that the file needs itself.
    """
    if taken := set(provenance) & set(OWN):
        raise QuotaError(f"{table.name}: provenance cannot hold {sorted(taken)[0]!r}")
    then = None if earlier is None else read_earlier(earlier, study, table)
    table = as_run(study, table, then)
    now = headlines(study.scores(table.baseline))
    if then is not None:
        then.check_baseline(table.baseline.label, now)
    entries = collect(study, table, then)
    pairs, lost = collect_pairs(study, table, then)
    if lost:
        note = f"{len(lost)} pairs, of rows without credits: {'; '.join(lost)}"
        table = dataclasses.replace(table, notes=(*table.notes, note))
    told: dict[str, Any] = {DIGEST: digest_questions(study.questions), "pairs": pairs}
    if then is not None and _kept(entries):
        told["notes"] = baseline_notes(table.baseline.label, now, entries, then)
        told["earlier"] = then.told_beside(provenance)
    text = markdown(table, entries, provenance, paper, told)
    files = store(folder, table, {**provenance, **told}, entries, text)
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
    told: Mapping[str, Any] = MappingProxyType({}),
) -> str:
    """The table for readers. told: "pairs", "notes" and "earlier" as NAME.json has them."""
    tasks = list(entries[0]["scores"])
    facts = list(dict.fromkeys(name for entry in entries for name in entry["facts"]))
    header = ["", *facts, *tasks, "retention", "above chance"]
    lines = [f"# {table.title}", "", _line(header), _line(["---", *["---:"] * (len(header) - 1)])]
    for entry in entries:
        lines.append(
            _line(
                [
                    _label(entry),
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
        *_pairs(told.get("pairs", ())),
        *(["Rows with * were measured earlier.", ""] if _kept(entries) else []),
        *(f"- {name}: {value}" for name, value in provenance.items()),
        *(
            f"- of earlier rows, {name}: {value}"
            for part in told.get("earlier", ())
            for name, value in part.items()
        ),
        *(f"- {note}" for note in told.get("notes", ())),
        *(f"- left out: {note}" for note in table.notes),
        *(["", *paper] if paper else []),
        "",
    ]
    return "\n".join(lines)


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
        lines.append(_line([_label(pair), pair["baseline"], percent(pair["retention"])]))
    return [*lines, ""]


def percent(interval: Mapping[str, Any] | None) -> str:
    """`98.1 [97.2, 99.0]`, of fractions."""
    if interval is None:
        return ""
    value = f"{100 * interval['value']:.1f}"
    if interval["low"] is None or interval["high"] is None:
        return value
    return f"{value} [{100 * interval['low']:.1f}, {100 * interval['high']:.1f}]"


def _label(entry: Mapping[str, Any]) -> str:
    return f"{entry['label']} *" if "earlier" in entry else entry["label"]


def _kept(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Labels of rows that an earlier study measured."""
    return [entry["label"] for entry in entries if "earlier" in entry]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
