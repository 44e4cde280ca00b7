"""``quota-jax eval``: benchmarks on a checkpoint, with predictions, scores and comparison."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from quota_jax.cli.answering import RecipeOptions
from quota_jax.cli.console import CheckpointPath
from quota_jax.errors import QuotaError

if TYPE_CHECKING:
    from quota_jax.evaluate.task import Task


@dataclass(frozen=True, kw_only=True)
class Eval(RecipeOptions):
    """Answer the questions of benchmarks, score them, and compare with another run.

    Data are the official files, one folder for each task. A run can be interrupted at any point:
    the same command goes on where it was. Answers are greedy.

    For example:
      quota-jax eval llava-7b --tasks pope gqa --data benchmarks --out full --recipe-none
      quota-jax eval llava-7b --tasks pope gqa --data benchmarks --out pruned --keep 0.3
      --baseline full
    """

    checkpoint: CheckpointPath
    """Checkpoint, full precision or quantized."""
    tasks: tuple[str, ...]
    """Names of tasks, with spaces or commas between them; --tasks all takes every one."""
    data: Path
    """Folder with a folder for each task."""
    out: Path | None = None
    """Folder of the run; default runs/CHECKPOINT."""
    baseline: Path | None = None
    """Folder of a complete run on the same questions to compare with."""
    limit: int | None = None
    """Only the first questions of each task."""
    batch_size: int = 16
    """Questions at a time on each device."""
    template: str | None = None
    """llava, vicuna_v1, chatml or a template of the checkpoint; None takes the checkpoint's own."""
    prompts: Literal["lmms-eval", "llava"] = "lmms-eval"
    """Wording of the questions: as lmms-eval asks them, or as LLaVA's own evaluation does."""
    workers: int | None = None
    """Threads that read pictures; default one per core, at most 8."""
    coordinator: str | None = None
    """With several processes: HOST:PORT of process 0, or auto under a known cluster manager."""
    processes: int | None = None
    """With --coordinator: how many processes share the work."""
    process: int | None = None
    """With --coordinator: which of them this is, from 0."""

    def run(self) -> int:
        tasks = choose(self.tasks)
        if self.coordinator is not None:
            from quota_jax.evaluate.parallel import connect

            connect(self.coordinator, self.processes, self.process)
        elif self.processes is not None or self.process is not None:
            raise QuotaError("--processes and --process need --coordinator")
        import jax

        from quota_jax.checkpoint import open_checkpoint
        from quota_jax.evaluate.runner import Evaluation
        from quota_jax.evaluate.summary import SUMMARY_JSON, SUMMARY_MARKDOWN

        out = self.out or Path("runs") / self.checkpoint.resolve().name
        workers = {} if self.workers is None else {"workers": self.workers}
        evaluation = Evaluation(
            checkpoint=self.checkpoint,
            tasks=tasks,
            data=self.data,
            out=out,
            baseline=self.baseline,
            recipe=self.recipe(open_checkpoint(self.checkpoint)),
            dtype=self.dtype,
            template=self.template,
            prompts=self.prompts,
            limit=self.limit,
            batch_size=self.batch_size,
            **workers,  # pyrefly: ignore[bad-argument-type]
        )
        with _bar() as step:
            summary, timings = evaluation.run(step)
        if jax.process_index():
            return 0
        print(summary.to_markdown())
        if timings.samples:
            print(
                f"{timings.samples} questions, {timings.samples_per_second:.1f} a second, device "
                f"busy {100 * timings.busy_share:.0f} % of the time, {timings.compile:.0f} s of "
                "compilation"
            )
        for name in ("predictions.jsonl", SUMMARY_JSON, SUMMARY_MARKDOWN):
            print(f"wrote {out / name}")
        return 0


def choose(names: tuple[str, ...]) -> list[Task]:
    """The tasks of these names, which may be joined by commas."""
    from quota_jax.evaluate.tasks import TASKS

    wanted = [name for part in names for name in part.split(",") if name]
    if wanted == ["all"]:
        return list(TASKS.values())
    if not wanted:
        raise QuotaError("--tasks names no task")
    for name in wanted:
        if name not in TASKS:
            raise QuotaError(f"no task {name!r}; known: {', '.join(TASKS)}")
        if wanted.count(name) > 1:
            raise QuotaError(f"task {name} is named twice")
    return [TASKS[name] for name in wanted]


@contextmanager
def _bar() -> Iterator[Callable[[int, int, str], None]]:
    """Questions answered, and the time left; silent where stderr is no terminal."""
    from tqdm import tqdm

    with tqdm(desc="answering", unit="question", disable=None, leave=False) as bar:

        def step(done: int, total: int, what: str) -> None:
            if bar.total is None:
                bar.initial = bar.n = done  # what an earlier session did says nothing about speed
            bar.total = total
            bar.set_postfix_str(what, refresh=False)
            bar.update(done - bar.n)

        yield step
