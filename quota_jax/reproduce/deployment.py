"""One row of Table 7: a run whose memory and power are measured task by task.

The model is loaded once and every program is compiled and run once before the clock starts, so that
only answering counts. A task that is over in less than `MIN_SECONDS` is answered again until then,
because power meters are slow.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from quota_jax.checkpoint import open_checkpoint
from quota_jax.checkpoint.format import encode_json, write_file
from quota_jax.evaluate.engine import Answer, Engine
from quota_jax.evaluate.folder import PREDICTIONS
from quota_jax.evaluate.parallel import local_mesh, replicated
from quota_jax.evaluate.predictions import Prediction, write_predictions
from quota_jax.evaluate.runner import Evaluation
from quota_jax.evaluate.schedule import Group, Prompt, plan
from quota_jax.evaluate.task import Instance, Task
from quota_jax.processing import Buckets, Processor
from quota_jax.reproduce.power import DeviceMeter

DEPLOYMENT = "deployment.json"
MIN_SECONDS = 5.0


def measure_deployment(
    evaluation: Evaluation, device: Callable[[bool], AbstractContextManager[None]]
) -> dict[str, Any]:
    """Answers all questions of an evaluation that has read them, and writes DEPLOYMENT and the
    predictions into its folder; returns what DEPLOYMENT holds.

    device: holds the device, given False together with other processes that compile for it, given
    True alone. So programs are compiled side by side, and nothing else runs while one measures.
    """
    assert evaluation.questions is not None
    checkpoint = open_checkpoint(evaluation.checkpoint)
    recipe = (evaluation.recipe or checkpoint.recipe).canonical()
    buckets = evaluation.text_buckets
    processor = Processor.from_folder(
        checkpoint.assets_dir,
        checkpoint.config,
        buckets=Buckets() if buckets is None else Buckets(text=buckets),
    )
    mesh = local_mesh()
    with device(False):
        engine = Engine(
            model=checkpoint.load_model(evaluation.dtype, sharding=replicated(mesh)),
            processor=processor,
            recipe=recipe,
            mesh=mesh,
            batch_size=evaluation.batch_size,
            workers=evaluation.workers,
        )
        work = [_Work.of(evaluation, engine, task) for task in evaluation.tasks]
        for each in work:
            each.compile(engine)
    tasks, predictions = {}, []
    with device(True):
        for each in work:
            each.compile(engine)  # those that were dropped since, to make room for others
            tasks[each.name], own = each.measure(engine)
            predictions += own
    sizes = checkpoint.sizes()
    content = {
        "device": jax.local_devices()[0].device_kind,
        "devices": len(jax.local_devices()),
        "batch_size": evaluation.batch_size,
        "bits": checkpoint.quantization.label,
        "dtype": checkpoint.dtype.name,
        "file_bytes": sizes["files"],
        "array_bytes": sizes["logical"],
        "tasks": tasks,
    }
    folder = evaluation.out
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / DEPLOYMENT, encode_json(content, str(folder / DEPLOYMENT)))
    # Last: they are what makes a run complete.
    write_predictions(folder / PREDICTIONS, predictions)
    return content


def read_deployment(folder: Path) -> dict[str, Any]:
    """What `measure_deployment` has written."""
    return json.loads((folder / DEPLOYMENT).read_text())


@dataclass(frozen=True, kw_only=True, slots=True)
class _Work:
    """The questions of one task, as prompts in groups that one program answers."""

    name: str
    questions: Sequence[Instance]
    prompts: Sequence[Prompt]
    groups: Sequence[Group]

    @classmethod
    def of(cls, evaluation: Evaluation, engine: Engine, task: Task) -> _Work:
        assert evaluation.questions is not None
        questions = evaluation.questions[task.name]
        alone = dataclasses.replace(evaluation, tasks=[task])
        prompts = alone.prompts_of(engine.processor, {task.name: questions})
        groups = plan(prompts, engine.rows)
        return cls(name=task.name, questions=questions, prompts=prompts, groups=groups)

    def compile(self, engine: Engine) -> None:
        """Runs each program once."""
        for group in {group.bucket: group for group in self.groups}.values():
            jax.block_until_ready(engine.prepare(self.prompts, group).run(engine.model))

    def measure(self, engine: Engine) -> tuple[dict[str, Any], list[Prediction]]:
        passes, answers = 0, {}
        with DeviceMeter() as meter:
            begun = time.perf_counter()
            while not passes or (meter.has_power and time.perf_counter() - begun < MIN_SECONDS):
                for group, given in engine.answer(self.prompts, self.groups):
                    answers |= dict(zip(group.rows, given, strict=True))
                passes += 1
        measured = {
            "questions": len(self.questions),
            "passes": passes,
            "seconds": meter.seconds,
            "questions_per_second": passes * len(self.questions) / meter.seconds,
            "peak_bytes": meter.peak_bytes,
            "watts": meter.watts,
        }
        return measured, _predictions(self.name, self.questions, self.prompts, answers)


def _predictions(
    task: str,
    questions: Sequence[Instance],
    prompts: Sequence[Prompt],
    answers: dict[int, Answer],
) -> list[Prediction]:
    return [
        Prediction(
            task=task,
            key=each.key,
            prompt=prompts[row].digest,
            answer=answers[row].text,
            tokens=answers[row].tokens,
        )
        for row, each in enumerate(questions)
    ]
