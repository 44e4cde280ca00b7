"""Checkpoints and benchmark runs of a study: each is made once and shared by all tables.

Several processes may work on one study: a checkpoint or run that another one is making is left to
it, and work that was killed goes on.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from quota_jax.checkpoint import Checkpoint, open_checkpoint
from quota_jax.co_calibration import FirstRound
from quota_jax.errors import QuotaError
from quota_jax.evaluate.folder import PREDICTIONS, read_answers
from quota_jax.evaluate.pictures import GrayPicture
from quota_jax.evaluate.runner import Evaluation
from quota_jax.evaluate.task import Instance, Scores, Task
from quota_jax.evaluate.tasks import TASKS
from quota_jax.pipeline import PipelineOptions, derived_recipe, selector
from quota_jax.programs import release_many_programs
from quota_jax.prune.sensitivity import (
    Sensitivities,
    SensitivityOptions,
    measure_sensitivities,
)
from quota_jax.prune.weights import QuotaWeights
from quota_jax.quant.calibration_data import Sample
from quota_jax.recipe import Recipe, Selector
from quota_jax.reproduce.deployment import measure_deployment
from quota_jax.reproduce.weights import Weights, make_weights
from quota_jax.testbed.outliers import plant_outliers

Log = Callable[[str], None]


class Busy(Exception):
    """Another process is making what is asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Derived:
    """QUOTA's recipe from sensitivities of the row's own weights; ``weights`` of the score."""

    keep: float
    weights: QuotaWeights | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One line of a table: weights (None: full precision) under a recipe.

    recipe: None takes the checkpoint's own, that is none where calibration stored none. facts:
    further columns. measured: memory and power are measured while it runs (`deployment`). blind:
    all pictures are gray.
    """

    label: str
    weights: Weights | None = None
    recipe: Recipe | Derived | None = None
    facts: tuple[tuple[str, str], ...] = ()
    measured: bool = False
    blind: bool = False

    @property
    def run_name(self) -> str:
        """Equal for rows that are the same run."""
        recipe: Any = None
        if isinstance(self.recipe, Recipe):
            recipe = self.recipe.canonical().to_json() if self.recipe.stages else None
        elif self.recipe is not None:
            recipe = dataclasses.asdict(self.recipe)
        stem = self.weights.name if self.weights else "full"
        stem += "_measured" if self.measured else ""
        stem += "_blind" if self.blind else ""
        if recipe is None:
            return stem
        digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:10]
        return f"{stem}_{digest}"


@dataclass(frozen=True, kw_only=True)
class Study:
    """One model, one set of questions, one list of calibration samples.

    source: full-precision checkpoint. pool: samples from which each seed draws ``num_samples``.
    steps: of FlatQuant per block; None takes the default. limit: first questions of each task.
    visual_tokens: of most pictures, for costs; None takes the model's reference picture.
    max_new_tokens: a lower limit than the tasks' own. text_bucket: one text length that all prompts
    are padded to, so that a run has one program for each size of pictures.
    """

    source: Path
    data: Path
    pool: Sequence[Sample]
    out: Path
    tasks: tuple[str, ...] = tuple(TASKS)
    num_samples: int = 128
    steps: int | None = None
    limit: int | None = None
    visual_tokens: int | None = None
    max_new_tokens: int | None = None
    text_bucket: int | None = None
    batch_size: int = 32
    workers: int = 4

    def __post_init__(self):
        if not 1 <= self.num_samples <= len(self.pool):
            raise QuotaError(
                f"{self.num_samples} calibration samples asked for, {len(self.pool)} are there"
            )
        for name in self.tasks:
            if name not in TASKS:
                raise QuotaError(f"no task {name!r}; known: {', '.join(TASKS)}")

    @cached_property
    def reference(self) -> Checkpoint:
        """The full-precision checkpoint."""
        return open_checkpoint(self.source)

    @cached_property
    def questions(self) -> dict[str, list[Instance]]:
        return {task.name: task.read(self.data, limit=self.limit) for task in self._tasks}

    @property
    def _tasks(self) -> list[Task]:
        return [TASKS[name] for name in self.tasks]

    def samples(self, seed: int) -> list[Sample]:
        """The samples that a seed draws, in the order of the draw."""
        order = np.random.default_rng(seed).permutation(len(self.pool))
        return [self.pool[i] for i in order[: self.num_samples]]

    def checkpoint(self, weights: Weights | None, log: Log = print) -> Path:
        """The folder of the weights, made if it is not there.

        Raises:
          Busy: another process is making it.
        """
        if weights is None:
            return self.source
        place = self.out / "checkpoints" / weights.name
        if place.exists():
            return place
        with self._alone(weights.name):
            if not place.exists():
                place.parent.mkdir(parents=True, exist_ok=True)
                first = self._first_round(weights)
                begun = time.monotonic()
                self._make(weights, place, first)
                log(f"{weights.name}: calibrated in {time.monotonic() - begun:.0f} s")
        return place

    def _first_round(self, weights: Weights) -> FirstRound | None:
        """What co-calibrated weights begin from, shared by all that do."""
        plain = weights.begins_from
        if plain is None:
            return None
        return FirstRound(
            checkpoint=self.checkpoint(plain), sensitivities=self.sensitivities(plain)
        )

    def _make(self, weights: Weights, place: Path, first: FirstRound | None) -> None:
        make_weights(
            weights,
            self._source(weights),
            place,
            samples=self.samples(weights.seed),
            pool=self.pool,
            steps=self.steps,
            first=first,
        )

    def _source(self, weights: Weights) -> Path:
        """The full-precision checkpoint that weights are made of, with outliers if they ask."""
        if weights.outliers is None:
            return self.source
        place = self.out / "checkpoints" / f"outliers-{weights.outliers:g}"
        with self._alone(place.name):
            if not place.exists():
                plant_outliers(self.source, place, factor=weights.outliers)
        return place

    def sensitivities(self, weights: Weights) -> Sensitivities:
        """S_l of calibrated weights on all tokens, measured once on the samples of their seed.

        Raises:
          Busy: another process is measuring them.
        """
        file = self._measured(weights)
        if not file.exists():
            quantized = open_checkpoint(self.checkpoint(weights))
            with self._alone(f"sensitivities_{weights.name}"):
                if not file.exists():
                    file.parent.mkdir(parents=True, exist_ok=True)
                    measure_sensitivities(
                        quantized,
                        self.reference,
                        self.samples(weights.seed),
                        file.with_suffix(".journal"),
                        options=SensitivityOptions(dtype="float32"),
                    ).write(file)
        return Sensitivities.read(file)

    def recipe(self, row: Row) -> Recipe | None:
        """The recipe of a row; None is the checkpoint's own."""
        if not isinstance(row.recipe, Derived):
            return row.recipe
        if row.weights is None:
            raise QuotaError(f"row {row.label!r}: full precision has no sensitivities")
        quantization = row.weights.quantization
        chosen = selector(quantization, residual=True)
        if row.recipe.weights is not None:
            chosen = Selector(name="quota", weights=row.recipe.weights)
        options = PipelineOptions(keep=row.recipe.keep, quantization=quantization)
        measured = self.sensitivities(row.weights)
        return derived_recipe(self.reference.config, options, chosen, measured)[0]

    def run(
        self,
        rows: Sequence[Row],
        log: Log = print,
        *,
        until: float | None = None,
        threads: int = 1,
        only: str | None = None,
    ) -> bool:
        """Runs what is missing; False where time was up before all of it was there.

        Work that other processes hold is left to them, and taken up again in the order of the
        rows. ``until``: on `time.monotonic`, after which no other run is begun. A row that fails
        does not keep others from being run.
        ``threads``: rows at a time; they share the device, so that one is compiled while another
        one runs. Measured rows come last, one at a time. ``only``: "weights" calibrates and
        measures sensitivities, "runs" leaves that to other processes and waits for it.

        Raises:
          QuotaError: rows failed; the first one's reason, after all others were run.
        """
        _ = self.questions, self.reference  # read once, before threads ask for them
        plain = [row for row in rows if not row.measured]
        measured = [row for row in rows if row.measured]
        with ThreadPoolExecutor(threads) as pool:
            works = [pool.submit(self._work, plain, log, until, only) for _ in range(threads)]
            results = [work.result() for work in works]
        results.append(self._work(measured, log, until, only))
        failed = [each for _, reasons in results for each in reasons]
        if failed:
            raise QuotaError(f"{len(failed)} rows failed, first {failed[0][:500]}")
        return all(done for done, _ in results)

    def _work(
        self, rows: Sequence[Row], log: Log, until: float | None, only: str | None
    ) -> tuple[bool, list[str]]:
        """One thread of `run`: whether time sufficed, and the reasons of rows that failed."""
        waiting, failed = list(rows), []
        while waiting := [row for row in waiting if not self._made(row, only)]:
            for row in waiting:
                if until is not None and time.monotonic() >= until:
                    return False, failed
                try:
                    self._make_row(row, log, only)
                except Busy:
                    continue
                except Exception as error:
                    failed.append(f"{row.label}: {type(error).__name__}: {error}")
                    log(f"failed: {failed[-1][:2000]}")
                    waiting.remove(row)
                break  # what was busy before may be ready now, and earlier rows come first
            else:
                time.sleep(0.5)
        return True, failed

    def _made(self, row: Row, only: str | None) -> bool:
        return self.complete(row) or (only == "weights" and self._prepared(row))

    def _make_row(self, row: Row, log: Log, only: str | None) -> None:
        release_many_programs()
        if only == "weights":
            self._prepare(row, log)
        elif only == "runs" and not self._prepared(row):
            raise Busy(row.label)
        else:
            self._evaluate(row, log)

    def _prepare(self, row: Row, log: Log) -> None:
        """Makes what a row needs before it can be run."""
        with self._device(False):
            self.checkpoint(row.weights, log)
            self.recipe(row)

    def _prepared(self, row: Row) -> bool:
        if row.weights is None:
            return True
        if not (self.out / "checkpoints" / row.weights.name).exists():
            return False
        return not isinstance(row.recipe, Derived) or self._measured(row.weights).exists()

    def _measured(self, weights: Weights) -> Path:
        """Where the sensitivities of weights are."""
        return self.out / "sensitivities" / f"{weights.name}.json"

    def folder(self, row: Row) -> Path:
        """Where the run of a row is."""
        return self.out / "runs" / row.run_name

    def complete(self, row: Row) -> bool:
        """Whether the run of a row is there."""
        return (self.folder(row) / PREDICTIONS).exists()

    def _evaluate(self, row: Row, log: Log) -> None:
        with self._alone(f"run_{row.run_name}"):
            if self.complete(row):
                return
            with self._device(False):
                evaluation = self._evaluation(row, log)
                if not row.measured:
                    _, times = evaluation.run()
                    log(
                        f"{row.label} ({row.run_name}): {times.samples} questions in "
                        f"{times.answering:.1f} s, {times.compile:.0f} s of compilation"
                    )
                    return
            measure_deployment(evaluation, self._device)
            log(f"{row.label} ({row.run_name}): measured")

    def _evaluation(self, row: Row, log: Log) -> Evaluation:
        """Calibrates and measures sensitivities where that is missing."""
        return Evaluation(
            checkpoint=self.checkpoint(row.weights, log),
            tasks=self._tasks,
            data=self.data,
            out=self.folder(row),
            recipe=self.recipe(row),
            limit=self.limit,
            batch_size=self.batch_size,
            workers=self.workers,
            max_new_tokens=self.max_new_tokens,
            text_buckets=None if self.text_bucket is None else (self.text_bucket,),
            questions=_blinded(self.questions) if row.blind else self.questions,
        )

    @property
    def counts(self) -> dict[str, int]:
        """How many questions each task asks."""
        return {name: len(part) for name, part in self.questions.items()}

    def scores(self, row: Row) -> dict[str, Scores]:
        """Scores of a finished run."""
        answers = read_answers(self.folder(row), self.questions)
        return {
            task.name: task.score(self.questions[task.name], answers[task.name])
            for task in self._tasks
        }

    @contextmanager
    def _device(self, alone: bool) -> Iterator[None]:
        """Waits for the device: to have it alone (others would share its power), or beside others
        that do not ask for that."""
        folder = self.out / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "device.lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
            yield

    @contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        """Holds a lock that ends with the process."""
        folder = self.out / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / f"{name}.lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Busy(name) from None
            yield


def _blinded(questions: Mapping[str, Sequence[Instance]]) -> dict[str, list[Instance]]:
    """The same questions about gray pictures."""

    def blind(each: Instance) -> Instance:
        return dataclasses.replace(each, pictures=tuple(map(GrayPicture, each.pictures)))

    return {name: list(map(blind, part)) for name, part in questions.items()}
