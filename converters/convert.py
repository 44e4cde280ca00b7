"""From a Hugging Face checkpoint to a checkpoint of this project, one block at a time."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from converters.blocks import check_plan, parse_dtype, read_block
from converters.families import layout_label, read_any_config, rules_of
from converters.hf_reader import HfReader
from converters.import_quantized import (
    is_quantized,
    quantization_of,
    read_quantized,
    without_zero_biases,
)
from converters.quantized_config import Scheme
from converters.quantized_tensors import QuantizedTensors
from converters.rules import Assignment, make_plan
from converters.sources import open_source
from quota_jax.checkpoint import FORMAT_VERSION, CheckpointWriter
from quota_jax.errors import QuotaError
from quota_jax.models.params import blocks
from quota_jax.quantization import QuantizationConfig

_DTYPE_KEYS = ("dtype", "torch_dtype")

Progress = Callable[[int, int, str], None]
"""Called with (blocks done, blocks in all, name of the block just done)."""


def convert(
    source: str | Path,
    out: str | Path,
    *,
    dtype: str | None = None,
    progress: Progress | None = None,
) -> Path:
    """Converts a local folder or a hub id; returns the path of the finished checkpoint.

    Matrices that AWQ (GEMM), GPTQ or compressed-tensors (pack-quantized) has quantized to 4 bits
    keep their codes, scales and zero points, for 16-bit activations.

    Peak host memory stays within 3 x the largest block + 1 GiB. A killed run leaves
    `<out>.partial`, which the same command resumes; `out` appears only when complete.

    Args:
        dtype: "float32", "float16" or "bfloat16" for all float tensors but the scales of quantized
            matrices; None keeps each tensor's own.

    Raises:
        QuotaError: `out` exists; the source is not a whole, finite safetensors checkpoint of a
            known model, quantized in no other way, that fits its config.json (file and tensor are
            named).
    """
    out = Path(out)
    target = parse_dtype(dtype)
    if os.path.lexists(out):
        raise QuotaError(f"{out} already exists")
    origin = open_source(source)
    hf_config, config, scheme = read_any_config(origin)
    reader = HfReader(origin)
    expected, table, where = blocks(config), rules_of(config), str(origin.folder)
    quantization, tensors, infos = QuantizationConfig.none, None, reader.infos
    if scheme is not None:
        tensors = QuantizedTensors(reader, scheme)
        infos = without_zero_biases(tensors, table, config, expected)
    plan = make_plan(table, config, expected, infos, where)
    if tensors is not None:
        quantization = quantization_of(plan, tensors, where)
    # Of each block: what is read as it is, and what is quantized.
    tasks = {name: _split(assignments, tensors) for name, assignments in plan.blocks.items()}
    plain = {name: floats for name, (floats, _) in tasks.items()}
    check_plan(reader, dataclasses.replace(plan, blocks=plain), target)
    assets = origin.read_assets()
    with CheckpointWriter(
        out,
        config=config,
        quantization=quantization,
        provenance={"source": origin.name, "layout": plan.layout, "dtype": dtype or "as stored"},
        assets=assets,
        fingerprint=_fingerprint(reader, hf_config, scheme, assets, target),
        hf_config=hf_config if target is None else _with_dtype(hf_config, target.name),
        hf_layout=layout_label(plan.layout, plan.tied_copy is not None),
    ) as writer:
        for done, (name, (floats, quantized)) in enumerate(tasks.items(), start=1):
            if name not in writer.finished:
                try:
                    params = read_block(reader, floats, target)
                    if tensors is not None:
                        for assignment in quantized:
                            params |= read_quantized(tensors, assignment, quantization)
                except QuotaError:
                    # The source is unusable: no later run could take up what is written so far.
                    shutil.rmtree(writer.partial)
                    raise
                writer.write_block(name, params)
            if progress is not None:
                progress(done, len(plan.blocks), name)
        writer.finish()
    return out


def _split(
    assignments: Sequence[Assignment], tensors: QuantizedTensors | None
) -> tuple[tuple[Assignment, ...], tuple[Assignment, ...]]:
    """Float parameters and quantized ones."""
    if tensors is None:
        return tuple(assignments), ()
    quantized = tuple(a for a in assignments if is_quantized(a, tensors))
    return tuple(a for a in assignments if a not in quantized), quantized


def _fingerprint(
    reader: HfReader,
    hf_config: Mapping[str, Any],
    scheme: Scheme | None,
    assets: Mapping[str, bytes],
    dtype: np.dtype | None,
) -> str:
    """Identifies the source's files and the options: equal means that a partial result fits."""
    identity = {
        "format_version": FORMAT_VERSION,
        "config": hf_config,
        "scheme": None if scheme is None else dataclasses.asdict(scheme),
        "files": sorted(reader.file_states()),
        "assets": {name: hashlib.sha256(data).hexdigest() for name, data in assets.items()},
        "dtype": None if dtype is None else dtype.name,
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _with_dtype(section: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The section with every dtype that it states, at any depth, replaced by the one cast to."""
    changed = dict(section)
    for key, value in section.items():
        if isinstance(value, Mapping):
            changed[key] = _with_dtype(value, dtype)
        elif key in _DTYPE_KEYS and value is not None:
            changed[key] = dtype
    return changed
