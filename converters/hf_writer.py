"""Streamed writing of safetensors shards and their index.

Names, dtypes and shapes are known before the first tensor comes, so headers and places are fixed up
front and tensors may be written in any order, one at a time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from converters.blocks import safetensors_name
from converters.hf_reader import INDEX_FILE, SINGLE_FILE
from quota_jax.errors import QuotaError

_METADATA = {"format": "pt"}  # transformers insists on it
_WRITTEN_BYTES = 1 << 26


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """Shape and dtype of a tensor to come."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    path: Path
    offset: int
    spec: TensorSpec


class HfWriter:
    """Writes the tensors of `specs` into shards of at most `max_shard_size` bytes (or one tensor).

    Shards fill in the order of `specs` and are named as transformers names them.
    """

    def __init__(self, folder: Path, specs: Mapping[str, TensorSpec], max_shard_size: float):
        if not max_shard_size > 0:
            raise QuotaError(f"max_shard_size must be positive, got {max_shard_size}")
        self._places: dict[str, _Place] = {}
        self._written: set[str] = set()
        self._index = folder / INDEX_FILE
        shards = _distribute(specs, max_shard_size)
        for number, names in enumerate(shards, start=1):
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            path = folder / (SINGLE_FILE if len(shards) == 1 else name)
            self._places |= _start_shard(path, {name: specs[name] for name in names})

    def write(self, name: str, array: np.ndarray) -> None:
        """Writes one tensor; its shape and dtype are those of its spec."""
        place = self._places[name]
        if (array.shape, array.dtype) != (place.spec.shape, place.spec.dtype):
            raise QuotaError(
                f"tensor {name} is {array.dtype}{list(array.shape)}, expected "
                f"{place.spec.dtype}{list(place.spec.shape)}"
            )
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        with place.path.open("r+b") as file:
            file.seek(place.offset)
            for start in range(0, data.size, _WRITTEN_BYTES):
                file.write(data[start : start + _WRITTEN_BYTES].data)
        self._written.add(name)

    def finish(self) -> None:
        """Flushes the shards and writes the index if they are several."""
        if absent := sorted(set(self._places) - self._written):
            raise ValueError(f"{len(absent)} tensors were not written, first {absent[0]}")
        files = {place.path for place in self._places.values()}
        for file in files:
            with file.open("r+b") as handle:
                os.fsync(handle.fileno())
        if len(files) > 1:
            total = sum(place.spec.nbytes for place in self._places.values())
            placed = {name: self._places[name].path.name for name in sorted(self._places)}
            index = {"metadata": {"total_size": total}, "weight_map": placed}
            self._index.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _distribute(specs: Mapping[str, TensorSpec], limit: float) -> list[list[str]]:
    """Names in order, cut where the next tensor would exceed the limit."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, spec in specs.items():
        if shards[-1] and size + spec.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += spec.nbytes
    return shards


def _start_shard(path: Path, specs: Mapping[str, TensorSpec]) -> dict[str, _Place]:
    """Writes the header and makes room for the data. Wider dtypes come first: all stays aligned."""
    header: dict[str, object] = {"__metadata__": _METADATA}
    offsets = {}
    end = 0
    for name, spec in sorted(specs.items(), key=lambda item: -item[1].dtype.itemsize):
        offsets[name], end = end, end + spec.nbytes
        header[name] = {
            "dtype": safetensors_name(spec.dtype),
            "shape": list(spec.shape),
            "data_offsets": [offsets[name], end],
        }
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    data_start = 8 + len(encoded)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(data_start + end)
    return {
        name: _Place(path=path, offset=data_start + offset, spec=specs[name])
        for name, offset in offsets.items()
    }
