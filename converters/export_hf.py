"""The way back: a Hugging Face folder that transformers loads, from an unquantized checkpoint."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from converters.convert import Progress
from converters.families import parse_layout, rules_of
from converters.hf_writer import HfWriter, TensorSpec
from converters.rules import Plan, assign
from converters.sources import ASSET_FILES
from quota_jax.checkpoint import Checkpoint, open_checkpoint
from quota_jax.errors import QuotaError
from quota_jax.models.params import blocks

_TEMPORARY = ".export-partial"


def export_hf(
    checkpoint_path: str | Path,
    out: str | Path,
    *,
    layout: str | None = None,
    max_shard_size: float = 5e9,
    progress: Progress | None = None,
) -> Path:
    """Writes config.json, safetensors shards with their index, and the tokenizer's files.

    The default layout is the source's own: tensors that went through `convert` unchanged come back
    bit for bit under their old names. Memory stays at one block. `out` appears only when complete.

    Args:
        layout: "saved" (as transformers 5 writes), "hub", "memory", and for LLaVA
            "memory_vision_model".
        max_shard_size: bytes per shard; a larger tensor gets a shard of its own.

    Raises:
        QuotaError: `out` exists, the layout is unknown, or the checkpoint is quantized.
    """
    checkpoint = open_checkpoint(checkpoint_path)
    refuse_quantized(checkpoint)
    with new_folder(out) as (folder, finish):
        plan = export_plan(checkpoint, layout)
        _write_tensors(checkpoint, plan, folder, max_shard_size, progress)
        write_small_files(checkpoint, folder)
        finish()
    return Path(out).absolute()


@contextmanager
def new_folder(out: str | Path) -> Iterator[tuple[Path, Callable[[], None]]]:
    """A folder to fill, and a function that gives it the name ``out``; without that call, or after
    an error, nothing is left."""
    out = Path(out).absolute()
    if os.path.lexists(out):
        raise QuotaError(f"{out} already exists")
    if not out.parent.is_dir():
        raise QuotaError(f"{out.parent} is not a folder")
    partial = out.with_name(out.name + _TEMPORARY)
    if partial.is_dir() and not partial.is_symlink():
        shutil.rmtree(partial)  # what a killed export left: it cannot be resumed
    try:
        partial.mkdir()
    except OSError as error:
        raise QuotaError(f"{partial}: cannot be made: {error.strerror}") from None

    def finish() -> None:
        if os.path.lexists(out):
            raise QuotaError(f"{out} already exists")
        partial.rename(out)

    try:
        yield partial, finish
    except OSError as error:
        raise QuotaError(
            f"{error.filename or partial}: cannot be written: {error.strerror}"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def refuse_quantized(checkpoint: Checkpoint) -> None:
    """Only unquantized weights have a plain Hugging Face form."""
    if checkpoint.quantization.has_integers:
        raise QuotaError(
            f"{checkpoint.path} is quantized ({checkpoint.quantization.label}): the plain Hugging "
            "Face format holds unquantized weights only; give --format compressed-tensors or native"
        )


def export_plan(checkpoint: Checkpoint, layout: str | None = None) -> Plan:
    """Which parameter goes where under a layout (None: the source's)."""
    stored, head_copy = parse_layout(checkpoint.hf_layout)
    table = rules_of(checkpoint.config)
    return assign(
        table,
        checkpoint.config,
        blocks(checkpoint.config),
        table.layout(layout or stored),
        tied_copy=head_copy,
    )


def _write_tensors(
    checkpoint: Checkpoint,
    plan: Plan,
    folder: Path,
    max_shard_size: float,
    progress: Progress | None,
) -> None:
    specs = {}
    for block, assignments in plan.blocks.items():
        stored = checkpoint.block_specs(block)
        for assignment in assignments:
            dtype = np.dtype(stored[assignment.param].dtype)
            for piece in assignment.pieces:
                specs[piece.name] = TensorSpec(shape=piece.shape, dtype=dtype)
    if plan.tied_copy:
        head, embedding = plan.tied_copy
        specs[head] = specs[embedding]
    writer = HfWriter(folder, specs, max_shard_size)
    for done, (block, assignments) in enumerate(plan.blocks.items(), start=1):
        params = checkpoint.read_block(block)
        for assignment in assignments:
            for name, rows in assignment.split(params[assignment.param]):
                writer.write(name, rows)
                if plan.tied_copy and name == plan.tied_copy[1]:
                    writer.write(plan.tied_copy[0], rows)
        if progress is not None:
            progress(done, len(plan.blocks), block)
    writer.finish()


def write_small_files(
    checkpoint: Checkpoint, folder: Path, quantization: Mapping[str, Any] | None = None
) -> None:
    """config.json, with a quantization_config where one is given, and the tokenizer's files."""
    config = dict(
        checkpoint.hf_config
        or {
            **checkpoint.config.to_hf(),
            "dtype": checkpoint.dtype.name,
        }
    )
    if quantization is not None:
        config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for name in ASSET_FILES:
        asset = checkpoint.assets_dir / name
        if asset.is_file():
            (folder / name).write_bytes(asset.read_bytes())
