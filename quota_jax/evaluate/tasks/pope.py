"""POPE (Li et al. 2023, arXiv 2305.10355): is an object in the picture, yes or no?

Files: ``coco_pope_{random,popular,adversarial}.json`` (JSON lines) and pictures in ``images`` or
``val2014``; or parquet. A limit takes as many questions of each split.

Metrics, pooled over the splits and for each of them (``random/f1``), in percent:

- ``accuracy``, ``precision``, ``recall``, ``f1``: lmms-eval. The text must be "yes" or "no", case
  aside: "Yes." is wrong and neither. Its recall forgets positives that got neither.
- ``official_accuracy`` and so on: POPE's own parser, for which all that does not deny is a yes.
- ``yes_ratio``, ``official_yes_ratio``: answers that say yes. ``truth_yes_ratio``: questions whose
  answer is yes, which lmms-eval calls pope_yes_ratio.

Headline: ``accuracy``. Chance: 50, a coin.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quota_jax.evaluate.answers import pope_official_yes_no
from quota_jax.evaluate.pictures import find_picture
from quota_jax.evaluate.task import Instance, PictureSource, Scores, Settings, Task
from quota_jax.evaluate.tasks.numbers import percent
from quota_jax.evaluate.tasks.parquet import no_files, parquet_files, read_table
from quota_jax.evaluate.tasks.records import Keys, Row, json_lines
from quota_jax.evaluate.tasks.subset import first, grouped

SPLITS = ("random", "popular", "adversarial")
PARQUET = ("data/test-*.parquet", "test-*.parquet", "Full/*.parquet", "*.parquet")
SHORT_ANSWER = "\nAnswer the question using a single word or phrase."


@dataclass(frozen=True, kw_only=True)
class Pope(Task):
    """Both wordings of the prompts are the same."""

    def _read(self, data: Path, prompts: str, limit: int | None) -> list[Instance]:
        folder = data / self.name
        files = {split: folder / f"coco_pope_{split}.json" for split in SPLITS}
        present = {split: path for split, path in files.items() if path.exists()}
        if present:
            places = [folder / "images", folder / "val2014"]
            parts = [
                [[(split, row)] for row in json_lines(data, path)]
                for split, path in present.items()
            ]
            keys = Keys()
            return [
                _instance(
                    row,
                    keys,
                    split,
                    row.text("text"),
                    row.one_of("label", ("yes", "no")),
                    find_picture(data, places, row.text("image"), row.where),
                )
                for split, row in first(parts, limit)
            ]
        return self._read_parquet(data, limit)

    def _read_parquet(self, data: Path, limit: int | None) -> list[Instance]:
        files = parquet_files(data, data / self.name, PARQUET)
        if not files:
            raise no_files(data / self.name, "coco_pope_SPLIT.json", PARQUET)
        table = read_table(files)
        splits = [row.one_of("category", SPLITS) for row in table.rows]
        parts = grouped((split, [place]) for place, split in enumerate(splits))
        keys = Keys()
        return [
            _instance(
                row := table.rows[place],
                keys,
                splits[place],
                row.text("question"),
                row.one_of("answer", ("yes", "no")),
                table.picture(place),
            )
            for place in first(parts, limit)
        ]

    def _score(self, instances: Sequence[Instance], answers: Sequence[str]) -> Scores:
        metrics = _metrics(instances, answers)
        for split in SPLITS:
            rows = [row for row, each in enumerate(instances) if each.truth["split"] == split]
            if rows:
                own = _metrics([instances[row] for row in rows], [answers[row] for row in rows])
                metrics |= {f"{split}/{name}": value for name, value in own.items()}
        return Scores(
            headline="accuracy",
            metrics=metrics,
            units={
                each.key: 100.0 * (answer.lower() == each.truth["answer"])
                for each, answer in zip(instances, answers, strict=True)
            },
            chance=50.0,
        )


def _instance(
    row: Row, keys: Keys, split: str, question: str, answer: str, picture: PictureSource
) -> Instance:
    return Instance(
        key=keys.new(f"{split}/{row.identifier('question_id')}", row),
        prompt=question.strip() + SHORT_ANSWER,
        pictures=(picture,),
        truth={"answer": answer, "split": split},
    )


def _metrics(instances: Sequence[Instance], answers: Sequence[str]) -> dict[str, float]:
    truths = [each.truth["answer"] for each in instances]
    official = _rates(truths, [pope_official_yes_no(answer) for answer in answers])
    return {
        **_rates(truths, [answer.lower() for answer in answers]),
        **{f"official_{name}": value for name, value in official.items()},
        "truth_yes_ratio": percent(truth == "yes" for truth in truths),
    }


def _rates(truths: Sequence[str], given: Sequence[str]) -> dict[str, float]:
    """Percentages, "yes" being the positive; 0 where a share is one of nothing."""
    pairs = list(zip(truths, given, strict=True))
    hits = pairs.count(("yes", "yes"))
    precision = _share(hits, hits + pairs.count(("no", "yes")))
    recall = _share(hits, hits + pairs.count(("yes", "no")))
    return {
        "accuracy": percent(truth == answer for truth, answer in pairs),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if hits else 0.0,
        "yes_ratio": percent(answer == "yes" for answer in given),
    }


def _share(part: int, whole: int) -> float:
    return 100 * part / whole if whole else 0.0


TASK = Pope(name="pope", settings=Settings(max_new_tokens=128))
