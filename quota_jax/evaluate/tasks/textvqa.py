"""TextVQA (Singh et al. 2019, arXiv 1904.08920), validation: read text in a picture.

Files: ``TextVQA_0.5.1_val.json`` and ``train_images/<image_id>.{jpg,png}``; or parquet. The prompts
of LLaVA name recognized words: from the rows' ``ocr_tokens``, else from
``TextVQA_Rosetta_OCR_v0.2_val.json`` beside the questions.

Metrics, in percent, of texts normalized as in `quota_jax.evaluate.vqa_text`:

- ``vqa_accuracy``: mean over ways to leave one of the ten answers out of min(1, equal answers / 3).
  lmms-eval calls it exact_match; LLaVA's script gives the same number.
- ``exact_match_any``: equal to one of the ten answers.

Headline: ``vqa_accuracy``. Chance: the best single answer to all questions asked, scored the same
way; large on a handful of questions.

lmms-eval sets no limit of tokens, so a model's default holds (1024 for LLaVA, 128 for Qwen2.5-VL);
128 is taken.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quota_jax.evaluate.pictures import find_picture
from quota_jax.evaluate.task import Instance, PictureSource, Scores, Settings, Task
from quota_jax.evaluate.tasks.numbers import best_constant, percent
from quota_jax.evaluate.tasks.parquet import no_files, parquet_files, read_table
from quota_jax.evaluate.tasks.pope import SHORT_ANSWER
from quota_jax.evaluate.tasks.records import Keys, Row, json_entries, json_object
from quota_jax.evaluate.tasks.subset import first
from quota_jax.evaluate.vqa_text import normalize_vqa

QUESTIONS = "TextVQA_0.5.1_val.json"
WORDS = "TextVQA_Rosetta_OCR_v0.2_val.json"
PARQUET = ("data/validation-*.parquet", "validation-*.parquet", "*.parquet")
ANSWERS = 10


@dataclass(frozen=True, kw_only=True)
class TextVqa(Task):
    """Both wordings write the question with one capital, at its start; LLaVA's adds the words that
    a text recognizer read."""

    def _read(self, data: Path, prompts: str, limit: int | None) -> list[Instance]:
        folder = data / self.name
        path = folder / QUESTIONS
        keys = Keys()
        if path.exists():
            rows = json_entries(path, json_object(data, path), "data")
            words = _recognized(data, folder / WORDS) if prompts == "llava" else {}
            return [
                _instance(
                    row,
                    keys,
                    find_picture(
                        data,
                        [folder / "train_images"],
                        row.identifier("image_id"),
                        row.where,
                        suffixes=(".jpg", ".png"),
                    ),
                    prompts,
                    words.get(row.identifier("image_id")),
                )
                for row in first([[[row] for row in rows]], limit)
            ]
        files = parquet_files(data, folder, PARQUET)
        if not files:
            raise no_files(folder, QUESTIONS, PARQUET)
        table = read_table(files)
        return [
            _instance(row, keys, table.picture(place), prompts, None)
            for place, row in first([[[pair] for pair in enumerate(table.rows)]], limit)
        ]

    def _score(self, instances: Sequence[Instance], answers: Sequence[str]) -> Scores:
        credits = [_credit(each.truth["answers"]) for each in instances]
        given = [normalize_vqa(answer) for answer in answers]
        soft = [credit.get(answer, 0.0) for credit, answer in zip(credits, given, strict=True)]
        return Scores(
            headline="vqa_accuracy",
            metrics={
                "vqa_accuracy": percent(soft),
                "exact_match_any": percent(
                    answer in credit for credit, answer in zip(credits, given, strict=True)
                ),
            },
            units={each.key: 100 * value for each, value in zip(instances, soft, strict=True)},
            chance=best_constant(credits),
        )


def _credit(answers: Sequence[str]) -> dict[str, float]:
    """Normalized answer -> its accuracy: the others that agree, out of three, over leaving out each
    of the answers in turn."""
    counts = Counter(normalize_vqa(answer) for answer in answers)
    whole = len(answers)
    return {
        answer: (count * min(1, (count - 1) / 3) + (whole - count) * min(1, count / 3)) / whole
        for answer, count in counts.items()
    }


def _recognized(data: Path, path: Path) -> dict[str, list[str]]:
    """Picture -> recognized words; nothing where the file is absent."""
    if not path.exists():
        return {}
    rows = json_entries(path, json_object(data, path), "data")
    return {row.identifier("image_id"): _words(row) for row in rows}


def _words(row: Row) -> list[str]:
    """The row's recognized words, of which there may be none."""
    return [] if row.fields.get("ocr_tokens") == [] else row.texts("ocr_tokens")


def _instance(
    row: Row, keys: Keys, picture: PictureSource, prompts: str, words: list[str] | None
) -> Instance:
    question = row.text("question").capitalize()
    if prompts == "llava":
        if "ocr_tokens" in row.fields:
            words = _words(row)
        if words is None:
            raise row.fail(f"prompts 'llava' need 'ocr_tokens', here or in {WORDS}")
        question += f"\nReference OCR token: {', '.join(words)}"
    answers = row.texts("answers")
    if len(answers) != ANSWERS:
        raise row.fail(f"expected {ANSWERS} answers, got {len(answers)}")
    return Instance(
        key=keys.new(row.identifier("question_id"), row),
        prompt=question + SHORT_ANSWER,
        pictures=(picture,),
        truth={"answers": answers},
    )


TASK = TextVqa(name="textvqa", settings=Settings(max_new_tokens=128, until=("ASSISTANT:",)))
