"""Predictions in files: an append-only journal while a run lasts, one ordered file at its end.

Both hold one JSON object a line. The journal is flushed to the disk after every batch and survives
a kill at any point; the line that a kill tore is dropped.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quota_jax.checkpoint.format import write_file
from quota_jax.errors import QuotaError


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """One answer.

    task, key: name the instance. prompt: digest of the token ids that the model saw, pictures left
    out. answer: text before the first stop text. tokens: generated tokens, stop id included.
    """

    task: str
    key: str
    prompt: str
    answer: str
    tokens: int

    @property
    def name(self) -> tuple[str, str]:
        return self.task, self.key

    def line(self) -> bytes:
        """The JSON object and a newline."""
        content = {name: getattr(self, name) for name in FIELDS}
        return json.dumps(content, ensure_ascii=False).encode() + b"\n"


FIELDS = {"task": str, "key": str, "prompt": str, "answer": str, "tokens": int}


def parse_lines(content: bytes, where: str, *, torn: bool = False) -> tuple[list[Prediction], int]:
    """Predictions and the bytes that they take; ``torn`` allows a damaged last line."""
    found, end = [], 0
    lines = content.split(b"\n")
    for number, line in enumerate(lines, 1):
        complete = number < len(lines)
        if not line and not complete:
            break
        try:
            if not complete:
                raise ValueError("it has no end")
            found.append(_parse(line))
        except (ValueError, TypeError, RecursionError) as error:
            last = not any(lines[number:])
            if torn and last:
                break
            raise QuotaError(f"{where}, line {number}: not a prediction: {error}") from None
        end += len(line) + 1
    return found, end


def _parse(line: bytes) -> Prediction:
    content: Any = json.loads(line)
    if not isinstance(content, dict) or set(content) != set(FIELDS):
        raise ValueError(f"it must hold {', '.join(FIELDS)}")
    for name, kind in FIELDS.items():
        if type(content[name]) is not kind:
            raise ValueError(f"{name} is {content[name]!r}")
    return Prediction(**content)


def read_predictions(path: Path) -> list[Prediction]:
    """The predictions of a finished run; a damaged file is named with its line."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise QuotaError(f"{path}: cannot be read: {error.strerror}") from None
    return parse_lines(content, str(path))[0]


def write_predictions(path: Path, predictions: Iterable[Prediction]) -> None:
    """Replaces the file by these predictions, in this order."""
    write_file(path, b"".join(prediction.line() for prediction in predictions))


class Journal:
    """The predictions of a run in progress; a second process that opens the same one is refused.

    ``read`` holds what an earlier process had written.
    """

    def __init__(self, path: Path):
        self.path = path
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            self._file = os.open(path, flags, 0o666)
        except OSError as error:
            raise QuotaError(f"{path}: cannot be written: {error.strerror}") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            content = path.read_bytes()
            self.read, end = parse_lines(content, str(path), torn=True)
            os.ftruncate(self._file, end)
            os.lseek(self._file, end, os.SEEK_SET)
        except BlockingIOError:
            self.close()
            raise QuotaError(f"{path.parent} is being written by another process") from None
        except BaseException:
            self.close()
            raise

    def append(self, predictions: Sequence[Prediction]) -> None:
        """Writes a batch; when this returns it is on the disk."""
        content = b"".join(prediction.line() for prediction in predictions)
        try:
            while content:
                content = content[os.write(self._file, content) :]
            os.fsync(self._file)
        except OSError as error:
            raise QuotaError(f"{self.path}: cannot be written: {error.strerror}") from None

    def close(self) -> None:
        """Lets go of the file."""
        os.close(self._file)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
