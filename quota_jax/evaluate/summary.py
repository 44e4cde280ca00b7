"""What a run found: per task and over all tasks, as JSON and as Markdown tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quota_jax.checkpoint.format import encode_json, write_file
from quota_jax.evaluate.compare import (
    CONFIDENCE,
    RESAMPLES,
    Comparison,
    Interval,
    Resampled,
    compare,
    mean_retention,
    resample,
)
from quota_jax.evaluate.task import Scores

SUMMARY_JSON, SUMMARY_MARKDOWN = "summary.json", "summary.md"


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskSummary:
    """One task of a run. score: the headline; comparison: None without a baseline."""

    scores: Scores
    instances: int
    score: Interval
    comparison: Comparison | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """All tasks of a run. retention, corrected: means over the tasks, see `Comparison`."""

    name: str
    baseline: str | None
    tasks: Mapping[str, TaskSummary]
    retention: Interval | None = None
    corrected: Interval | None = None

    def to_json(self) -> dict[str, Any]:
        tasks = {}
        for name, task in self.tasks.items():
            entry: dict[str, Any] = {
                "headline": task.scores.headline,
                "score": dataclasses.asdict(task.score),
                "chance": task.scores.chance,
                "instances": task.instances,
                "units": len(task.scores.units),
                "metrics": dict(task.scores.metrics),
            }
            if task.comparison:
                entry["comparison"] = dataclasses.asdict(task.comparison)
            tasks[name] = entry
        content: dict[str, Any] = {
            "run": self.name,
            "baseline": self.baseline,
            "interval": {"confidence": CONFIDENCE, "method": "percentile", "resamples": RESAMPLES},
            "tasks": tasks,
        }
        for name, interval in self._means().items():
            content[name] = dataclasses.asdict(interval) if interval else None
        return content

    def _means(self) -> dict[str, Interval | None]:
        if self.baseline is None:
            return {}
        return {"mean_retention": self.retention, "mean_corrected_retention": self.corrected}

    def to_markdown(self) -> str:
        """A table of headlines, with the baseline where there is one, and one of all metrics."""
        against = f", baseline {self.baseline}" if self.baseline else ""
        header = ["task", "metric", "questions", "score"]
        if self.baseline:
            header += ["baseline", "difference", "retention", "above chance"]
        rows = []
        for name, task in self.tasks.items():
            row = [name, task.scores.headline, str(task.instances), _figure(task.score)]
            if pair := task.comparison:
                row += [
                    f"{pair.baseline:.2f}",
                    _figure(pair.difference, sign=True),
                    _percent(pair.retention),
                    _percent(pair.corrected),
                ]
            rows.append(row)
        if self.baseline:
            mean = [_percent(self.retention), _percent(self.corrected)]
            rows.append(["mean", "", "", "", "", "", *mean])
        lines = [f"# {self.name}{against}", "", *_table(header, rows, left=2), ""]
        lines.append("In brackets: 95 % intervals, bootstrap over questions.")
        if self.baseline:
            lines.append(
                "Differences and retention are paired; retention is score / baseline, above chance "
                "(score - chance) / (baseline - chance)."
            )
        metrics = [
            [name, metric, f"{value:.4f}".rstrip("0").rstrip(".")]
            for name, task in self.tasks.items()
            for metric, value in task.scores.metrics.items()
        ]
        lines += ["", *_table(["task", "metric", "value"], metrics, left=2), ""]
        return "\n".join(lines)

    def write(self, folder: Path) -> None:
        """Writes summary.json and summary.md."""
        write_file(folder / SUMMARY_JSON, encode_json(self.to_json(), str(folder / SUMMARY_JSON)))
        write_file(folder / SUMMARY_MARKDOWN, self.to_markdown().encode())


def summarize(
    name: str,
    scores: Mapping[str, Scores],
    instances: Mapping[str, int],
    baseline: Mapping[str, Scores] | None = None,
    baseline_name: str | None = None,
) -> Summary:
    """Resamples every task, alone or paired with the same task of the baseline."""
    tasks, paired = {}, []
    for task, own in scores.items():
        both = resample([own] if baseline is None else [own, baseline[task]], task)
        tasks[task] = TaskSummary(
            scores=own,
            instances=instances[task],
            score=both.score(),
            comparison=None if baseline is None else compare(both),
        )
        paired.append(both)
    return Summary(
        name=name,
        baseline=baseline_name,
        tasks=tasks,
        **({} if baseline is None else _mean_retentions(paired)),
    )


def _mean_retentions(tasks: Sequence[Resampled]) -> dict[str, Interval | None]:
    return {
        "retention": mean_retention(tasks, chance=False),
        "corrected": mean_retention(tasks, chance=True),
    }


def _figure(interval: Interval, *, sign: bool = False) -> str:
    form = "+.2f" if sign else ".2f"
    if interval.low is None or interval.high is None:
        return f"{interval.value:{form}}"
    return f"{interval.value:{form}} [{interval.low:{form}}, {interval.high:{form}}]"


def _percent(interval: Interval | None) -> str:
    if interval is None:
        return "-"
    value = f"{100 * interval.value:.1f} %"
    if interval.low is None or interval.high is None:
        return value
    return f"{value} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int) -> list[str]:
    """Markdown lines, padded so that they are readable as they are."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.ljust(width) if place < left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return f"| {' | '.join(padded)} |"

    rule = [
        "-" * width if place < left else "-" * (width - 1) + ":"
        for place, width in enumerate(widths)
    ]
    return [line(header), f"|{'|'.join(f' {cell} ' for cell in rule)}|", *map(line, rows)]
