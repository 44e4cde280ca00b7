"""The runner's throughput beside that of its bare compiled step, on the same batches.

The step alone is the best that a runner can do: its batch lies on the device beforehand, and the
host does nothing but start it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import jax

from quota_jax.evaluate.engine import Engine, Timings
from quota_jax.evaluate.schedule import Prompt, plan


@dataclass(frozen=True, kw_only=True, slots=True)
class Throughput:
    """Samples per second of the bare step and of the runner, and where the runner's time went."""

    bare: float
    runner: float
    timings: Timings

    @property
    def share(self) -> float:
        """The runner's part of what the bare step does."""
        return self.runner / self.bare


def measure_throughput(engine: Engine, prompts: Sequence[Prompt], *, ahead: int = 4) -> Throughput:
    """Answers all prompts batch by batch with the bare step, then with the runner.

    Bare: up to ``ahead`` batches at a time are put on the device and then run one right after the
    other; only the time from the first start to the last end counts. Both run the same batches, so
    answers of different length weigh alike, and every program is compiled before.
    """
    groups = plan(prompts, engine.rows)
    seconds = 0.0
    for start in range(0, len(groups), ahead):
        prepared = [engine.prepare(prompts, group) for group in groups[start : start + ahead]]
        if start == 0:
            # The first run of a program also pays for what the device sets up once.
            jax.block_until_ready(prepared[0].run(engine.model))
        begun = time.perf_counter()
        jax.block_until_ready([each.run(engine.model) for each in prepared])
        seconds += time.perf_counter() - begun
    engine.timings = Timings()
    for _ in engine.answer(prompts, groups):
        pass
    timings = engine.timings
    return Throughput(
        bare=len(prompts) / seconds, runner=timings.samples_per_second, timings=timings
    )
