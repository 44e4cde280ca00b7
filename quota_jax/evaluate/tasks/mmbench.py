"""MMBench (Liu et al. 2023, arXiv 2307.06281), English dev: choices, asked in every rotation.

Files: one ``*.tsv`` with pictures in base64 (a picture cell may name another row's index instead);
or parquet. Rows whose index is 1,000,000 or more are rotations of the row with the rest as index;
a question and its rotations form a group. A limit takes whole groups.

Metrics, in percent:

- ``circular_accuracy``: lmms-eval's task mmbench_en_dev_static (its gpt_eval_score): groups whose
  answers are all right. Letters are inferred by MMBench's two rules, then searched for. As on the
  hub, a missing option is the text "nan" to these rules, so "banana" contains several options.
- ``plain_accuracy``: unrotated questions that are right, by the same rules.
- ``official_circular_accuracy``, ``official_plain_accuracy``: MMBench's two rules alone, over the
  options that exist. Where these find no letter its script asks a language model; here the answer
  is wrong.
- ``category/...``, ``l2_category/...``: circular_accuracy by category, where the file has them.

Headline: ``circular_accuracy``; a unit is a group. Chance: all rotations guessed right, the mean
over groups of the product of 1 / options.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from quota_jax.errors import QuotaError
from quota_jax.evaluate.answers import infer_option, search_letter
from quota_jax.evaluate.pictures import CellPicture, decode_base64
from quota_jax.evaluate.task import Instance, PictureSource, Scores, Settings, Task
from quota_jax.evaluate.tasks.numbers import percent, percent_by
from quota_jax.evaluate.tasks.parquet import no_files, parquet_files, read_table
from quota_jax.evaluate.tasks.records import Keys, Row, filled, table_rows
from quota_jax.evaluate.tasks.subset import first, grouped

PARQUET = ("en/dev-*.parquet", "dev-*.parquet", "*.parquet")
ROTATION = 1_000_000
LETTER_ANSWER = "Answer with the option's letter from the given choices directly."
# A shorter picture cell is the index of the row that has the picture.
_SHORTEST_PICTURE = 64


@dataclass(frozen=True, kw_only=True)
class MmBench(Task):
    """lmms-eval: hint, question and "There are several options:" in one line, an empty line before
    the request. LLaVA: hint and question in lines of their own; options end at a missing one."""

    def _read(self, data: Path, prompts: str, limit: int | None) -> list[Instance]:
        folder = data / self.name
        paths = sorted(folder.glob("*.tsv"))
        if len(paths) > 1:
            raise QuotaError(f"{folder}: holds {len(paths)} *.tsv files, one is expected")
        if paths:
            rows, pictures = _read_table(data, paths[0])
        elif files := parquet_files(data, folder, PARQUET):
            table = read_table(files)
            rows, pictures = table.rows, table
        else:
            raise no_files(folder, "*.tsv", PARQUET)
        keys = Keys()
        indices = [row.integer("index") for row in rows]
        for index, row in zip(indices, rows, strict=True):
            keys.new(str(index), row)
        groups = grouped((index % ROTATION, place) for place, index in enumerate(indices))
        for group in groups:
            group.sort(key=indices.__getitem__)
            if indices[group[0]] >= ROTATION:
                index = indices[group[0]]
                raise rows[group[0]].fail(f"rotation {index} of no question {index % ROTATION}")
        return [
            _instance(rows[place], indices[place], pictures.picture(place), prompts)
            for place in first([groups], limit)
        ]

    def _score(self, instances: Sequence[Instance], answers: Sequence[str]) -> Scores:
        groups = grouped(
            (each.truth["index"] % ROTATION, place) for place, each in enumerate(instances)
        )
        mains = [min(group, key=lambda place: instances[place].truth["index"]) for group in groups]
        metrics: dict[str, float] = {}
        circular: list[float] = []
        for prefix, infer in (("official_", _official_letter), ("", _letter)):
            hits = [
                infer(answer, each.truth["options"]) == each.truth["answer"]
                for each, answer in zip(instances, answers, strict=True)
            ]
            circular = [float(all(hits[place] for place in group)) for group in groups]
            metrics[f"{prefix}circular_accuracy"] = percent(circular)
            metrics[f"{prefix}plain_accuracy"] = percent(hits[place] for place in mains)
        for name in ("category", "l2_category"):
            labels = [instances[place].truth.get(name, "") for place in mains]
            metrics |= percent_by(name, labels, circular)
        return Scores(
            headline="circular_accuracy",
            metrics=metrics,
            units={
                instances[place].key: 100 * hit for place, hit in zip(mains, circular, strict=True)
            },
            chance=percent(
                math.prod(1 / len(instances[place].truth["options"]) for place in group)
                for group in groups
            ),
        )


@dataclass(frozen=True, kw_only=True)
class _Cells:
    """Pictures of a table's rows."""

    pictures: Sequence[PictureSource]

    def picture(self, place: int) -> PictureSource:
        return self.pictures[place]


