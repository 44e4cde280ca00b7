"""ScienceQA (Lu et al. 2022, arXiv 2209.09513), test problems with a picture: two choices or more.

Files: ``problems.json``, ``pid_splits.json`` and ``images/test/<id>/<image>``; or parquet
(ScienceQA-IMG, whose rows have no id: keys count them from 0). Problems without a picture are not
part of ScienceQA-IMG and are left out.

Metrics, in percent:

- ``exact_match``: lmms-eval. A lone letter, case aside, or a capital before a full stop.
- ``official_accuracy``: LLaVA's script. "B", "B. ..." or one "The answer is B.".
- ``subject/...`` and ``grade/G1-6``, ``grade/G7-12``: exact_match by subject and grade, where the
  file has them.

Headline: ``exact_match``. Chance: the mean of 1 / choices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quota_jax.errors import QuotaError
from quota_jax.evaluate.answers import LETTERS, science_letter, science_official_letter
from quota_jax.evaluate.pictures import find_picture
from quota_jax.evaluate.task import Instance, PictureSource, Scores, Settings, Task
from quota_jax.evaluate.tasks.mmbench import LETTER_ANSWER
from quota_jax.evaluate.tasks.numbers import percent, percent_by
from quota_jax.evaluate.tasks.parquet import no_files, parquet_files, read_table
from quota_jax.evaluate.tasks.records import Keys, Row, as_row, filled, json_object
from quota_jax.evaluate.tasks.subset import first

QUESTIONS, SPLITS = "problems.json", "pid_splits.json"
PARQUET = ("ScienceQA-IMG/test-*.parquet", "data/test-*.parquet", "test-*.parquet", "*.parquet")


@dataclass(frozen=True, kw_only=True)
class ScienceQa(Task):
    """lmms-eval: context where there is one, question, a line for each choice. LLaVA: its CQM-A
    format, choices in one line, then the same request."""

    def _read(self, data: Path, prompts: str, limit: int | None) -> list[Instance]:
        folder = data / self.name
        if (folder / QUESTIONS).exists():
            rows = _read_problems(data, folder)
            return [
                _instance(
                    row,
                    key,
                    find_picture(
                        data, [folder / "images" / "test" / key], row.text("image"), row.where
                    ),
                    prompts,
                )
                for key, row in first([[[each] for each in rows]], limit)
            ]
        files = parquet_files(data, folder, PARQUET)
        if not files:
            raise no_files(folder, QUESTIONS, PARQUET)
        table = read_table(files)
        with_pictures = [
            [(place, row)] for place, row in enumerate(table.rows) if place not in table.absent
        ]
        filled([row for group in with_pictures for _, row in group], files[0])
        return [
            _instance(row, str(place), table.picture(place), prompts)
            for place, row in first([with_pictures], limit)
        ]

    def _score(self, instances: Sequence[Instance], answers: Sequence[str]) -> Scores:
        truths = [each.truth for each in instances]
        letters = [LETTERS[truth["answer"]] for truth in truths]
        hits = [
            float(science_letter(answer) == letter)
            for letter, answer in zip(letters, answers, strict=True)
        ]
        official = (
            science_official_letter(answer) == letter
            for letter, answer in zip(letters, answers, strict=True)
        )
        return Scores(
            headline="exact_match",
            metrics={
                "exact_match": percent(hits),
                "official_accuracy": percent(official),
                **percent_by("subject", [truth["subject"] for truth in truths], hits),
                **percent_by("grade", [_grades(truth["grade"]) for truth in truths], hits),
            },
            units={each.key: 100 * hit for each, hit in zip(instances, hits, strict=True)},
            chance=percent(1 / truth["choices"] for truth in truths),
        )


def _read_problems(data: Path, folder: Path) -> list[tuple[str, Row]]:
    """Ids and rows of the test problems with a picture."""
    path = folder / QUESTIONS
    problems = json_object(data, path)
    split_path = folder / SPLITS
    test = json_object(data, split_path).get("test")
    if not isinstance(test, list):
        raise QuotaError(f"{split_path}: expected a list 'test'")
    keys, rows = Keys(), []
    for place, identifier in enumerate(test):
        split_row = Row(where=f"{split_path}: test[{place}]", fields={"id": identifier})
        key = keys.new(split_row.identifier("id"), split_row)
        if key not in problems:
            raise split_row.fail(f"{path} has no problem {key!r}")
        row = as_row(problems[key], f"{path}: problem {key!r}")
        if "image" not in row.fields:
            raise row.fail("'image' is missing (null where there is no picture)")
        if row.fields["image"] is not None:
            if not key.isalnum():
                raise row.fail("the id of a problem with a picture must be letters and digits")
            rows.append((key, row))
    filled([row for _, row in rows], split_path)
    return rows


def _instance(row: Row, key: str, picture: PictureSource, prompts: str) -> Instance:
    question, hint, choices = row.text("question"), row.optional("hint"), row.texts("choices")
    answer = row.integer("answer")
    if not 2 <= len(choices) <= len(LETTERS):
        raise row.fail(f"expected 2 to {len(LETTERS)} choices, got {len(choices)}")
    if answer >= len(choices):
        raise row.fail(f"'answer' is {answer}, but there are only {len(choices)} choices")
    write = _llava_prompt if prompts == "llava" else _lmms_prompt
    return Instance(
        key=key,
        prompt=write(question, hint, choices),
        pictures=(picture,),
        truth={
            "answer": answer,
            "choices": len(choices),
            "subject": row.optional("subject"),
            "grade": row.optional("grade"),
        },
    )


def _lmms_prompt(question: str, hint: str, choices: Sequence[str]) -> str:
    lines = [f"Context: {hint}"] if hint else []
    lines += [
        question,
        *(f"{letter}. {text}" for letter, text in zip(LETTERS, choices, strict=False)),
    ]
    return "\n".join([*lines, LETTER_ANSWER])


def _llava_prompt(question: str, hint: str, choices: Sequence[str]) -> str:
    options = " ".join(f"({letter}) {text}" for letter, text in zip(LETTERS, choices, strict=False))
    text = f"Context: {hint.strip() or 'N/A'}\nQuestion: {question}\nOptions: {options}"
    return f"{text.replace('  ', ' ').strip()}\n{LETTER_ANSWER}"


def _grades(grade: str) -> str:
    """The paper's two bands of "grade1" to "grade12"; "" for anything else."""
    number = grade.removeprefix("grade")
    if not number.isdigit():
        return ""
    return "G1-6" if int(number) <= 6 else "G7-12"


TASK = ScienceQa(name="scienceqa", settings=Settings(max_new_tokens=16))
