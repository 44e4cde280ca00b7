"""Runs tasks on a checkpoint: questions to answers to scores, resumable at any point."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from quota_jax import __version__
from quota_jax.checkpoint import Checkpoint, open_checkpoint
from quota_jax.checkpoint.format import MANIFEST, describe_file
from quota_jax.errors import QuotaError
from quota_jax.evaluate.engine import Engine, Timings
from quota_jax.evaluate.folder import (
    FORMAT_VERSION,
    RunFolder,
    fingerprint,
    read_answers,
    read_baseline,
)
from quota_jax.evaluate.parallel import gather, local_mesh, replicated, share, together
from quota_jax.evaluate.predictions import Journal, Prediction, parse_lines
from quota_jax.evaluate.schedule import Group, Prompt, Request, encode, plan
from quota_jax.evaluate.summary import Summary, summarize
from quota_jax.evaluate.task import Instance, Scores, Task
from quota_jax.processing import Buckets, Processor
from quota_jax.recipe import Recipe

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What to run, and how.

    recipe: None takes the checkpoint's. dtype: None takes the stored one. template: chat template
    by name, None takes the checkpoint's own. prompts: wording of the questions ("lmms-eval" or
    "llava"). limit: only the first questions of each task. batch_size: rows on one device. workers:
    threads that read pictures. max_new_tokens: a lower limit than the tasks' own; answers that end
    before it do not change. text_buckets: text lengths that prompts are padded to (None: the
    processor's); fewer of them are fewer programs to compile. questions: by task, as its `read` has
    found them before; None reads them.
    """

    checkpoint: Path
    tasks: Sequence[Task]
    data: Path
    out: Path
    baseline: Path | None = None
    recipe: Recipe | None = None
    dtype: Any = None
    template: str | None = None
    prompts: str = "lmms-eval"
    limit: int | None = None
    batch_size: int = 16
    workers: int = min(8, os.cpu_count() or 1)
    max_new_tokens: int | None = None
    text_buckets: tuple[int, ...] | None = None
    questions: Mapping[str, Sequence[Instance]] | None = None

    def run(self, progress: Progress | None = None) -> tuple[Summary, Timings]:
        """Answers what is not answered yet, writes the run's folder and returns what is in it.

        With several processes (`parallel.connect`) every one calls it; process 0 writes.

        Args:
            progress: gets answered questions, all questions, and what is going on.
        """
        if self.batch_size < 1 or self.workers < 1:
            raise QuotaError("batch size and workers must be at least 1")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise QuotaError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        checkpoint = open_checkpoint(self.checkpoint)
        recipe = (self.recipe or checkpoint.recipe).canonical()
        buckets = Buckets() if self.text_buckets is None else Buckets(text=self.text_buckets)
        processor = Processor.from_folder(checkpoint.assets_dir, checkpoint.config, buckets=buckets)
        questions = self.questions or {task.name: self._read(task) for task in self.tasks}
        prints = {name: fingerprint(each, self.data) for name, each in questions.items()}
        baseline = None
        if self.baseline is not None:
            baseline = read_baseline(self.baseline, questions, prints)
        identity = self._identity(checkpoint, recipe, questions, prints)
        with together():
            folder = RunFolder.open(self.out, identity)
        timings = Timings()
        if not folder.complete:
            answering = _Answering(
                evaluation=self,
                checkpoint=checkpoint,
                recipe=recipe,
                processor=processor,
                questions=questions,
                prompts=self.prompts_of(processor, questions),
            )
            with together():
                if jax.process_index() == 0:
                    folder.begin()
            with folder.journal(jax.process_index()) as journal, together():
                own = answering.run(folder.journaled(), journal, timings, progress)
            _finish(folder, questions, own, timings)
        summary = self._summarize(folder, questions, baseline)
        if jax.process_index() == 0:
            summary.write(folder.path)
        return summary, timings

    def _read(self, task: Task) -> list[Instance]:
        instances = task.read(self.data, prompts=self.prompts, limit=self.limit)
        if not instances:
            raise QuotaError(f"{task.name}: no questions in {self.data}")
        seen: set[str] = set()
        for each in instances:
            if each.key in seen:
                raise QuotaError(f"{task.name}: the key {each.key!r} occurs twice")
            seen.add(each.key)
        return instances

    def prompts_of(
        self, processor: Processor, questions: Mapping[str, Sequence[Instance]]
    ) -> list[Prompt]:
        """The questions of all tasks as the model gets them, task by task."""
        requests = [
            Request(
                name=f"{task.name} {each.key}",
                conversation=[user_turn(each)],
                max_new_tokens=self._limit(task),
                until=task.settings.until,
            )
            for task in self.tasks
            for each in questions[task.name]
        ]
        with ThreadPoolExecutor(self.workers) as pool:
            return encode(requests, processor, template=self.template, pool=pool)

    def _limit(self, task: Task) -> int:
        """New tokens that an answer may have."""
        own = task.settings.max_new_tokens
        return own if self.max_new_tokens is None else min(own, self.max_new_tokens)

    def _identity(
        self,
        checkpoint: Checkpoint,
        recipe: Recipe,
        questions: Mapping[str, Sequence[Instance]],
        prints: Mapping[str, str],
    ) -> dict[str, Any]:
        """Everything that decides the answers; how many devices share the work does not."""
        manifest = self.data / MANIFEST
        return {
            "format_version": FORMAT_VERSION,
            "checkpoint": describe_file(checkpoint.path / MANIFEST).sha256,
            "bits": checkpoint.quantization.label,
            "dtype": str(self.dtype or checkpoint.dtype.name),
            "recipe": recipe.to_json(),
            "template": self.template,
            "prompts": self.prompts,
            "limit": self.limit,
            "batch_size": self.batch_size,
            "tasks": {
                task.name: {
                    "instances": len(questions[task.name]),
                    "questions": prints[task.name],
                    "max_new_tokens": self._limit(task),
                    "until": list(task.settings.until),
                }
                for task in self.tasks
            },
            "data": describe_file(manifest).sha256 if manifest.is_file() else None,
            "device": jax.local_devices()[0].device_kind,
            "versions": {
                "quota_jax": __version__,
                **{name: version(name) for name in ("jax", "numpy", "pillow", "transformers")},
            },
        }

    def _summarize(
        self,
        folder: RunFolder,
        questions: Mapping[str, Sequence[Instance]],
        baseline: Mapping[str, Sequence[str]] | None,
    ) -> Summary:
        def score(answers: Mapping[str, Sequence[str]]) -> dict[str, Scores]:
            return {
                task.name: task.score(questions[task.name], answers[task.name])
                for task in self.tasks
            }

        return summarize(
            folder.path.name,
            score(read_answers(folder.path, questions)),
            {name: len(instances) for name, instances in questions.items()},
            None if baseline is None else score(baseline),
            None if self.baseline is None else self.baseline.name,
        )