def _read_table(data: Path, path: Path) -> tuple[list[Row], _Cells]:
    """Rows without their pictures' cells, which are megabytes, and the pictures' places."""
    rows: list[Row] = []
    found: list[CellPicture | str] = []
    indices: dict[str, CellPicture] = {}
    for table_row in table_rows(data, path):
        row = table_row.row
        cell = row.text("image").strip()
        rest = {name: value for name, value in row.fields.items() if name != "image"}
        rows.append(Row(where=row.where, fields=rest))
        if len(cell) < _SHORTEST_PICTURE and cell.isdigit():
            found.append(cell)
            continue
        decode_base64(cell, row.where)
        picture = CellPicture(
            path=path, line=table_row.line, start=table_row.find(cell), length=len(cell)
        )
        found.append(picture)
        indices[str(row.integer("index"))] = picture
    filled(rows, path)
    pictures = []
    for row, picture in zip(rows, found, strict=True):
        if isinstance(picture, str):
            if picture not in indices:
                raise row.fail(f"no picture in row {picture}, which 'image' refers to")
            picture = indices[picture]
        pictures.append(picture)
    return rows, _Cells(pictures=pictures)


def _instance(row: Row, index: int, picture: PictureSource, prompts: str) -> Instance:
    options = {letter: text for letter in "ABCDE" if (text := row.optional(letter))}
    if len(options) < 2:
        raise row.fail(f"expected two options or more, got {len(options)}")
    answer = row.one_of("answer", list(options))
    question, hint = row.text("question"), row.optional("hint")
    write = _llava_prompt if prompts == "llava" else _lmms_prompt
    level = "L2-category" if "L2-category" in row.fields else "l2-category"
    return Instance(
        key=str(index),
        prompt=write(question, hint, options),
        pictures=(picture,),
        truth={
            "index": index,
            "answer": answer,
            "options": options,
            "category": row.optional("category"),
            "l2_category": row.optional(level),
        },
    )


def _lmms_prompt(question: str, hint: str, options: Mapping[str, str]) -> str:
    start = f"{hint} {question}" if hint else question
    lines = "".join(f"\n{letter}. {text}" for letter, text in options.items())
    # Line breaks at the end of the last option go.
    body = f"{start} " + f"There are several options:{lines}".rstrip("\n")
    return f"{body}\n\n{LETTER_ANSWER}"


def _llava_prompt(question: str, hint: str, options: Mapping[str, str]) -> str:
    lines = [hint, question] if hint else [question]
    for letter in "ABCD":
        if options.get(letter, "none").lower() == "none":
            break
        lines.append(f"{letter}. {options[letter]}")
    return "\n".join([*lines, LETTER_ANSWER])


def _letter(answer: str, options: Mapping[str, str]) -> str:
    texts = {letter: options.get(letter, "nan") for letter in "ABCD"}
    return infer_option(answer, texts) or search_letter(answer, "ABCD")


def _official_letter(answer: str, options: Mapping[str, str]) -> str:
    return infer_option(answer, options)


TASK = MmBench(name="mmbench", settings=Settings(max_new_tokens=1024, until=("ASSISTANT:",)))
