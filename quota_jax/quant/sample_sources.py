"""Where calibration samples come from: official files, read as they are published.

LLaVA-Mix    a list of {"id", "image", "conversations": [{"from", "value"}]}
             (``llava_v1_5_mix665k.json``); the place of the picture in the question, ``<image>``,
             is left out, since the model's chat template has its own
TextVQA      ``TextVQA_0.5.1_train.json``; pictures ``<image_id>.jpg`` or ``.png``; the answer that
             most of the ten people gave
DocVQA       ``train_v1.0_withQT.json``; pictures as rows name them (``documents/...``); the first
             answer
ChartQA      ``train_human.json`` and ``train_augmented.json``; pictures ``<imgname>``
WikiText     text, JSON lines or parquet with a column "text"; a passage of some paragraphs

Questions of the three benchmarks get the request for a short answer that LLaVA's training and all
evaluations here put behind them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from quota_jax.errors import QuotaError
from quota_jax.evaluate.pictures import find_picture
from quota_jax.evaluate.tasks.parquet import read_table
from quota_jax.evaluate.tasks.pope import SHORT_ANSWER
from quota_jax.evaluate.tasks.records import Row
from quota_jax.quant.json_rows import JsonRows

PLACE = "<image>"
RESERVED = (PLACE, "<|image_pad|>", "<|video_pad|>")
"""Texts that stand for pictures in prompts."""
SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


class MissingPictureError(QuotaError):
    """A row's picture is not in its folder."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Draft:
    """What a sample will hold: turns of user and assistant, or a text without roles.

    origin: source and id of the row. where: its file and place, for errors.
    """

    origin: str
    where: str
    turns: tuple[str, ...] = ()
    text: str = ""
    picture: Path | None = None

    def shortened(self, limit: int) -> Draft:
        """At most ``limit`` characters, cut at the last blank before; turns behind are left out."""
        if not self.turns:
            return replace(self, text=_cut(self.text, limit))
        turns: list[str] = []
        for turn in self.turns:
            if shown := _cut(turn, limit):
                turns.append(shown)
            if shown != turn:
                break
            limit -= len(turn)
        return replace(self, turns=tuple(turns))

    def question(self) -> Draft:
        """Without the last answer."""
        return replace(self, turns=self.turns[: len(self.turns) - 1 + len(self.turns) % 2])