@dataclass(frozen=True, kw_only=True)
class _Answering:
    """The part of a run that needs the model."""

    evaluation: Evaluation
    checkpoint: Checkpoint
    recipe: Recipe
    processor: Processor
    questions: Mapping[str, Sequence[Instance]]
    prompts: Sequence[Prompt]

    def run(
        self,
        done: Mapping[tuple[str, str], Prediction],
        journal: Journal,
        timings: Timings,
        progress: Progress | None,
    ) -> list[Prediction]:
        """This process's predictions: those in ``done``, and new ones, which go to the journal."""
        names = [(task, each.key) for task, part in self.questions.items() for each in part]
        mesh = local_mesh()
        groups = share(plan(self.prompts, self.evaluation.batch_size * mesh.size))
        # A batch that a kill cut in two is answered again as a whole, with the same neighbors.
        left, own = [], []
        for group in groups:
            known = [done[names[row]] for row in group.rows if names[row] in done]
            if len(known) == len(group.rows):
                own += known
            else:
                left.append(group)
        total = sum(len(group.rows) for group in groups)
        if progress:
            progress(len(own), total, "loading the model" if left else "")
        if not left:
            return own
        engine = Engine(
            model=self.checkpoint.load_model(self.evaluation.dtype, sharding=replicated(mesh)),
            processor=self.processor,
            recipe=self.recipe,
            mesh=mesh,
            batch_size=self.evaluation.batch_size,
            workers=self.evaluation.workers,
            timings=timings,
        )
        for group, predictions in self._answers(engine, names, left):
            journal.append(predictions)
            own += predictions
            if progress:
                progress(len(own), total, names[group.rows[0]][0])
        return own

    def _answers(
        self, engine: Engine, names: Sequence[tuple[str, str]], groups: Sequence[Group]
    ) -> Iterator[tuple[Group, list[Prediction]]]:
        for group, answers in engine.answer(self.prompts, groups):
            yield (
                group,
                [
                    Prediction(
                        task=names[row][0],
                        key=names[row][1],
                        prompt=self.prompts[row].digest,
                        answer=answer.text,
                        tokens=answer.tokens,
                    )
                    for row, answer in zip(group.rows, answers, strict=True)
                ],
            )


def user_turn(instance: Instance) -> dict[str, Any]:
    """The message that asks a question: its pictures, then its text."""
    parts = [{"type": "image", "image": picture} for picture in instance.pictures]
    return {"role": "user", "content": [*parts, {"type": "text", "text": instance.prompt}]}


def _finish(
    folder: RunFolder,
    questions: Mapping[str, Sequence[Instance]],
    own: Sequence[Prediction],
    timings: Timings,
) -> None:
    """Brings the predictions of all processes together; process 0 writes them in order."""
    found = {
        each.name: each
        for payload in gather(b"".join(prediction.line() for prediction in own))
        for each in parse_lines(payload, "another process")[0]
    }
    sessions = [json.loads(each) for each in gather(json.dumps(_session(timings)).encode())]
    if jax.process_index() == 0:
        folder.finish(
            found[task, each.key] for task, instances in questions.items() for each in instances
        )
        folder.write_timings({"processes": sessions})
    gather(b"written")  # journals go when nobody can need them any more
    folder.drop_journals()


def _session(timings: Timings) -> dict[str, Any]:
    return {
        **dataclasses.asdict(timings),
        "samples_per_second": timings.samples_per_second,
        "busy_share": timings.busy_share,
        "devices": len(jax.local_devices()),
        "device": jax.local_devices()[0].device_kind,
    }
