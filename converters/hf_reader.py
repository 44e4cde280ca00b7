"""Streamed reading of Hugging Face safetensors, one tensor at a time and without torch.

`HfReader` looks at every shard's header when it is opened, so a missing, truncated or
contradictory shard is refused before any work starts. No tensor stays mapped between reads, so
resident memory is the tensor in hand, whatever the size of its shard.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from converters.sources import Source, open_source
from quota_jax.errors import QuotaError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

FLOAT_DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""Stored dtypes that are read, by their safetensors name."""

_COMPARED_BYTES = 1 << 26


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorInfo:
    """Header entry of one tensor; `dtype` is the safetensors name, which need not be readable."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str


class HfReader:
    """The tensors of a checkpoint folder. `infos` maps every stored name to its header entry."""

    def __init__(self, source: Source):
        self.source = source
        self.infos: dict[str, TensorInfo] = {}
        placed = _index(source)
        self.files = (SINGLE_FILE,) if placed is None else tuple(dict.fromkeys(placed.values()))
        for file in self.files:
            found = self._read_header(file)
            if placed is not None:
                self._check_placement(file, found, placed)
            self.infos |= found
        if not self.infos:
            raise QuotaError(f"{source.folder} holds no tensors")

    def dtype(self, name: str) -> np.dtype:
        """The NumPy dtype of a tensor; anything but f32, f16 and bf16 is refused by name."""
        info = self.infos[name]
        if info.dtype not in FLOAT_DTYPES:
            raise QuotaError(
                f"{self._file(info.file)}: tensor {name} is stored as {info.dtype}; "
                f"supported: {', '.join(FLOAT_DTYPES)}"
            )
        return FLOAT_DTYPES[info.dtype]

    def read(self, name: str) -> np.ndarray:
        """One tensor, as stored."""
        self.dtype(name)
        with self._open(self.infos[name].file) as shard:
            return shard.get_tensor(name)

    def read_integers(self, name: str) -> np.ndarray:
        """One tensor of I32 or I64, as stored."""
        with self._open(self.infos[name].file) as shard:
            return shard.get_tensor(name)

    def same(self, left: str, right: str) -> bool:
        """Whether two tensors have equal dtype, shape and bits; compared by pieces."""
        one, other = self.infos[left], self.infos[right]
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            return False
        if not one.shape:
            return self.read(left).tobytes() == self.read(right).tobytes()
        row_bytes = int(np.prod(one.shape[1:])) * self.dtype(left).itemsize
        step = max(1, _COMPARED_BYTES // max(1, row_bytes))
        with self._open(one.file) as shard, self._open(other.file) as other_shard:
            rows, other_rows = shard.get_slice(left), other_shard.get_slice(right)
            for start in range(0, one.shape[0], step):
                stop = min(start + step, one.shape[0])
                if rows[start:stop].tobytes() != other_rows[start:stop].tobytes():
                    return False
        return True

    def file_states(self) -> Iterator[tuple[str, int, int]]:
        """(name, bytes, modification time in ns) of every shard, for a resumable run's identity."""
        for file in self.files:
            state = self.source.path(file).stat()
            yield file, state.st_size, state.st_mtime_ns

    def _file(self, file: str) -> Path:
        return self.source.folder / file

    def _open(self, file: str):
        try:
            return safe_open(self.source.path(file), framework="numpy")
        except (SafetensorError, OSError) as error:
            raise QuotaError(
                f"{self._file(file)} is not a whole safetensors file: {error}"
            ) from None

    def _read_header(self, file: str) -> dict[str, TensorInfo]:
        if Path(file).suffix != ".safetensors":
            raise QuotaError(
                f"{self._file(file)} is not safetensors; rewrite it with: "
                f"{self.source.make_safetensors()}"
            )
        if not self.source.has(file):
            raise QuotaError(f"{self._file(file)} is missing")
        infos = {}
        with self._open(file) as shard:
            for name in shard.keys():  # noqa: SIM118 (a handle, not a mapping)
                piece = shard.get_slice(name)
                infos[name] = TensorInfo(
                    name=name, dtype=piece.get_dtype(), shape=tuple(piece.get_shape()), file=file
                )
        return infos

    def _check_placement(
        self, file: str, found: Mapping[str, TensorInfo], placed: Mapping[str, str]
    ) -> None:
        """The index and the shard name the same tensors; so no tensor lies in two shards."""
        if absent := [
            name for name, place in placed.items() if place == file and name not in found
        ]:
            raise QuotaError(f"{self._file(file)} lacks {some(absent)}, listed by {INDEX_FILE}")
        if extra := [name for name in found if placed.get(name) != file]:
            place = placed.get(extra[0])
            where = f"places in {place}" if place else "does not list"
            raise QuotaError(f"{self._file(file)} holds {some(extra)}, which {INDEX_FILE} {where}")


def open_hf(source: str | Path) -> HfReader:
    """Opens a local folder or a hub id and checks its shards' headers."""
    return HfReader(open_source(source))


def some(names: Sequence[str], limit: int = 5) -> str:
    """The first few names, and how many more there are."""
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


def _index(source: Source) -> dict[str, str] | None:
    """Shard file by tensor name; None for a single file (it goes first, as in transformers)."""
    if source.has(SINGLE_FILE):
        return None
    if not source.has(INDEX_FILE):
        pickled = source.pickled_files()
        what = f"only pickled weights ({some(pickled)})" if pickled else f"no {SINGLE_FILE}"
        hint = "pickles are never loaded; rewrite them with" if pickled else "if it has others, run"
        raise QuotaError(f"{source.folder} holds {what}; {hint}: {source.make_safetensors()}")
    placed = source.read_json(INDEX_FILE).get("weight_map")
    if not isinstance(placed, dict) or not all(isinstance(file, str) for file in placed.values()):
        raise QuotaError(f"{source.folder / INDEX_FILE} has no weight_map of tensor to file name")
    for file in placed.values():
        source.path(file)  # names that leave the folder are refused before any shard is opened
    return placed
