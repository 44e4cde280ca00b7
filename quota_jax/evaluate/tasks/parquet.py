"""The hub's parquet layout: rows of local parquet files through `datasets` (extra ``eval``).

`huggingface-cli download lmms-lab/POPE --repo-type dataset --local-dir DATA/pope` and its like put
the files where the tasks look for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quota_jax.errors import QuotaError
from quota_jax.evaluate.pictures import RowPicture, inside
from quota_jax.evaluate.tasks.records import Row
from quota_jax.processing.hugging_face import first_line


def parquet_files(root: Path, folder: Path, patterns: Sequence[str]) -> list[Path]:
    """The files in ``folder`` that match the first pattern that any file matches, sorted."""
    for pattern in patterns:
        if files := sorted(folder.glob(pattern)):
            return [inside(root, file, str(file)) for file in files]
    return []


def no_files(folder: Path, official: str, patterns: Sequence[str]) -> QuotaError:
    """What to say where a task's folder holds neither kind of files."""
    return QuotaError(f"{folder}: neither {official} nor parquet files ({' or '.join(patterns)})")


@dataclass(frozen=True, kw_only=True)
class Table:
    """Parquet files as one table. rows: all columns but that of the pictures, which ``absent`` rows
    do not have."""

    rows: list[Row]
    places: list[str]
    pictures: Any
    absent: frozenset[int]

    def picture(self, row: int) -> RowPicture:
        """The picture of a row, opened when asked for.

        Raises:
            QuotaError: the row has none.
        """
        if row in self.absent:
            raise QuotaError(f"{self.places[row]}: holds no picture")
        return RowPicture(name=self.places[row], table=self.pictures, row=row)


def read_table(files: Sequence[Path], column: str | None = "image") -> Table:
    """Reads all columns but the pictures in ``column``; these stay on disk.

    Raises:
        QuotaError: `datasets` is not installed, a file is damaged, or there is no such column.
    """
    try:
        import datasets
    except ImportError:
        raise QuotaError(
            f"{files[0]}: parquet files need the package datasets: pip install 'quota-jax[eval]'"
        ) from None
    rows: list[Row] = []
    places: list[str] = []
    parts = []
    for file in files:
        try:
            part = datasets.Dataset.from_parquet(str(file))
        except Exception as error:  # pyarrow's and datasets' own classes, OSError, ValueError...
            raise QuotaError(f"{file}: not readable as parquet: {first_line(error)}") from None
        if column:
            if column not in part.column_names:
                raise QuotaError(f"{file}: has no column {column!r}")
            parts.append(part.select_columns([column]))
            part = part.remove_columns([column])
        for place, fields in enumerate(part):
            places.append(f"{file}: row {place}")
            rows.append(Row(where=places[-1], fields=fields))
    if not rows:
        raise QuotaError(f"{files[0]}: holds no row")
    if not column:
        absent = frozenset(range(len(rows)))
        return Table(rows=rows, places=places, pictures=None, absent=absent)
    try:
        pictures = datasets.concatenate_datasets(parts).with_format("arrow")
    except Exception as error:  # columns of different types
        raise QuotaError(f"{files[0]} and others differ: {first_line(error)}") from None
    nulls = pictures.data.column(column).is_null().to_pylist()
    return Table(
        rows=rows,
        places=places,
        pictures=pictures,
        absent=frozenset(place for place, null in enumerate(nulls) if null),
    )
