"""Reading a model's blocks out of Hugging Face tensors: join, cast, refuse non-finite values."""

from __future__ import annotations

from collections.abc import Sequence

import ml_dtypes
import numpy as np

from converters.hf_reader import FLOAT_DTYPES, HfReader
from converters.rules import Assignment, Plan
from quota_jax.errors import QuotaError

DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
"""Dtypes that a conversion can be asked for."""

_INTEGERS = {
    "I8": np.dtype(np.int8),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
}

# Unsigned view and exponent bits: all of them set means NaN or infinity.
_EXPONENTS = {
    np.dtype(np.float32): (np.uint32, 0x7F800000),
    np.dtype(np.float16): (np.uint16, 0x7C00),
    np.dtype(ml_dtypes.bfloat16): (np.uint16, 0x7F80),
}
_CHECKED_VALUES = 1 << 22


def parse_dtype(name: str | None) -> np.dtype | None:
    """The NumPy dtype of "float32", "float16" or "bfloat16"; None (as stored) stays None."""
    if name is not None and name not in DTYPES:
        raise QuotaError(f"dtype {name!r} is not one of {', '.join(DTYPES)}")
    return None if name is None else DTYPES[name]


def all_finite(array: np.ndarray) -> bool:
    """Whether no value is NaN or infinite. Works on the bits, in pieces: no large temporaries."""
    unsigned, exponent = _EXPONENTS[array.dtype]
    bits = np.ascontiguousarray(array).reshape(-1).view(unsigned)
    mask = unsigned(exponent)
    return not any(
        bool(((bits[start : start + _CHECKED_VALUES] & mask) == mask).any())
        for start in range(0, bits.size, _CHECKED_VALUES)
    )


def check_plan(reader: HfReader, plan: Plan, dtype: np.dtype | None) -> None:
    """Refuses, before anything is read, dtypes that cannot be read or joined.

    Tensors that share a parameter must agree in dtype unless all are cast. A head that repeats tied
    embeddings must equal them bit for bit: transformers would use the embeddings and drop the head.
    """
    for assignments in plan.blocks.values():
        for assignment in assignments:
            dtypes = {piece.name: reader.dtype(piece.name) for piece in assignment.pieces}
            if dtype is None and len(set(dtypes.values())) > 1:
                pairs = ", ".join(f"{name} {kind}" for name, kind in dtypes.items())
                raise QuotaError(
                    f"{reader.source.folder}: tensors of {assignment.param} differ in "
                    f"dtype ({pairs}); convert with one dtype for all"
                )
    if plan.tied_copy and not reader.same(*plan.tied_copy):
        head, embedding = plan.tied_copy
        raise QuotaError(
            f"{reader.source.folder}: config.json ties the embeddings, but {head} differs from "
            f"{embedding}; set tie_word_embeddings to false or drop {head}"
        )


def read_block(
    reader: HfReader, assignments: Sequence[Assignment], dtype: np.dtype | None
) -> dict[str, np.ndarray]:
    """The parameters of one block, cast to `dtype` unless None. NaN and infinity are refused.

    Rounds to nearest even. Holds the block and one stored tensor at a time.
    """
    return {a.param: _read_param(reader, a, dtype) for a in assignments}


def _read_param(reader: HfReader, assignment: Assignment, dtype: np.dtype | None) -> np.ndarray:
    kind = dtype or reader.dtype(assignment.pieces[0].name)
    if len(assignment.pieces) == 1:
        return _read_finite(reader, assignment.pieces[0].name, kind)
    joined = np.empty(assignment.shape, kind)
    for name, rows in assignment.split(joined):
        rows[...] = _read_finite(reader, name, kind)
    return joined


def _read_finite(reader: HfReader, name: str, dtype: np.dtype) -> np.ndarray:
    stored = reader.read(name)
    where = f"{reader.source.folder / reader.infos[name].file}: tensor {name}"
    if not all_finite(stored):
        raise QuotaError(f"{where} holds NaN or infinity")
    if stored.dtype == dtype:
        return stored
    with np.errstate(over="ignore", under="ignore"):
        cast = stored.astype(dtype)
    if not all_finite(cast):
        raise QuotaError(f"{where} overflows {dtype.name} (largest finite {_largest(dtype)})")
    return cast


def _largest(dtype: np.dtype) -> str:
    return f"{float(ml_dtypes.finfo(dtype).max):g}"


def safetensors_name(dtype: np.dtype) -> str:
    """The name that safetensors has for a NumPy dtype."""
    for name, known in (*FLOAT_DTYPES.items(), *_INTEGERS.items()):
        if known == dtype:
            return name
    raise QuotaError(f"dtype {dtype} has no place in a Hugging Face checkpoint")
