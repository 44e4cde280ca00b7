"""Rows of a JSON list that may be larger than memory: found in one pass, then read one by one.

LLaVA's training list has 1 GB. A pass keeps two numbers a row and a piece of the file (1 MiB, or
the longest row where that is more).
"""

from __future__ import annotations

import json
import re
from array import array
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from quota_jax.errors import QuotaError

PIECE = 2**20
LONGEST_ROW = 2**26
_BLANK = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True, kw_only=True, slots=True)
class JsonRows:
    """The objects of a list in a JSON file: the file's own, or that called ``name`` in an
    object.

    Bytes ``starts[i]`` to ``ends[i]`` are row ``numbers[i]`` of the list, counted from 0; rows that
    ``keep`` refused are left out.
    """

    path: Path
    starts: array[int] = field(default_factory=lambda: array("q"))
    ends: array[int] = field(default_factory=lambda: array("q"))
    numbers: array[int] = field(default_factory=lambda: array("q"))

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        name: str | None = None,
        keep: Callable[[Mapping[str, Any]], bool] | None = None,
    ) -> JsonRows:
        """Finds the rows.

        Raises:
          QuotaError: no such list, an entry that is no object or has more than 64 MiB.
        """
        rows = cls(path=path)
        size = path.stat().st_size if path.is_file() else 0
        bar = tqdm(total=size, desc=path.name, unit="B", unit_scale=True, disable=None, leave=False)
        with bar:
            for number, (start, end, value) in enumerate(_Scanner(path).rows(name)):
                bar.update(end - bar.n)
                if not isinstance(value, dict):
                    raise QuotaError(f"{path}: row {number}: expected an object")
                if keep is None or keep(value):
                    rows.starts.append(start)
                    rows.ends.append(end)
                    rows.numbers.append(number)
        return rows

    def __len__(self) -> int:
        return len(self.starts)

    def where(self, place: int) -> str:
        """What errors call a row."""
        return f"{self.path}: row {self.numbers[place]}"

    def __getitem__(self, place: int) -> dict[str, Any]:
        try:
            with open(self.path, "rb") as file:
                file.seek(self.starts[place])
                return dict(json.loads(file.read(self.ends[place] - self.starts[place])))
        except OSError as error:
            raise QuotaError(f"{self.path}: cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise QuotaError(f"{self.where(place)}: not valid JSON: {error}") from None


class _Scanner:
    """Parses a file piece by piece as Latin-1, in which characters and bytes count the same.

    Structure and keys of JSON are ASCII; texts are read again as UTF-8 by whoever wants a row.
    """

    def __init__(self, path: Path):
        self.path = path
        self.decoder = json.JSONDecoder(strict=True)
        self.text = ""
        self.place = 0  # in ``text``, which begins at byte ``before`` of the file
        self.before = 0

    def rows(self, name: str | None) -> Iterator[tuple[int, int, Any]]:
        try:
            with open(self.path, "rb") as self.file:
                if self.file.read(len(BOM_UTF8)) == BOM_UTF8:
                    self.before = len(BOM_UTF8)
                else:
                    self.file.seek(0)
                if name is not None:
                    self._enter(name)
                yield from self._list("a list" if name is None else f"a list {name!r}")
                if name is None and self._next():
                    raise self._broken("something follows the list")
        except OSError as error:
            raise QuotaError(f"{self.path}: cannot be read: {error.strerror}") from None

    def _list(self, expected: str) -> Iterator[tuple[int, int, Any]]:
        if self._next() != "[":
            raise QuotaError(f"{self.path}: expected {expected}")
        self.place += 1
        while (mark := self._next()) != "]":
            yield self._value()
            if (mark := self._next()) == ",":
                self.place += 1
                if self._next() == "]":
                    raise self._broken("a comma before the end of the list")
            elif mark != "]":
                raise self._broken("expected ',' or ']'")
        self.place += 1

    def _enter(self, name: str) -> None:
        """Goes to the value of a key of the object that the file holds."""
        if self._next() != "{":
            raise QuotaError(f"{self.path}: expected an object with a list {name!r}")
        self.place += 1
        while (mark := self._next()) != "}":
            key = self._value()[2]
            if not isinstance(key, str) or self._next() != ":":
                raise self._broken("expected a key and ':'")
            self.place += 1
            self._next()
            if key == name:
                return
            self._value()
            if (mark := self._next()) == ",":
                self.place += 1
            elif mark != "}":
                raise self._broken("expected ',' or '}'")
        raise QuotaError(f"{self.path}: expected a list {name!r}")

    def _value(self) -> tuple[int, int, Any]:
        """The value here: its first byte, the byte after it, and itself."""
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.place)
            except (ValueError, RecursionError) as error:
                if isinstance(error, RecursionError) or not self._more():
                    raise self._broken(str(error).partition(": line")[0]) from None
                continue
            # A number at the end of the piece may go on.
            if end == len(self.text) and self._more():
                continue
            start, self.place = self.place, end
            return self.before + start, self.before + end, value

    def _next(self) -> str:
        """The next character that is not blank; "" at the end of the file."""
        while True:
            found = _BLANK.match(self.text, self.place)
            self.place = found.end() if found else self.place
            if self.place < len(self.text):
                return self.text[self.place]
            if not self._more():
                return ""

    def _more(self) -> bool:
        """Reads on, doubling what is held of a long row; False at the end of the file."""
        held = len(self.text) - self.place
        if held > LONGEST_ROW:
            raise self._broken(f"a row of more than {LONGEST_ROW} bytes")
        piece = self.file.read(max(PIECE, held)).decode("latin-1")
        self.before += self.place
        self.text, self.place = self.text[self.place :] + piece, 0
        return bool(piece)

    def _broken(self, problem: str) -> QuotaError:
        return QuotaError(
            f"{self.path}: not valid JSON at byte {self.before + self.place}: {problem}"
        )
