"""Measures a model on calibration samples, batch by batch; a killed run goes on where it ended.

Only what is measured is kept: a few numbers per sample and layer, one line of a journal per batch.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from quota_jax.batch import Batch
from quota_jax.checkpoint import Checkpoint
from quota_jax.checkpoint.format import sync_path
from quota_jax.errors import QuotaError
from quota_jax.processing import Processor
from quota_jax.quant.calibration_data import Sample, make_batches

Values = Mapping[str, np.ndarray]
"""Name -> ``[samples, layers]``; NaN where a sample has no such value."""


class Journal:
    """JSON lines: first what is measured, then the values of each finished batch.

    ``identity`` must equal that of an earlier run in the same file. A last line that a kill cut
    short is dropped.

    Raises:
      QuotaError: the file is of another run, or no journal.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]):
        self.path = path
        self.rows: list[dict[str, Any]] = []
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        whole = [json.loads(line) for line in lines if _is_json(line)]
        if len(whole) != len(lines):
            raise QuotaError(f"{path}: damaged; remove it to begin anew")
        if whole and whole[0] != json.loads(json.dumps(identity)):
            raise QuotaError(
                f"{path}: belongs to an unfinished run with other data or options; finish that one "
                "or remove the file"
            )
        self.rows = whole[1:]
        with open(path, "ab") as file:
            file.truncate(sum(len(line) + 1 for line in lines))
        if not whole:
            self._write(identity)

    def append(self, values: Values) -> None:
        """Adds a batch; it is on the disk when this returns."""
        row = {
            name: [[None if math.isnan(x) else x for x in sample] for sample in array.tolist()]
            for name, array in values.items()
        }
        self._write(row)
        self.rows.append(row)

    def values(self) -> dict[str, np.ndarray]:
        """All batches so far, joined."""
        return {
            name: np.concatenate([np.array(row[name], np.float64) for row in self.rows])
            for name in (self.rows[0] if self.rows else ())
        }

    def _write(self, row: Mapping[str, Any]) -> None:
        with open(self.path, "ab") as file:
            file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        sync_path(self.path.parent)


def calibration_batches(
    processor: Processor, samples: Sequence[Sample], batch_size: int, *, start: int = 0
) -> Iterator[tuple[Batch, int]]:
    """Batches of ``batch_size`` samples in their order, and how many rows are samples.

    Made one at a time from sample ``start`` on; shapes come from the buckets, so few programs serve
    all of them.
    """
    for first in range(start, len(samples), batch_size):
        data = make_batches(processor, samples[first : first + batch_size], batch_size)
        yield data.batches[0], data.counts[0]


def run_pass(
    journal: Journal,
    checkpoint: Checkpoint,
    samples: Sequence[Sample],
    batch_size: int,
    load: Callable[[], Callable[[Batch], Values]],
    *,
    title: str,
    progress: bool = False,
) -> dict[str, np.ndarray]:
    """What the journal lacks is measured and added; returns the values of all samples.

    ``load`` gives the measuring function, which returns values of every row of a batch; it is not
    called where nothing is left to do. Progress with the time left goes to stderr, if that is a
    terminal.
    """
    start = len(journal.rows) * batch_size
    if start < len(samples):
        processor = Processor.from_folder(checkpoint.assets_dir, checkpoint.config)
        measure = load()
        bar = tqdm(
            desc=title,
            total=len(samples),
            initial=start,
            unit="sample",
            disable=None if progress else True,
            leave=False,
        )
        with bar:
            for batch, count in calibration_batches(processor, samples, batch_size, start=start):
                found = measure(batch)
                journal.append({name: np.asarray(part)[:count] for name, part in found.items()})
                bar.update(count)
    return journal.values()


def first_difference(one: Any, other: Any, where: str = "") -> str | None:
    """The first field in which two JSON values differ: ``text.num_layers is 4, not 2``."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        for key in {**one, **other}:
            name = f"{where}.{key}" if where else str(key)
            if found := first_difference(one.get(key), other.get(key), name):
                return found
        return None
    return None if one == other else f"{where} is {one!r}, not {other!r}"


def _is_json(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False
