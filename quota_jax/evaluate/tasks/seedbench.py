"""SEED-Bench (Li et al. 2023, arXiv 2307.16125), its questions about single pictures: four choices.

Files: ``SEED-Bench.json`` and pictures in ``images`` or ``SEED-Bench-image``; or parquet. Questions
about videos (data_type "video") are not part of SEED-image and are left out.

Metrics, in percent:

- ``seed_image``: lmms-eval. The first character is the answer, case aside.
- ``official_accuracy``: LLaVA's script. The whole text is the letter.
- ``question_type/...``: seed_image by type of question.

Headline: ``seed_image``. Chance: 25.

lmms-eval sets no limit of tokens, so a model's default holds (1024 for LLaVA, 128 for Qwen2.5-VL);
16 give the same scores, since all but the first characters only matter by being there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quota_jax.evaluate.answers import first_letter
from quota_jax.evaluate.pictures import find_picture
from quota_jax.evaluate.task import Instance, PictureSource, Scores, Settings, Task
from quota_jax.evaluate.tasks.mmbench import LETTER_ANSWER
from quota_jax.evaluate.tasks.numbers import percent, percent_by
from quota_jax.evaluate.tasks.parquet import no_files, parquet_files, read_table
from quota_jax.evaluate.tasks.records import Keys, Row, filled, json_entries, json_object
from quota_jax.evaluate.tasks.subset import first

QUESTIONS = "SEED-Bench.json"
PARQUET = ("data/test-*.parquet", "test-*.parquet", "*.parquet")
TYPES = {
    1: "Scene Understanding",
    2: "Instance Identity",
    3: "Instance Attributes",
    4: "Instance Location",
    5: "Instances Counting",
    6: "Spatial Relation",
    7: "Instance Interaction",
    8: "Visual Reasoning",
    9: "Text Understanding",
}


@dataclass(frozen=True, kw_only=True)
class SeedBench(Task):
    """Both wordings of the prompts are the same."""

    def _read(self, data: Path, prompts: str, limit: int | None) -> list[Instance]:
        folder = data / self.name
        path = folder / QUESTIONS
        keys = Keys()
        if path.exists():
            rows = json_entries(path, json_object(data, path), "questions")
            places = [folder / "images", folder / "SEED-Bench-image"]
            return [
                _instance(
                    row,
                    keys,
                    find_picture(
                        data,
                        places,
                        row.identifier("data_id"),
                        row.where,
                        suffixes=("", ".jpg", ".png"),
                    ),
                )
                for _, row in _first_images(rows, path, limit)
            ]
        files = parquet_files(data, folder, PARQUET)
        if not files:
            raise no_files(folder, QUESTIONS, PARQUET)
        table = read_table(files)
        return [
            _instance(row, keys, table.picture(place))
            for place, row in _first_images(table.rows, files[0], limit)
        ]

    def _score(self, instances: Sequence[Instance], answers: Sequence[str]) -> Scores:
        hits = [
            float(first_letter(answer) == each.truth["answer"].lower())
            for each, answer in zip(instances, answers, strict=True)
        ]
        official = (
            answer == each.truth["answer"] for each, answer in zip(instances, answers, strict=True)
        )
        types = [TYPES[each.truth["question_type_id"]] for each in instances]
        return Scores(
            headline="seed_image",
            metrics={
                "seed_image": percent(hits),
                "official_accuracy": percent(official),
                **percent_by("question_type", types, hits),
            },
            units={each.key: 100 * hit for each, hit in zip(instances, hits, strict=True)},
            chance=25.0,
        )


def _first_images(rows: Sequence[Row], path: Path, limit: int | None) -> list[tuple[int, Row]]:
    images = [
        (place, row)
        for place, row in enumerate(rows)
        if row.one_of("data_type", ("image", "video")) == "image"
    ]
    filled([row for _, row in images], path)
    return first([[[each] for each in images]], limit)


def _instance(row: Row, keys: Keys, picture: PictureSource) -> Instance:
    question = row.text("question")
    options = [f"{letter}. {_choice(row, letter)}" for letter in "ABCD"]
    kind = row.integer("question_type_id")
    if kind not in TYPES:
        raise row.fail(f"'question_type_id' of a picture must be 1 to {len(TYPES)}, got {kind}")
    return Instance(
        key=keys.new(row.identifier("question_id"), row),
        prompt="\n".join([question, *options, LETTER_ANSWER]),
        pictures=(picture,),
        truth={"answer": row.one_of("answer", tuple("ABCD")), "question_type_id": kind},
    )


def _choice(row: Row, letter: str) -> str:
    """A choice; some official files hold bare numbers."""
    name = f"choice_{letter.lower()}"
    value = row.fields.get(name)
    return str(value) if type(value) in (int, float) else row.text(name)


TASK = SeedBench(name="seedbench", settings=Settings(max_new_tokens=16, until=("ASSISTANT:",)))
