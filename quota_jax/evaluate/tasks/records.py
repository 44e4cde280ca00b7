"""Rows of question files: read, checked, and named by file and line in every error."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from quota_jax.errors import QuotaError
from quota_jax.evaluate.pictures import inside

# What pandas and the benchmarks write for an empty cell.
MISSING = ("", "nan")
# The csv module's own limit is 131,072 characters a cell; a picture in base64 has more.
_MAX_CELL = 2**31 - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """Fields of one question; ``where`` names its file and line, entry or id."""

    where: str
    fields: Mapping[str, Any]

    def fail(self, problem: str) -> QuotaError:
        return QuotaError(f"{self.where}: {problem}")

    def text(self, name: str) -> str:
        """A text that is not blank."""
        if name not in self.fields:
            raise self.fail(f"{name!r} is missing")
        value = self.fields[name]
        if not isinstance(value, str) or not value.strip():
            raise self.fail(f"{name!r} must be a text that is not empty, got {value!r}")
        return value

    def optional(self, name: str) -> str:
        """A text, "" where it is absent, null or nan."""
        value = self.fields.get(name)
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return ""
        if not isinstance(value, str):
            raise self.fail(f"{name!r} must be a text, got {value!r}")
        return "" if value.strip() in MISSING else value

    def integer(self, name: str) -> int:
        """A whole number that is not negative, possibly written as text."""
        if name not in self.fields:
            raise self.fail(f"{name!r} is missing")
        value = self.fields[name]
        if isinstance(value, str) and value.isascii() and value.isdigit():
            return int(value)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self.fail(f"{name!r} must be a whole number, got {value!r}")
        return value

    def identifier(self, name: str) -> str:
        """A text or whole number, as text."""
        value = self.fields.get(name)
        return str(value) if type(value) is int else self.text(name)

    def one_of(self, name: str, allowed: Sequence[str]) -> str:
        value = self.text(name)
        if value not in allowed:
            raise self.fail(f"{name!r} must be one of {', '.join(allowed)}, got {value!r}")
        return value

    def texts(self, name: str) -> list[str]:
        """A list of texts that is not empty."""
        value = self.fields.get(name)
        if not isinstance(value, list) or not value or not all(type(v) is str for v in value):
            raise self.fail(f"{name!r} must be a list of texts, got {value!r}")
        return value


@dataclass(frozen=True, slots=True)
class Keys:
    """Refuses an id that has been seen before."""

    _seen: dict[str, str] = field(default_factory=dict)

    def new(self, key: str, row: Row) -> str:
        if key in self._seen:
            raise row.fail(f"the id {key!r} occurs twice, first in {self._seen[key]}")
        self._seen[key] = row.where
        return key


def filled(rows: list[Row], path: Path) -> list[Row]:
    """``rows``, unless there are none."""
    if not rows:
        raise QuotaError(f"{path}: holds no question")
    return rows


def read_text(root: Path, path: Path) -> str:
    """A UTF-8 file inside the data folder ``root``."""
    inside(root, path, str(path))
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise QuotaError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise QuotaError(f"{path}: not UTF-8: {error}") from None


def parse_json(text: str, where: str) -> Any:
    """JSON in which no object has a key twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise QuotaError(f"{where}: the key {twice!r} occurs twice")
        return found

    try:
        return json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise QuotaError(f"{where}: not valid JSON: {error}") from None


def json_lines(root: Path, path: Path) -> list[Row]:
    """The objects of a file with one per line; blank lines do not count."""
    rows = []
    for number, line in enumerate(read_text(root, path).split("\n"), 1):
        if line.strip():
            where = f"{path}: line {number}"
            rows.append(as_row(parse_json(line, where), where))
    return filled(rows, path)


def json_object(root: Path, path: Path) -> dict[str, Any]:
    """The object that a JSON file holds."""
    content = parse_json(read_text(root, path), str(path))
    if not isinstance(content, dict):
        raise QuotaError(f"{path}: expected an object, got {type(content).__name__}")
    return content


def json_entries(path: Path, content: Mapping[str, Any], name: str) -> list[Row]:
    """The objects of the list ``content[name]``, counted from 0."""
    entries = content.get(name)
    if not isinstance(entries, list):
        raise QuotaError(f"{path}: expected a list {name!r}")
    named = ((entry, f"{path}: {name}[{place}]") for place, entry in enumerate(entries))
    return filled([as_row(entry, where) for entry, where in named], path)


def as_row(entry: Any, where: str) -> Row:
    if not isinstance(entry, dict):
        raise QuotaError(f"{where}: expected an object, got {type(entry).__name__}")
    return Row(where=where, fields=entry)


@dataclass(frozen=True, kw_only=True, slots=True)
class TableRow:
    """A row of a table. line: where it begins; start: its first byte; raw: its bytes."""

    row: Row
    line: int
    start: int
    raw: bytes

    def find(self, text: str) -> int:
        """The first byte in the file of a cell's text that needs no quotes."""
        return self.start + self.raw.index(text.encode())


def table_rows(root: Path, path: Path) -> Iterator[TableRow]:
    """Rows of a tab-separated file with a header; cells may be quoted and hold line breaks.

    Raises:
        QuotaError: no header, a column twice, a row of another width, broken quotes, no UTF-8.
    """
    inside(root, path, str(path))
    header: list[str] | None = None
    for line, start, raw, cells in _parsed(path):
        where = f"{path}: line {line}"
        if header is None:
            header = cells
            if len(set(header)) < len(header):
                raise QuotaError(f"{where}: a column occurs twice")
        elif len(cells) == len(header):
            row = Row(where=where, fields=dict(zip(header, cells, strict=True)))
            yield TableRow(row=row, line=line, start=start, raw=raw)
        elif cells:
            raise QuotaError(f"{where}: {len(cells)} cells under {len(header)} columns")
    if header is None:
        raise QuotaError(f"{path}: is empty")


def _parsed(path: Path) -> Iterator[tuple[int, int, bytes, list[str]]]:
    """(line where it begins, first byte, bytes, cells) of each row."""
    lines = offset = 0
    own: list[bytes] = []

    def decoded(file: BinaryIO) -> Iterator[str]:
        nonlocal lines
        for raw in file:
            lines += 1
            own.append(raw)
            try:
                yield raw.decode("utf-8-sig" if lines == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise QuotaError(f"{path}: line {lines}: not UTF-8: {error.reason}") from None

    try:
        with open(path, "rb") as file:
            reader = csv.reader(decoded(file), delimiter="\t", strict=True)
            while True:
                first = lines + 1
                try:
                    cells = _next(reader)
                except csv.Error as error:
                    raise QuotaError(f"{path}: line {first}: {error}") from None
                if cells is None:
                    return
                raw = b"".join(own)
                own.clear()
                yield first, offset, raw, cells
                offset += len(raw)
    except OSError as error:
        raise QuotaError(f"{path}: cannot be read: {error.strerror}") from None


def _next(reader: Iterator[list[str]]) -> list[str] | None:
    # The limit is the whole process's: it is put back before anybody else runs.
    before = csv.field_size_limit(_MAX_CELL)
    try:
        return next(reader, None)
    finally:
        csv.field_size_limit(before)
