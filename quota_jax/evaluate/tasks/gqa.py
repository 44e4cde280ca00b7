"""GQA (Hudson and Manning 2019, arXiv 1902.09506), balanced test-dev questions: one word or phrase.

Files: ``testdev_balanced_questions.json`` and ``images/<imageId>.{jpg,png}``; or parquet, questions
in ``testdev_balanced_instructions`` and pictures in ``testdev_balanced_images``.

Metrics, in percent:

- ``exact_match``: lmms-eval. Equal after lower case and without ASCII punctuation; a blank that
  this leaves at an end counts.
- ``official_accuracy``: the benchmark's own, fed as LLaVA does: full stops at the end removed,
  lower case, then equal to the answer as it is written.
- ``structural/...``, ``semantic/...``, ``kind/binary`` and ``kind/open`` (structural "query"):
  exact_match by type of question, where the file has it.

Headline: ``exact_match``. Chance: the best single answer to all questions asked (its share of the
truths), which is what a model can learn without pictures; large on a handful of questions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quota_jax.errors import QuotaError
from quota_jax.evaluate.answers import without_punctuation
from quota_jax.evaluate.pictures import find_picture
from quota_jax.evaluate.task import Instance, PictureSource, Scores, Settings, Task
from quota_jax.evaluate.tasks.numbers import best_constant, percent, percent_by
from quota_jax.evaluate.tasks.parquet import no_files, parquet_files, read_table
from quota_jax.evaluate.tasks.pope import SHORT_ANSWER
from quota_jax.evaluate.tasks.records import Keys, Row, as_row, filled, json_object
from quota_jax.evaluate.tasks.subset import first

QUESTIONS = "testdev_balanced_questions.json"
PARQUET = ("testdev_balanced_instructions/testdev-*.parquet",)
PARQUET_PICTURES = ("testdev_balanced_images/testdev-*.parquet",)
STRUCTURAL = ("verify", "query", "choose", "logical", "compare")
SEMANTIC = ("obj", "attr", "cat", "rel", "global")


@dataclass(frozen=True, kw_only=True)
class Gqa(Task):
    """Both wordings of the prompts are the same."""

    def _read(self, data: Path, prompts: str, limit: int | None) -> list[Instance]:
        folder = data / self.name
        path = folder / QUESTIONS
        if path.exists():
            entries = json_object(data, path).items()
            rows = [(key, as_row(entry, f"{path}: question {key!r}")) for key, entry in entries]
            filled([row for _, row in rows], path)
            return [
                _instance(
                    key,
                    row,
                    find_picture(
                        data,
                        [folder / "images"],
                        row.identifier("imageId"),
                        row.where,
                        suffixes=(".jpg", ".png"),
                    ),
                )
                for key, row in first([[[row] for row in rows]], limit)
            ]
        return self._read_parquet(data, limit)

    def _read_parquet(self, data: Path, limit: int | None) -> list[Instance]:
        folder = data / self.name
        files = parquet_files(data, folder, PARQUET)
        if not files:
            raise no_files(folder, QUESTIONS, PARQUET)
        picture_files = parquet_files(data, folder, PARQUET_PICTURES)
        if not picture_files:
            raise QuotaError(f"{folder}: no parquet files {PARQUET_PICTURES[0]}")
        pictures = read_table(picture_files)
        seen = Keys()
        places = {
            seen.new(row.identifier("id"), row): place for place, row in enumerate(pictures.rows)
        }
        keys = Keys()
        instances = []
        for row in first([[[row] for row in read_table(files, None).rows]], limit):
            image = row.identifier("imageId")
            if image not in places:
                raise row.fail(f"no picture {image!r} in {picture_files[0].parent}")
            key = keys.new(row.identifier("id"), row)
            instances.append(_instance(key, row, pictures.picture(places[image])))
        return instances

    def _score(self, instances: Sequence[Instance], answers: Sequence[str]) -> Scores:
        truths = [each.truth for each in instances]
        hits = [
            float(without_punctuation(answer) == without_punctuation(truth["answer"]))
            for truth, answer in zip(truths, answers, strict=True)
        ]
        structural = [truth.get("structural", "") for truth in truths]
        kinds = [name and ("open" if name == "query" else "binary") for name in structural]
        return Scores(
            headline="exact_match",
            metrics={
                "exact_match": percent(hits),
                "official_accuracy": percent(
                    answer.rstrip(".").lower() == truth["answer"]
                    for truth, answer in zip(truths, answers, strict=True)
                ),
                **percent_by("kind", kinds, hits),
                **percent_by("structural", structural, hits),
                **percent_by("semantic", [t.get("semantic", "") for t in truths], hits),
            },
            units={each.key: 100 * hit for each, hit in zip(instances, hits, strict=True)},
            chance=best_constant({without_punctuation(t["answer"]): 1.0} for t in truths),
        )


def _instance(key: str, row: Row, picture: PictureSource) -> Instance:
    truth = {"answer": row.text("answer"), **_types(row)}
    prompt = row.text("question") + SHORT_ANSWER
    return Instance(key=key, prompt=prompt, pictures=(picture,), truth=truth)


def _types(row: Row) -> Mapping[str, Any]:
    """The question's types, where the file has them."""
    types = row.fields.get("types")
    if types is None:
        return {}
    types = as_row(types, f"{row.where}: 'types'")
    known = {"structural": STRUCTURAL, "semantic": SEMANTIC}
    return {
        name: types.one_of(name, allowed) for name, allowed in known.items() if name in types.fields
    }


TASK = Gqa(name="gqa", settings=Settings(max_new_tokens=16))
