"""From a Hugging Face checkpoint to a checkpoint of this project, one block at a time."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from converters.blocks import check_plan, parse_dtype, read_block
from converters.families import layout_label, read_config, rules_of
from converters.hf_reader import HfReader
from converters.rules import make_plan
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

    Peak host memory stays within 3 x the largest block + 1 GiB. A killed run leaves
    `<out>.partial`, which the same command resumes; `out` appears only when complete.

    Args:
        dtype: "float32", "float16" or "bfloat16" for all tensors; None keeps each tensor's own.

    Raises:
        QuotaError: `out` exists; the source is not a whole, finite, unquantized safetensors
            checkpoint of a known model that fits its config.json (file and tensor are named).
    """
    out = Path(out)
    target = parse_dtype(dtype)
    if os.path.lexists(out):
        raise QuotaError(f"{out} already exists")
    origin = open_source(source)
    hf_config, config = read_config(origin)
    reader = HfReader(origin)
    expected = blocks(config)
    plan = make_plan(rules_of(config), config, expected, reader.infos, str(origin.folder))
    check_plan(reader, plan, target)
    assets = origin.read_assets()
    with CheckpointWriter(
        out,
        config=config,
        quantization=QuantizationConfig.none,
        provenance={"source": origin.name, "layout": plan.layout, "dtype": dtype or "as stored"},
        assets=assets,
        fingerprint=_fingerprint(reader, hf_config, assets, target),
        hf_config=hf_config if target is None else _with_dtype(hf_config, target.name),
        hf_layout=layout_label(plan.layout, plan.tied_copy is not None),
    ) as writer:
        for done, (name, assignments) in enumerate(plan.blocks.items(), start=1):
            if name not in writer.finished:
                try:
                    params = read_block(reader, assignments, target)
                except QuotaError:
                    # The source is unusable: no later run could take up what is written so far.
                    shutil.rmtree(writer.partial)
                    raise
                writer.write_block(name, params)
            if progress is not None:
                progress(done, len(plan.blocks), name)
        writer.finish()
    return out


def _fingerprint(
    reader: HfReader,
    hf_config: Mapping[str, Any],
    assets: Mapping[str, bytes],
    dtype: np.dtype | None,
) -> str:
    """Identifies the source's files and the options: equal means that a partial result fits."""
    identity = {
        "format_version": FORMAT_VERSION,
        "config": hf_config,
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
