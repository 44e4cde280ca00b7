"""The loop of a training run: compiled programs, clock, log, evaluation, saving."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from quota_jax.testbed.learning.data import QUESTION_TYPES
from quota_jax.testbed.learning.step import (
    Knobs,
    TrainingConfig,
    TrainState,
    answer_step,
    draw,
    draw_evaluation,
    init_state,
    plan,
    train_step,
)

Scores = dict[str, float]


class Programs(NamedTuple):
    """Compiled programs of one configuration; `train` holds one per picture size."""

    draw: Any
    train: dict[tuple[int, int], Any]
    draw_evaluation: Any
    answer: Any

    @classmethod
    def compile(
        cls, config: TrainingConfig, compiler_options: dict[str, Any] | None = None
    ) -> Programs:
        """Compiles all programs side by side (about a minute on a GPU machine)."""
        jobs = lowered(config)

        def work(job: Callable[[], Any]) -> Any:
            return job().compile(compiler_options)

        with ThreadPoolExecutor(len(jobs)) as pool:
            done = dict(zip(jobs, pool.map(work, jobs.values()), strict=True))
        train = {size: done[size] for size in config.sizes}
        return cls(done["draw"], train, done["draw_evaluation"], done["answer"])


def lowered(config: TrainingConfig, **options: Any) -> dict[Any, Callable[[], Any]]:
    """Functions that lower each program, by name or picture size; ``options`` go to ``lower``."""

    def lower(function: Any, *args: Any, **how: Any) -> Callable[[], Any]:
        return lambda: jax.jit(function, **how).trace(*args).lower(**options)

    def shapes(tree: Any) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), tree)

    state = jax.eval_shape(partial(init_state, config))
    knobs: Knobs = shapes(plan(config, 0, 0.0))
    index, switch = (jax.ShapeDtypeStruct((), kind) for kind in (np.int32, np.float32))
    drawing = partial(draw, config)
    size = jax.ShapeDtypeStruct((2,), np.float32)
    layout, text = jax.eval_shape(drawing, index, size, knobs.difficulty)
    quiz_drawing = partial(draw_evaluation, config)
    flag = jax.ShapeDtypeStruct((), np.bool_)
    scenes, quiz = jax.eval_shape(quiz_drawing, index, flag)
    jobs: dict[Any, Callable[[], Any]] = {
        size: lower(partial(train_step, config, size), state, layout, text, knobs, donate_argnums=0)
        for size in config.sizes
    }
    answer = partial(answer_step, config)
    return jobs | {
        "draw": lower(drawing, index, size, knobs.difficulty),
        "draw_evaluation": lower(quiz_drawing, index, flag),
        "answer": lower(answer, state.params, scenes, quiz.text, switch),
    }


class Clock:
    """The time plan of a run that may be spread over several processes.

    used: seconds of all processes so far, this one included. trained: seconds in the loop. A run
    ends once `used` reaches the budget less the reserve; `progress` is the share of the loop's time
    that is gone, so the plan ends at 1 whatever compilation and interruptions cost.
    """

    def __init__(
        self,
        *,
        budget: float,
        reserve: float,
        started: float,
        used_before: float = 0.0,
        trained_before: float = 0.0,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.budget, self.reserve = budget, reserve
        self._used_before, self._trained_before = used_before, trained_before
        self._started, self._now = started, now
        self._loop_began = now()

    def begin_loop(self) -> None:
        self._loop_began = self._now()

    @property
    def process(self) -> float:
        """Seconds of this process."""
        return self._now() - self._started

    @property
    def used(self) -> float:
        return self._used_before + self.process

    @property
    def trained(self) -> float:
        return self._trained_before + self._now() - self._loop_began

    @property
    def left(self) -> float:
        """Seconds that the loop still has."""
        return self.budget - self.reserve - self.used

    @property
    def progress(self) -> float:
        left = max(0.0, self.left)
        return min(1.0, self.trained / max(self.trained + left, 1e-9))


class Trainer:
    """State of one run and the loop around its programs."""

    def __init__(
        self,
        config: TrainingConfig,
        programs: Programs,
        *,
        state: TrainState | None = None,
        steps: int = 0,
        curve: list[dict[str, Any]] | None = None,
    ) -> None:
        """``state`` None starts afresh; else the run goes on behind ``steps`` steps."""
        self.config, self.programs = config, programs
        self.state = init_state(config) if state is None else state
        self.steps = steps
        self.curve = list(curve or [])

    def step(self, progress: float) -> Any:
        """One update; returns the metrics without waiting for them."""
        size = self.config.sizes[self.steps % len(self.config.sizes)]
        knobs = plan(self.config, self.steps, progress)
        layout, text = self.programs.draw(
            np.int32(self.steps), np.array(size, np.float32), knobs.difficulty
        )
        self.state, metrics = self.programs.train[size](self.state, layout, text, knobs)
        self.steps += 1
        return metrics

    def evaluate(
        self, batches: int, *, seeing: bool = True, held_out: bool = False
    ) -> tuple[Scores, Scores]:
        """Accuracy, and accuracy of the commonest answer, in percent by question type."""
        results = []
        for index in range(batches):
            layout, quiz = self.programs.draw_evaluation(np.int32(index), np.bool_(held_out))
            correct = self.programs.answer(self.state.params, layout, quiz.text, np.float32(seeing))
            results.append((correct, quiz.asked, quiz.answers))
        correct, asked, answers = (
            np.concatenate([np.asarray(part) for part in parts])
            for parts in zip(*results, strict=True)
        )
        return accuracy(correct, asked), majority(answers, asked)

    def run(
        self,
        clock: Clock,
        *,
        stop_after: float = float("inf"),
        max_steps: int | None = None,
        log: Callable[[str], None],
        save: Callable[[], None],
        log_seconds: float = 15.0,
        eval_seconds: float = 60.0,
        save_seconds: float = 60.0,
    ) -> bool:
        """Trains until the clock's time is up: True. False after ``stop_after`` seconds of this
        process or ``max_steps`` steps in all, where the plan is not at its end.

        At most two steps are in flight, so the clock is that of the device. ``save`` is called
        from time to time and at the end.
        """
        clock.begin_loop()
        began = self.steps
        flying: deque[Any] = deque()
        recent: list[np.ndarray] = []
        next_log, next_eval, next_save = (
            clock.trained + wait for wait in (log_seconds, eval_seconds, save_seconds)
        )
        logged_step, logged_at = self.steps, clock.trained
        finished = False
        while max_steps is None or self.steps < max_steps:
            now = clock.trained
            if clock.left <= 0:
                finished = True
                break
            if clock.process >= stop_after:
                break
            flying.append(self.step(clock.progress))
            if len(flying) > 2:
                recent.append(_finite(flying.popleft(), self.steps))
            if now >= next_log and recent:
                rate = (self.steps - logged_step) * self.config.batch_size / (now - logged_at)
                mean = np.mean(recent, axis=0)
                log(
                    f"step {self.steps:6d}  {100 * clock.progress:3.0f} %  {rate:6.0f} pictures/s"
                    f"  language {mean[0]:.4f}  patches {mean[1]:.4f}  gradient {mean[2]:.2f}"
                    f"  {clock.left:.0f} s left"
                )
                recent, logged_step, logged_at = [], self.steps, now
                next_log = now + log_seconds
            if now >= next_eval:
                self._watch(clock, log)
                next_eval = clock.trained + eval_seconds
            if now >= next_save:
                save()
                next_save = clock.trained + save_seconds
        for metrics in flying:
            _finite(metrics, self.steps)
        if self.steps > began:
            save()
        return finished

    def _watch(self, clock: Clock, log: Callable[[str], None]) -> None:
        """A small evaluation for the curve and the log."""
        scores, _ = self.evaluate(2)
        point = {"seconds": round(clock.trained, 1), "step": self.steps}
        self.curve.append(point | {name: round(value, 1) for name, value in scores.items()})
        topics = by_topic(scores)
        log(
            f"        mean {np.mean(list(scores.values())):.1f}  "
            + "  ".join(f"{name} {value:.0f}" for name, value in topics.items())
        )


def _finite(metrics: Any, steps: int) -> np.ndarray:
    values = np.asarray(metrics)
    if not np.isfinite(values).all():
        raise FloatingPointError(f"losses and gradient norm {values} at step {steps}")
    return values


def accuracy(correct: np.ndarray, asked: np.ndarray) -> Scores:
    """Percent of the asked questions that are answered correctly, for the types that were asked."""
    right, total = (correct & asked).sum(0), asked.sum(0)
    return {
        name: 100 * float(right[i]) / int(total[i])
        for i, name in enumerate(QUESTION_TYPES)
        if total[i]
    }


def majority(answers: np.ndarray, asked: np.ndarray) -> Scores:
    """Percent that always giving the commonest answer of a type would get."""
    table = {}
    for index, name in enumerate(QUESTION_TYPES):
        rows = answers[asked[:, index], index]
        if len(rows):
            counts = np.unique(rows, axis=0, return_counts=True)[1]
            table[name] = 100 * int(counts.max()) / len(rows)
    return table


def by_topic(scores: Scores) -> Scores:
    """Means over the forms of each topic."""
    groups: dict[str, list[float]] = {}
    for name, value in scores.items():
        groups.setdefault(name.split("/")[0], []).append(value)
    return {topic: float(np.mean(values)) for topic, values in groups.items()}
