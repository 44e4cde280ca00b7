"""The folder of a run: what identifies it, what is there already, and what it ends with.

run.json            checkpoint, recipe, questions, settings and versions: what decides answers
journal-<n>.jsonl   predictions of process n while the run lasts
predictions.jsonl   all predictions in the order of the questions, once the run is complete
summary.json, .md   scores, and the comparison with a baseline
timings.json        seconds and throughput of the last session; the only file that varies
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quota_jax.checkpoint.format import encode_json, read_json, write_file
from quota_jax.errors import QuotaError
from quota_jax.evaluate.predictions import (
    Journal,
    Prediction,
    parse_lines,
    read_predictions,
    write_predictions,
)
from quota_jax.evaluate.task import Instance

RUN, PREDICTIONS, TIMINGS = "run.json", "predictions.jsonl", "timings.json"
FORMAT_VERSION = 1


def fingerprint(instances: Iterable[Instance], data: Path) -> str:
    """sha256 of what a task asks: keys, prompts, names of pictures, truths.

    Names are taken relative to the data folder, so the folder may move.
    """
    digest = hashlib.sha256()
    for each in instances:
        names = [picture.name.removeprefix(f"{data}/") for picture in each.pictures]
        content = [each.key, each.prompt, names, dict(each.truth)]
        digest.update(json.dumps(content, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFolder:
    """A run's folder, checked against the run's identity."""

    path: Path
    identity: Mapping[str, Any]

    @classmethod
    def open(cls, path: Path, identity: Mapping[str, Any]) -> RunFolder:
        """A folder that can hold this run: a new one, or that of the same run. Nothing is written.

        Raises:
            QuotaError: the folder belongs to a run with another identity, or is no run.
        """
        if (path / RUN).exists():
            wanted = json.loads(encode_json(identity, str(path / RUN)))
            if where := _difference(read_identity(path), wanted):
                raise QuotaError(
                    f"{path} holds a run with another {where}; choose another --out, or remove it"
                )
        elif path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise QuotaError(f"{path} is in the way: it is no run; choose another --out")
        return cls(path=path, identity=identity)

    def begin(self) -> None:
        """Makes the folder and writes what identifies the run."""
        self.path.mkdir(parents=True, exist_ok=True)
        if not (self.path / RUN).exists():
            write_file(self.path / RUN, encode_json(self.identity, str(self.path / RUN)))

    @property
    def complete(self) -> bool:
        """Whether all predictions are there."""
        return (self.path / PREDICTIONS).exists()

    def journal(self, process: int) -> Journal:
        """The journal of one process, locked."""
        return Journal(self.path / f"journal-{process}.jsonl")

    def journaled(self) -> dict[tuple[str, str], Prediction]:
        """What all processes have written so far, by task and key."""
        return {
            prediction.name: prediction
            for path in self._journals()
            for prediction in parse_lines(path.read_bytes(), str(path), torn=True)[0]
        }

    def finish(self, predictions: Iterable[Prediction]) -> None:
        """Writes the ordered predictions."""
        write_predictions(self.path / PREDICTIONS, predictions)

    def drop_journals(self) -> None:
        """Removes the journals of a complete run."""
        for path in self._journals():
            path.unlink(missing_ok=True)

    def write_timings(self, content: Any) -> None:
        """Writes timings.json."""
        write_file(self.path / TIMINGS, encode_json(content, str(self.path / TIMINGS)))

    def _journals(self) -> list[Path]:
        return sorted(self.path.glob("journal-*.jsonl"))


def read_identity(path: Path) -> dict[str, Any]:
    """run.json of a run's folder."""
    if not (path / RUN).is_file():
        raise QuotaError(f"{path} is no run: it has no {RUN}")
    content = read_json(path / RUN)
    if content.get("format_version") != FORMAT_VERSION:
        raise QuotaError(f"{path / RUN}: format version {content.get('format_version')!r}")
    return content


def read_baseline(
    path: Path, questions: Mapping[str, Sequence[Instance]], prints: Mapping[str, str]
) -> dict[str, list[str]]:
    """The answers of a complete run to the same questions, by task, in their order.

    Raises:
        QuotaError: the run lacks a task, or asked other questions; is not complete; is damaged.
    """
    asked = read_identity(path).get("tasks")
    if not isinstance(asked, dict):
        raise QuotaError(f"{path / RUN}: names no tasks")
    for task, own in prints.items():
        entry = asked.get(task)
        if not isinstance(entry, dict):
            raise QuotaError(f"baseline {path} did not run {task}, only {', '.join(asked)}")
        if entry.get("questions") != own:
            raise QuotaError(
                f"baseline {path} answered other questions of {task}: "
                f"{entry.get('instances')} of them there, {len(questions[task])} here; the same "
                "data, --limit and --prompts are needed"
            )
    if not (path / PREDICTIONS).is_file():
        raise QuotaError(f"baseline {path} is not complete: it has no {PREDICTIONS}")
    return read_answers(path, questions)


def read_answers(path: Path, questions: Mapping[str, Sequence[Instance]]) -> dict[str, list[str]]:
    """The answers of a complete run, by task, in the order of the questions."""
    found = {each.name: each.answer for each in read_predictions(path / PREDICTIONS)}
    for task, instances in questions.items():
        for each in instances:
            if (task, each.key) not in found:
                raise QuotaError(f"{path / PREDICTIONS}: lacks {task} {each.key}")
    return {
        task: [found[task, each.key] for each in instances] for task, instances in questions.items()
    }


def _difference(found: Any, wanted: Any, where: str = "") -> str | None:
    """The first entry in which two identities differ, with both values."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in sorted({*found, *wanted}):
            inner = f"{where}.{key}" if where else key
            if different := _difference(found.get(key), wanted.get(key), inner):
                return different
        return None
    return None if found == wanted else f"{where} ({_brief(found)} there, {_brief(wanted)} here)"


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
