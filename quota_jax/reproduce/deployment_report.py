"""Writes Table 7: scores, memory and power of each task, a column for each row of the study."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from quota_jax.reproduce.collect import as_run, collect
from quota_jax.reproduce.deployment import MIN_SECONDS, read_deployment
from quota_jax.reproduce.power import INTERVAL
from quota_jax.reproduce.report import store
from quota_jax.reproduce.study import Study
from quota_jax.reproduce.tables import Table

MISSING = "not measured"


def write_deployment(
    study: Study,
    table: Table,
    folder: Path,
    *,
    provenance: Mapping[str, Any],
    paper: Sequence[str] = (),
) -> tuple[Path, ...]:
    """Writes NAME.json and NAME.md of a table of measured rows into ``folder``."""
    table = as_run(study, table)
    entries = [
        {**entry, "deployment": read_deployment(study.folder(row))}
        for entry, row in zip(collect(study, table), table.rows, strict=True)
    ]
    return store(folder, table, provenance, entries, markdown(table, entries, provenance, paper))


def markdown(
    table: Table,
    entries: Sequence[Mapping[str, Any]],
    provenance: Mapping[str, Any],
    paper: Sequence[str] = (),
) -> str:
    """For readers: one table for each thing measured, tasks down and rows of the study across."""
    tasks = list(entries[0]["scores"])

    def part(title: str, cell: Callable[[Mapping[str, Any], str], str]) -> list[str]:
        rows = [[name, *(cell(entry, name) for entry in entries)] for name in tasks]
        return [f"## {title}", "", *_lines(["", *(e["label"] for e in entries)], rows), ""]

    def measured(entry: Mapping[str, Any], task: str, name: str) -> Any:
        return entry["deployment"]["tasks"][task][name]

    def figure(value: float | None, form: str, unit: float = 1.0) -> str:
        return MISSING if value is None else f"{value / unit:{form}}"

    first = entries[0]["deployment"]
    size = [
        [
            name,
            *(figure(entry["deployment"][key], ".4g", 1e6) for entry in entries),
        ]
        for name, key in (("files on disk", "file_bytes"), ("arrays", "array_bytes"))
    ]
    labels = [entry["label"] for entry in entries]
    lines = [
        f"# {table.title}",
        "",
        f"{first['devices']} x {first['device']}, batches of {first['batch_size']} a device; full "
        f"precision is {first['dtype']}.",
        "",
        "## Size, MB",
        "",
        *_lines(["", *labels], size),
        "",
        *part("Score", lambda entry, task: f"{entry['scores'][task]:.1f}"),
        *part(
            "Peak device memory, MB",
            lambda entry, task: figure(measured(entry, task, "peak_bytes"), ".1f", 1e6),
        ),
        *part(
            "Average device power, W",
            lambda entry, task: figure(measured(entry, task, "watts"), ".1f"),
        ),
        *part(
            "Questions a second",
            lambda entry, task: figure(measured(entry, task, "questions_per_second"), ".1f"),
        ),
        f"Peak memory: the largest of samples, {1000 * INTERVAL:g} ms apart, of the allocator's "
        "bytes in use: weights, cache, inputs and temporaries of this process, without what the "
        "driver takes. Power: of the whole device (NVML), also what others run there; energy over "
        f"time, tasks answered again until {MIN_SECONDS:g} s are full. Loading and compilation are "
        "outside; a last batch that is not full costs what a full one does. Where a device does "
        "not tell, it says so.",
        "",
        *(f"- {name}: {value}" for name, value in provenance.items()),
        *(f"- left out: {note}" for note in table.notes),
        *(["", *paper] if paper else []),
        "",
    ]
    return "\n".join(lines)


def _lines(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in (header, rule, *rows)]
