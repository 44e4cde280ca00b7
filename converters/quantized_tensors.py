"""Four-bit matrices of AWQ, GPTQ and compressed-tensors files, codes kept as they are.

Every layout holds eight codes in an int32 word. Along the packed axis compressed-tensors and GPTQ
begin with the lowest bits, AWQ has an order of its own. Codes are unsigned; compressed-tensors
stores ``q + 8`` and ``zero + 8``, so that it reads like the others: ``scale (code - zero)``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from converters.blocks import all_finite
from converters.hf_reader import FLOAT_DTYPES, HfReader, TensorInfo
from converters.quantized_config import Scheme
from pallas_kernels.packing import pack_int4, unpack_uint4
from quota_jax.errors import QuotaError

WORD = 8
"""Codes in a word."""
AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)
"""Column of each nibble of an AWQ word, lowest bits first."""
MIDDLE = 8
"""The zero point of symmetric weights."""

_REQUIRED = {
    "awq": ("qweight", "qzeros", "scales"),
    "gptq": ("qweight", "qzeros", "scales"),
    "compressed-tensors": ("weight_packed", "weight_scale", "weight_shape"),
}
_OPTIONAL = {
    "awq": (),
    "gptq": ("g_idx",),
    "compressed-tensors": ("weight_zero_point", "weight_g_idx"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantized:
    """One matrix: ``packed`` unsigned codes uint8 [N, K/2], ``scale`` [N, G], ``zero`` uint8 [N,
    G], ``index`` int32 [K], the group of each input channel."""

    packed: np.ndarray
    scale: np.ndarray
    zero: np.ndarray
    index: np.ndarray


class QuantizedTensors:
    """The quantized matrices of a checkpoint, by the name their float weight would have.

    ``infos`` is the reader's table with these matrices in place of the tensors that make them up.
    Shapes and dtypes of all of them are checked here.

    Raises:
      QuotaError: there is none; or a part is missing or has a shape or dtype that does not fit.
    """

    def __init__(self, reader: HfReader, scheme: Scheme):
        self.reader, self.scheme = reader, scheme
        first, *_ = required = _REQUIRED[scheme.layout]
        parts = (*required, *_OPTIONAL[scheme.layout])
        self._parts: dict[str, dict[str, TensorInfo]] = {}
        self.infos: dict[str, TensorInfo] = {}
        for name, info in reader.infos.items():
            stem, _, part = name.rpartition(".")
            if part in parts and f"{stem}.{first}" in reader.infos:
                self._parts.setdefault(f"{stem}.weight", {})[part] = info
            else:
                self.infos[name] = info
        if not self._parts:
            raise QuotaError(f"{reader.source.folder} holds no {first} of {scheme.layout}")
        for name, found in self._parts.items():
            for part in required:
                if part not in found:
                    self._refuse(name, f"{part} is missing")
            if name in self.infos:
                self._refuse(name, "the float weight stands beside it")
            shape = self._checked_shape(name, found)
            info = found[first]
            self.infos[name] = TensorInfo(name=name, dtype="I4", shape=shape, file=info.file)

    def __contains__(self, name: str) -> bool:
        return name in self._parts

    def __iter__(self):
        return iter(self._parts)

    def scale_dtype(self, name: str) -> np.dtype:
        """Of one matrix."""
        scale = self._parts[name][self._scale_part]
        return FLOAT_DTYPES[scale.dtype]

    def zero(self, name: str) -> np.ndarray:
        """Zero points uint8 [N, G]; 8 throughout where none are stored."""
        found, shape = self._parts[name], self.infos[name].shape
        rows, groups = shape[0], self._groups(shape[1])
        part = self._zero_part
        if part not in found:
            return np.full((rows, groups), MIDDLE, np.uint8)
        words = self.reader.read_integers(found[part].name)
        if self.scheme.layout == "compressed-tensors":
            return np.ascontiguousarray(nibbles(words.T).T[:rows])
        values = nibbles(words)
        if self.scheme.layout == "awq":
            values = _awq_order(values)
        return np.ascontiguousarray(values.T[:rows] + np.uint8(self.scheme.zero_offset))

    def index(self, name: str) -> np.ndarray:
        """Group of each input channel, int32 [K]."""
        columns = self.infos[name].shape[1]
        found = self._parts[name].get(self._index_part)
        if found is None:
            return self.in_order(columns)
        index = self.reader.read_integers(found.name)
        if index.min() < 0 or index.max() >= self._groups(columns):
            self._refuse(name, f"{self._index_part} names groups that do not exist")
        return index.astype(np.int32)

    def in_order(self, columns: int) -> np.ndarray:
        """The groups of channels that stand where they belong."""
        return (np.arange(columns) // (self.scheme.group or columns)).astype(np.int32)

    def read(self, name: str) -> Quantized:
        """One matrix."""
        found, (rows, columns) = self._parts[name], self.infos[name].shape
        scale = self.reader.read(found[self._scale_part].name)
        if not all_finite(scale):
            self._refuse(name, f"{self._scale_part} holds NaN or infinity")
        if self.scheme.layout == "compressed-tensors":
            words = self.reader.read_integers(found["weight_packed"].name)
            packed = np.ascontiguousarray(_bytes(words)[:, : columns // 2])
        else:
            scale = np.ascontiguousarray(scale.T)
            words = self.reader.read_integers(found["qweight"].name)
            if self.scheme.layout == "awq":
                packed = np.asarray(pack_int4(jnp.asarray(_awq_order(nibbles(words)).T)))
            else:
                # Each word holds eight neighbors of one row: four bytes as this project packs them.
                packed = _bytes(words[..., None]).transpose(1, 0, 2).reshape(rows, columns // 2)
        return Quantized(packed=packed, scale=scale, zero=self.zero(name), index=self.index(name))

    @property
    def _scale_part(self) -> str:
        return "weight_scale" if self.scheme.layout == "compressed-tensors" else "scales"

    @property
    def _zero_part(self) -> str:
        return "weight_zero_point" if self.scheme.layout == "compressed-tensors" else "qzeros"

    @property
    def _index_part(self) -> str:
        return "weight_g_idx" if self.scheme.layout == "compressed-tensors" else "g_idx"

    def _groups(self, columns: int) -> int:
        return -(-columns // self.scheme.group) if self.scheme.group else 1

    def _checked_shape(self, name: str, found: Mapping[str, TensorInfo]) -> tuple[int, int]:
        """[N, K] of a matrix, with which all of its tensors agree."""
        layout = self.scheme.layout
        codes = found[_REQUIRED[layout][0]]
        if len(codes.shape) != 2:
            self._refuse(name, f"{codes.name} has shape {codes.shape}, expected two sizes")
        if layout == "compressed-tensors":
            told = found["weight_shape"]
            self._check(name, told, (2,), ("I64", "I32"))
            rows, columns = (int(size) for size in self.reader.read_integers(told.name))
            expected = (rows, -(-columns // WORD))
        elif layout == "awq":
            rows, columns = codes.shape[1] * WORD, codes.shape[0]
            expected = codes.shape
        else:
            rows, columns = codes.shape[1], codes.shape[0] * WORD
            expected = codes.shape
        self._check(name, codes, expected, ("I32",))
        if rows < 1 or columns < 2 or columns % 2:
            self._refuse(name, f"has {columns} inputs; an even number is needed")
        groups, words = self._groups(columns), -(-rows // WORD)
        sizes: dict[str, tuple[int, ...]]
        if layout == "compressed-tensors":
            sizes = {"weight_scale": (rows, groups), "weight_zero_point": (words, groups)}
        else:
            sizes = {"scales": (groups, rows), "qzeros": (groups, words)}
        sizes[self._index_part] = (columns,)
        for part, size in sizes.items():
            if part in found:
                kinds = tuple(FLOAT_DTYPES) if part == self._scale_part else ("I32",)
                self._check(name, found[part], size, kinds)
        return rows, columns

    def _check(
        self, name: str, info: TensorInfo, shape: Sequence[int], dtypes: Sequence[str]
    ) -> None:
        if info.shape != tuple(shape):
            self._refuse(name, f"{info.name} is {info.shape}, expected {tuple(shape)}")
        if info.dtype not in dtypes:
            self._refuse(name, f"{info.name} is {info.dtype}, expected {' or '.join(dtypes)}")

    def _refuse(self, name: str, reason: str) -> None:
        file = self.reader.infos[next(iter(self._parts[name].values())).name].file
        raise QuotaError(f"{self.reader.source.folder / file}: quantized {name}: {reason}")


def nibbles(words: np.ndarray) -> np.ndarray:
    """int32 [..., W] -> uint8 [..., 8 W], lowest bits first."""
    return np.asarray(unpack_uint4(jnp.asarray(_bytes(words))))


def words_of(values: np.ndarray) -> np.ndarray:
    """The inverse of ``nibbles``; a last word is filled up with zeros."""
    fill = -values.shape[-1] % WORD
    padded = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, fill)])
    return packed_words(np.asarray(pack_int4(jnp.asarray(padded))))


def packed_words(packed: np.ndarray) -> np.ndarray:
    """Packed bytes [..., B] -> int32 words [..., B/4]; a last word is filled up with zeros."""
    fill = -packed.shape[-1] % 4
    padded = np.pad(packed, [(0, 0)] * (packed.ndim - 1) + [(0, fill)])
    return np.ascontiguousarray(padded).view("<i4")


def _bytes(words: np.ndarray) -> np.ndarray:
    """int32 [..., W] -> uint8 [..., 4 W], lowest first."""
    return np.ascontiguousarray(words.astype("<i4", copy=False)).view(np.uint8)


def _awq_order(values: np.ndarray) -> np.ndarray:
    """Nibbles of AWQ words [..., N] in the order of the columns."""
    cut = values.reshape(*values.shape[:-1], -1, WORD)
    return cut[..., np.argsort(AWQ_COLUMNS)].reshape(values.shape)
