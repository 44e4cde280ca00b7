"""Accuracy of a study beside speeds and memory of a bench file: which precisions and recipes are
worth their cost.

The two may be different models of one family: the small one answers questions, a preset at its real
shape with random weights is timed. Both are named wherever figures stand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quota_jax.checkpoint.format import encode_json, read_json, write_file
from quota_jax.config import PRESETS, ModelConfig
from quota_jax.errors import QuotaError
from quota_jax.figures.canvas import check_plots
from quota_jax.figures.pareto_plot import Mark, Panel, draw_pareto
from quota_jax.recipe import Recipe
from quota_jax.reproduce.collect import as_run, collect
from quota_jax.reproduce.report import percent
from quota_jax.reproduce.study import Derived, Row, Study
from quota_jax.reproduce.tables import Table

Key = tuple[str, float]
"""Precision and the fraction of the visual tokens that is left."""
FULL_PRECISION = "bf16"
"""What ``quota-jax bench`` calls a model that is not quantized."""
PANELS = (
    Panel(title="Time to first token", unit="ms", better="lower"),
    Panel(title="Decoding", unit="tokens/s", better="higher"),
    Panel(title="Weights and KV cache", unit="GB", better="lower"),
)
SCORE = "retention, %"


@dataclass(frozen=True, kw_only=True)
class BenchFile:
    """What ``quota-jax bench --json`` has written. costs: by batch size and key, one value for each
    of PANELS."""

    preset: str
    method: str
    device: str
    jax: str
    costs: Mapping[int, Mapping[Key, tuple[float, ...]]]


def read_bench(path: Path, config: ModelConfig) -> BenchFile:
    """A bench file of a preset of this model family.

    Raises:
      QuotaError: no such file, it is of another kind, or of the other family.
    """
    content = read_json(path)
    costs: dict[int, dict[Key, tuple[float, ...]]] = {}
    try:
        preset = str(content["preset"])
        for each in content["results"]:
            held = each["weight_bytes"] + each["cache_bytes"]
            costs.setdefault(int(each["batch_size"]), {})[each["label"], _share(each["keep"])] = (
                1000 * each["first_token"],
                each["batch_size"] / each["decode_step"],
                held / 1e9,
            )
        found = BenchFile(
            preset=preset,
            method=str(content["method"]),
            device=str(content["device"]),
            jax=str(content["jax"]),
            costs=costs,
        )
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise QuotaError(
            f"{path}: not written by quota-jax bench --json ({type(error).__name__}: {error})"
        ) from None
    if preset not in PRESETS:
        raise QuotaError(f"{path}: no preset {preset!r}; known: {', '.join(sorted(PRESETS))}")
    family = PRESETS[preset].model_type
    if family != config.model_type:
        raise QuotaError(f"{path} is of {preset}, a {family}: the study is of {config.model_type}")
    return found


def key_of(row: Row) -> Key:
    """Precision and final keep ratio of a row whose recipe does not stand in its checkpoint."""
    keep = 1.0
    if isinstance(row.recipe, Derived):
        keep = row.recipe.keep
    elif isinstance(row.recipe, Recipe) and row.recipe.stages:
        keep = row.recipe.stages[-1].keep
    return row.weights.bits if row.weights else FULL_PRECISION, _share(keep)


def write_pareto(
    study: Study,
    table: Table,
    bench: BenchFile,
    folder: Path,
    *,
    provenance: Mapping[str, Any],
) -> tuple[Path, ...]:
    """Writes NAME.json, NAME.md and NAME.png into ``folder``.

    Rows that differ only in their seed are one mark: the mean of their retentions, with the
    outermost ends of their intervals. A batch size of one mark has no front, and is drawn only
    where there is no other.

    Raises:
      QuotaError: the bench file has none of the table's precisions and recipes.
    """
    check_plots()
    table = as_run(study, table)
    entries = collect(study, table)
    scores = _scores(table.rows, entries)
    lines = {size: _marks(scores, costs) for size, costs in bench.costs.items()}
    lines = {size: marks for size, marks in sorted(lines.items()) if marks}
    if not lines:
        asked = ", ".join(_name(key) for key in scores)
        raise QuotaError(f"the bench file has none of {asked}")
    origin = Path(str(study.reference.provenance.get("source", study.source))).name
    accuracy = (
        f"{origin} ({study.reference.config.model_type}, stored in {study.reference.dtype.name}), "
        f"tasks {', '.join(study.tasks)}"
    )
    speed = (
        f"{bench.preset} with random weights, quantized as {bench.method} does, on {bench.device}, "
        f"jax {bench.jax}"
    )
    named = {"accuracy of": accuracy, "speed and memory of": speed}
    known = {key for costs in bench.costs.values() for key in costs}
    missing = [_name(key) for key in scores if key not in known]
    missing = [f"{name}: not in the bench file" for name in missing]
    missing += [f"{_name(key)}: no accuracy" for key in sorted(known - set(scores))]

    drawn = {size: marks for size, marks in lines.items() if len(marks) > 1} or lines
    folder.mkdir(parents=True, exist_ok=True)
    files = tuple(folder / f"{table.name}.{ending}" for ending in ("json", "md", "png"))
    content = {
        "table": table.name,
        "title": table.title,
        **provenance,
        **named,
        "left out": [*table.notes, *missing],
        "points": [_point(size, mark) for size, marks in lines.items() for mark in marks],
        "rows": entries,
    }
    write_file(files[0], encode_json(content, str(files[0])))
    write_file(files[1], markdown(table, lines, {**named, **provenance}, missing).encode())
    draw_pareto(
        [(f"batch {size}", marks) for size, marks in drawn.items()],
        PANELS,
        files[2],
        score=SCORE,
        title=f"Accuracy: {accuracy}. Speed and memory: {speed}.",
    )
    return files


def markdown(
    table: Table,
    lines: Mapping[int, Sequence[Mark]],
    provenance: Mapping[str, Any],
    missing: Sequence[str] = (),
) -> str:
    """A line for each batch size, precision and recipe; on the front of a cost it is bold."""
    header = ["batch", "precision", "tokens kept", "retention"]
    header += [f"{panel.title}, {panel.unit}" for panel in PANELS]
    rows = []
    for size, marks in lines.items():
        for mark in marks:
            ends = {"value": mark.score / 100, "low": mark.low / 100, "high": mark.high / 100}
            costs = [f"{cost:.4g}" for cost in mark.costs]
            costs = [f"**{c}**" if on else c for c, on in zip(costs, mark.front, strict=True)]
            rows.append([str(size), mark.precision, mark.kept, percent(ends), *costs])
    rule = ["---:", "---", *["---:"] * (len(header) - 2)]
    return "\n".join(
        [
            f"# {table.title}",
            "",
            *(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows)),
            "",
            "Retention: mean over the tasks of score / score in full precision with all tokens, "
            "with paired 95 % intervals; over several seeds their mean and the outermost ends. "
            "Bold: on the front, no other line of the batch size is at least as good in retention "
            "and in this cost, and better in one.",
            "",
            *(f"- {name}: {value}" for name, value in provenance.items()),
            *(f"- left out: {note}" for note in (*table.notes, *missing)),
            "",
        ]
    )


def _scores(
    rows: Sequence[Row], entries: Sequence[Mapping[str, Any]]
) -> dict[Key, tuple[float, float, float]]:
    """Retention in percent, and the ends of its interval."""
    found: dict[Key, list[Mapping[str, Any]]] = {}
    for row, entry in zip(rows, entries, strict=True):
        whole = {"value": 1.0, "low": 1.0, "high": 1.0}  # the baseline itself
        found.setdefault(key_of(row), []).append(entry["retention"] or whole)
    scores = {}
    for key, parts in found.items():
        lows = [p["value"] if p["low"] is None else p["low"] for p in parts]
        highs = [p["value"] if p["high"] is None else p["high"] for p in parts]
        mean = sum(part["value"] for part in parts) / len(parts)
        scores[key] = (100 * mean, 100 * min(lows), 100 * max(highs))
    return scores


def _marks(
    scores: Mapping[Key, tuple[float, float, float]], costs: Mapping[Key, tuple[float, ...]]
) -> list[Mark]:
    """What both sides have, in the order of the table."""
    both = [key for key in scores if key in costs]

    def on_front(key: Key, place: int) -> bool:
        sign = 1 if PANELS[place].better == "lower" else -1
        own = (sign * costs[key][place], -scores[key][0])
        others = [(sign * costs[o][place], -scores[o][0]) for o in both if o != key]
        return not any(o[0] <= own[0] and o[1] <= own[1] and o != own for o in others)

    return [
        Mark(
            precision=key[0],
            kept=_percentage(key[1]),
            costs=costs[key],
            score=scores[key][0],
            low=scores[key][1],
            high=scores[key][2],
            front=tuple(on_front(key, place) for place in range(len(PANELS))),
        )
        for key in both
    ]


def _point(size: int, mark: Mark) -> dict[str, Any]:
    costs = {
        f"{panel.title}, {panel.unit}": cost for panel, cost in zip(PANELS, mark.costs, strict=True)
    }
    return {
        "batch_size": size,
        "precision": mark.precision,
        "kept": mark.kept,
        "retention": [mark.score, mark.low, mark.high],
        "costs": costs,
        "on_front": dict(zip(costs, mark.front, strict=True)),
    }


def _share(keep: float) -> float:
    return round(float(keep), 6)


def _percentage(keep: float) -> str:
    return f"{100 * keep:g} %"


def _name(key: Key) -> str:
    return f"{key[0]} {_percentage(key[1])}"
