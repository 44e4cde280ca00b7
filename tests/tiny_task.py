"""A task of a few drawn questions for the runner's tests, and a way to run it in a process.

python -m tests.tiny_task CHECKPOINT DATA OUT BATCH_SIZE [COORDINATOR PROCESSES PROCESS]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from quota_jax.errors import QuotaError
from quota_jax.evaluate.task import Instance, Scores, Settings, Task
from tests.tiny_models import draw_picture


@dataclass(frozen=True, kw_only=True, slots=True)
class File:
    """A picture source."""

    path: Path

    @property
    def name(self) -> str:
        return str(self.path)

    def load(self) -> Image.Image:
        try:
            with Image.open(self.path) as picture:
                picture.load()
                return picture
        except OSError:
            raise QuotaError(f"{self.path}: no picture") from None


SETTINGS = Settings(max_new_tokens=5)


@dataclass(frozen=True, kw_only=True)
class TinyTask(Task):
    """Questions of DATA/tiny/tiny.jsonl; an answer is right if its length has the parity asked
    for."""

    name: str = "tiny"
    settings: Settings = SETTINGS

    def _read(self, data: Path, prompts: str, limit: int | None) -> list[Instance]:
        folder = data / self.name
        rows = [json.loads(line) for line in (folder / "tiny.jsonl").read_text().splitlines()]
        return [
            Instance(
                key=row["key"],
                prompt=row["prompt"],
                pictures=tuple(File(path=folder / name) for name in row["pictures"]),
                truth={"parity": row["parity"]},
            )
            for row in rows[:limit]
        ]

    def _score(self, instances: Sequence[Instance], answers: Sequence[str]) -> Scores:
        units = {
            each.key: float(len(answer) % 2 == each.truth["parity"])
            for each, answer in zip(instances, answers, strict=True)
        }
        accuracy = 100 * sum(units.values()) / len(units)
        return Scores(
            headline="accuracy",
            metrics={"accuracy": accuracy},
            units=units,
            chance=50.0,
            weights={"": 100.0},
        )


WORDS = ("is", "there", "a", "red", "circle", "what", "color", "of", "the", "cat", "near", "house")


def write_questions(data: Path, counts: Sequence[int]) -> Path:
    """One question for each number of pictures; pictures are shared between questions."""
    folder = data / "tiny"
    folder.mkdir(parents=True)
    for seed in range(4):
        draw_picture(seed).save(folder / f"{seed}.png")
    rows = [
        {
            "key": f"q{place:02}",
            "prompt": " ".join(WORDS[(place * 5 + n) % len(WORDS)] for n in range(3 + place % 7)),
            "pictures": [f"{(place + n) % 4}.png" for n in range(count)],
            "parity": place % 2,
        }
        for place, count in enumerate(counts)
    ]
    (folder / "tiny.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return data


def main(argv: list[str]) -> None:
    checkpoint, data, out, batch_size, *processes = argv
    if processes:
        from quota_jax.evaluate.parallel import connect

        connect(processes[0], int(processes[1]), int(processes[2]))
    from quota_jax.evaluate.runner import Evaluation

    Evaluation(
        checkpoint=Path(checkpoint),
        tasks=[TinyTask()],
        data=Path(data),
        out=Path(out),
        batch_size=int(batch_size),
    ).run()


if __name__ == "__main__":
    main(sys.argv[1:])