def _cut(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    head, blank, _ = text[: max(limit, 0) + 1].rpartition(" ")
    return (head if blank else text[: max(limit, 0)]).rstrip()


class Source(Protocol):
    """Rows that samples can be drawn from."""

    @property
    def name(self) -> str: ...

    def __len__(self) -> int: ...

    def draft(self, place: int) -> Draft:
        """The sample of a row.

        Raises:
          MissingPictureError: its picture is not there.
          QuotaError: the row is malformed, or its picture leads out of the folder.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Questions:
    """Rows of one or more JSON files. read: what a row becomes."""

    name: str
    files: tuple[JsonRows, ...]
    read: Callable[[Row, str], Draft]

    def __len__(self) -> int:
        return sum(map(len, self.files))

    def draft(self, place: int) -> Draft:
        for rows in self.files:
            if place < len(rows):
                where = rows.where(place)
                found = self.read(Row(where=where, fields=rows[place]), self.name)
                for text in found.turns:
                    if marker := next((each for each in RESERVED if each in text), None):
                        raise QuotaError(f"{where}: a text holds {marker!r}")
                return found
            place -= len(rows)
        raise IndexError(place)


def llava_mix(files: Sequence[Path], images: Path | None, *, text_only: bool = False) -> Questions:
    """Rows with a picture, and with ``text_only`` those without one too.

    Args:
      images: the folder in which rows name their pictures; None takes that of the first file.
    """
    folder = images or files[0].parent

    def keep(fields: Mapping[str, Any]) -> bool:
        return text_only or bool(fields.get("image"))

    return Questions(
        name="llava-mix",
        files=tuple(JsonRows.open(path, keep=keep) for path in files),
        read=partial(_read_llava, folder=folder),
    )


def _read_llava(row: Row, source: str, *, folder: Path) -> Draft:
    turns = row.fields.get("conversations")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise row.fail("'conversations' must be a list of objects")
    spoken = [Row(where=row.where, fields=turn) for turn in turns]
    roles = [SPEAKERS[turn.one_of("from", list(SPEAKERS))] for turn in spoken]
    # Some conversations begin with an answer, which LLaVA's training drops too.
    if roles[:1] == ["assistant"]:
        spoken, roles = spoken[1:], roles[1:]
    if not roles or any(role != ("user", "assistant")[i % 2] for i, role in enumerate(roles)):
        raise row.fail("'conversations' must alternate between human and gpt")
    texts = [turn.text("value") for turn in spoken]
    image = row.fields.get("image")
    if isinstance(image, list) and len(image) == 1:
        image = image[0]
    if image is not None and not isinstance(image, str):
        raise row.fail(f"'image' must be the name of one picture, got {image!r}")
    if image and PLACE in texts[0]:
        before, _, after = texts[0].partition(PLACE)
        texts[0] = f"{before.rstrip()}\n{after.lstrip()}".strip()
        if not texts[0]:
            raise row.fail("the question is empty")
    name = row.identifier("id") if "id" in row.fields else row.where.rpartition(" ")[2]
    return Draft(
        origin=f"{source} {name}",
        where=row.where,
        turns=tuple(text.strip() for text in texts),
        picture=_picture(row, folder, image) if image else None,
    )


def text_vqa(files: Sequence[Path], images: Path | None) -> Questions:
    """images: None takes ``train_images`` beside the first file."""
    folder = images or files[0].parent / "train_images"

    def read(row: Row, source: str) -> Draft:
        answers = Counter(row.texts("answers")) if "answers" in row.fields else {}
        return _short(
            row,
            f"{source} {row.identifier('question_id')}",
            max(answers, key=answers.__getitem__) if answers else None,
            _picture(row, folder, row.identifier("image_id"), (".jpg", ".png")),
        )

    rows = tuple(JsonRows.open(path, name="data") for path in files)
    return Questions(name="textvqa", files=rows, read=read)


def doc_vqa(files: Sequence[Path], images: Path | None) -> Questions:
    """images: None takes the folder of the first file."""
    folder = images or files[0].parent

    def read(row: Row, source: str) -> Draft:
        answer = row.texts("answers")[0] if "answers" in row.fields else None
        picture = _picture(row, folder, row.text("image"))
        return _short(row, f"{source} {row.identifier('questionId')}", answer, picture)

    rows = tuple(JsonRows.open(path, name="data") for path in files)
    return Questions(name="docvqa", files=rows, read=read)


def chart_qa(files: Sequence[Path], images: Path | None) -> Questions:
    """images: None takes ``png`` beside the first file."""
    folder = images or files[0].parent / "png"

    def read(row: Row, source: str) -> Draft:
        name = row.text("imgname")
        answer = row.identifier("label") if "label" in row.fields else None
        return _short(row, f"{source} {name}", answer, _picture(row, folder, name), "query")

    rows = tuple(JsonRows.open(path) for path in files)
    return Questions(name="chartqa", files=rows, read=read)


def _short(
    row: Row, origin: str, answer: str | None, picture: Path, question: str = "question"
) -> Draft:
    asked = row.text(question).strip() + SHORT_ANSWER
    turns = (asked,) if answer is None else (asked, answer.strip())
    if "" in turns:
        raise row.fail("the answer is empty")
    return Draft(origin=origin, where=row.where, turns=turns, picture=picture)


def _picture(row: Row, folder: Path, name: str, suffixes: Sequence[str] = ("",)) -> Path:
    try:
        return find_picture(folder, [folder], name, row.where, suffixes=suffixes).path
    except QuotaError as error:
        if any((folder / f"{name}{suffix}").is_file() for suffix in suffixes):
            raise
        raise MissingPictureError(str(error)) from None


@dataclass(frozen=True, kw_only=True)
class Passages:
    """Running text. A sample is a paragraph and those behind it, up to ``length`` characters.

    All text is held in memory. Empty lines and headings (``= Title =``) are left out.
    """

    paragraphs: Sequence[str]
    length: int
    name: str = "wikitext"

    @classmethod
    def open(cls, files: Sequence[Path], length: int) -> Passages:
        found = [text.strip() for path in files for text in _texts(path)]
        kept = [text for text in found if text and not (text[0] == text[-1] == "=")]
        if not kept:
            raise QuotaError(f"{files[0]}: holds no text")
        return cls(paragraphs=kept, length=length)

    def __len__(self) -> int:
        return len(self.paragraphs)

    def draft(self, place: int) -> Draft:
        taken: list[str] = []
        size = 0
        for text in islice(self.paragraphs, place, None):
            taken.append(text)
            size += len(text) + 1
            if size > self.length:
                break
        where = f"{self.name} paragraph {place}"
        text = "\n".join(taken)
        if marker := next((each for each in RESERVED if each in text), None):
            raise QuotaError(f"{where}: the text holds {marker!r}")
        return Draft(origin=f"{self.name} {place}", where=where, text=text)


def _texts(path: Path) -> list[str]:
    kind = path.suffix.lower()
    if kind == ".parquet":
        return [row.optional("text") for row in read_table([path], column=None).rows]
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise QuotaError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise QuotaError(f"{path}: not UTF-8: {error}") from None
    if kind not in (".jsonl", ".ndjson", ".json"):
        return lines
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise QuotaError(f"{where}: not valid JSON: {error}") from None
        if not isinstance(fields, dict) or not isinstance(fields.get("text"), str):
            raise QuotaError(f"{where}: expected an object with a 'text'")
        found.append(fields["text"])
    return found
