"""Checks of a finished checkpoint: always its own integrity, and against its source where given."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from converters.blocks import DTYPES, all_finite
from converters.convert import Progress
from converters.export_hf import export_plan
from converters.families import read_config, rules_of
from converters.hf_reader import HfReader, some
from converters.random_prompts import RandomPrompts, random_prompts
from converters.rules import make_plan
from converters.sources import Source, open_source
from quota_jax.checkpoint import Checkpoint, open_checkpoint
from quota_jax.errors import QuotaError
from quota_jax.models.params import blocks

LOGIT_TOLERANCE = 2e-4
"""Largest accepted max |difference| of float32 logits, relative to max |logit|."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One check: "passed", "failed" or "skipped", and what was found or why it did not run."""

    name: str
    status: str
    detail: str

    def __str__(self) -> str:
        return f"{self.name:<9} {self.status:<7} {self.detail}"


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyReport:
    """The checks in the order checksums, coverage, tensors, logits."""

    path: Path
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether no check failed; skipped ones do not count."""
        return all(check.status != "failed" for check in self.checks)

    def __getitem__(self, name: str) -> Check:
        return next(check for check in self.checks if check.name == name)

    def __str__(self) -> str:
        return "\n".join(str(check) for check in self.checks)


def verify(
    checkpoint: str | Path,
    *,
    against: str | Path | None = None,
    progress: Progress | None = None,
) -> VerifyReport:
    """Checks a checkpoint and says which checks ran; differences are reported, not raised.

    - checksums: every file has the size and sha256 of the manifest.
    - coverage: every parameter of the model is stored once, with its shape, and is finite.
    - tensors (with `against`, unquantized): each parameter equals the source's bit for bit, after
      the cast if the checkpoint was converted to another dtype.
    - logits (with `against`, unquantized, torch installed): float32 logits of two seeded random
      prompts with an image each agree with transformers, its weights cast like ours, within
      `LOGIT_TOLERANCE` x max |logit|.

    Raises:
        QuotaError: `checkpoint` cannot be opened, or `against` is no readable checkpoint.
    """
    opened = open_checkpoint(checkpoint)
    quantized = opened.quantization.has_integers
    passes = 1 if against is None or quantized else 2
    step = _steps(progress, passes * len(opened.block_names))
    checks = [
        _run("checksums", lambda: _checksums(opened)),
        _run("coverage", lambda: _coverage(opened, step)),
    ]
    if passes == 2:
        assert against is not None
        source = open_source(against)
        checks.append(_run("tensors", lambda: _tensors(opened, source, step)))
        checks.append(_run("logits", lambda: _logits(opened, source)))
    else:
        reason = f"the checkpoint is quantized ({opened.quantization.label})"
        if against is None:
            reason = "no source to compare with was given"
        checks += [
            Check(name=name, status="skipped", detail=reason) for name in ("tensors", "logits")
        ]
    return VerifyReport(path=opened.path, checks=tuple(checks))


def _steps(progress: Progress | None, total: int) -> Callable[[str], None]:
    """A function that counts the blocks of several passes."""
    done = 0

    def step(name: str) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total, name)

    return step


class _Skipped(Exception):
    """Raised by a check that cannot run here; the text says why."""


def _run(name: str, check: Callable[[], str]) -> Check:
    try:
        return Check(name=name, status="passed", detail=check())
    except _Skipped as reason:
        return Check(name=name, status="skipped", detail=str(reason))
    except QuotaError as error:
        return Check(name=name, status="failed", detail=str(error))


def _checksums(checkpoint: Checkpoint) -> str:
    checkpoint.verify_checksums()
    return f"all files as written, {checkpoint.sizes()['files']} bytes"


def _coverage(checkpoint: Checkpoint, step: Callable[[str], None]) -> str:
    # open_checkpoint has matched names, shapes and dtypes with the model; here all is really read.
    count = 0
    for block in checkpoint.block_names:
        for name, array in checkpoint.read_block(block).items():
            if array.dtype in DTYPES.values() and not all_finite(array):
                raise QuotaError(f"block {block}: parameter {name} holds NaN or infinity")
            count += 1
        step(block)
    return f"{count} parameters in {len(checkpoint.block_names)} blocks, all finite"


def _other_model(source: Source) -> QuotaError:
    return QuotaError(f"{source.folder / 'config.json'} describes another model")


def _tensors(checkpoint: Checkpoint, source: Source, step: Callable[[str], None]) -> str:
    _, config = read_config(source)
    if config != checkpoint.config:
        raise _other_model(source)
    reader = HfReader(source)
    plan = make_plan(
        rules_of(config), config, blocks(config), reader.infos, where=str(source.folder)
    )
    casts: set[str] = set()
    for block, assignments in plan.blocks.items():
        stored = checkpoint.read_block(block)
        for assignment in assignments:
            array = stored[assignment.param]
            for name, rows in assignment.split(array):
                original = reader.read(name)
                if original.dtype != rows.dtype:
                    casts.add(f"{original.dtype} to {rows.dtype}")
                    with np.errstate(over="ignore", under="ignore"):
                        original = original.astype(rows.dtype)
                if original.tobytes() != rows.tobytes():
                    raise QuotaError(f"block {block}: {assignment.param} differs from {name}")
        step(block)
    cast = f" (after casting {', '.join(sorted(casts))})" if casts else ""
    return f"{len(list(plan.names()))} tensors equal the source bit for bit{cast}"


def _logits(checkpoint: Checkpoint, source: Source) -> str:
    if not _installed("torch"):
        raise _Skipped("torch is not installed, so there is no reference to run")
    if blocks(read_config(source)[1]) != blocks(checkpoint.config):
        raise _other_model(source)
    needed = _float32_bytes(checkpoint)
    available = _available_memory()
    if available is not None and needed * 1.25 > available:
        raise _Skipped(
            f"transformers needs {needed / 1e9:.1f} GB (float32), {available / 1e9:.1f} GB are free"
        )
    prompts = random_prompts(checkpoint.config)
    ours = _our_logits(checkpoint, prompts)
    theirs = _reference_logits(checkpoint, source, prompts)
    difference = float(np.abs(ours - theirs).max())
    scale = float(np.abs(theirs).max())
    same = int((ours.argmax(-1) == theirs.argmax(-1)).sum())
    detail = (
        f"max |difference| {difference:.2e} at max |logit| {scale:.2e} over {len(ours)} prompts "
        f"in float32 (accepted {LOGIT_TOLERANCE * scale:.2e}), same first token in {same}"
    )
    if not difference <= LOGIT_TOLERANCE * scale:
        raise QuotaError(detail)
    return detail


def _our_logits(checkpoint: Checkpoint, prompts: RandomPrompts) -> np.ndarray:
    """float32 [prompts, vocabulary] at the last token of each prompt."""
    import jax.numpy as jnp

    from quota_jax.generation import prefill

    logits, _ = prefill(checkpoint.load_model(dtype=jnp.float32), prompts.batch)
    return np.asarray(logits, np.float32)


def _reference_logits(checkpoint: Checkpoint, source: Source, prompts: RandomPrompts) -> np.ndarray:
    """The same of the source's own weights in transformers, rounded as the checkpoint's dtypes
    round them."""
    import torch
    from transformers import AutoModelForImageTextToText
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            source.folder,
            dtype=torch.float32,
            attn_implementation="eager",
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    finally:
        if shown:
            logging.enable_progress_bar()
    model, info = loaded
    if info["missing_keys"]:
        raise QuotaError(f"transformers misses {some(sorted(info['missing_keys']))}")
    model.eval()
    dtypes = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
    rows = []
    with torch.no_grad():
        for name, dtype in _stored_dtypes(checkpoint):
            weight = model.get_parameter(name)
            weight.copy_(weight.to(dtypes[dtype]))
        for inputs in prompts.reference:
            tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
            rows.append(model(**tensors).logits[0, -1].numpy())
    return np.stack(rows)


def _stored_dtypes(checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    """transformers' name in memory of every parameter, and the dtype it is stored in here."""
    for block, assignments in export_plan(checkpoint, "memory").blocks.items():
        specs = checkpoint.block_specs(block)
        for assignment in assignments:
            for piece in assignment.pieces:
                yield piece.name, np.dtype(specs[assignment.param].dtype).name


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _float32_bytes(checkpoint: Checkpoint) -> int:
    specs = [checkpoint.block_specs(block) for block in checkpoint.block_names]
    return sum(4 * int(np.prod(spec.shape)) for block in specs for spec in block.values())


def _available_memory() -> int | None:
    """Bytes that processes can still take; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in lines)
    entry = fields.get("MemAvailable")
    return None if entry is None else 1024 * int(entry.split()[0])
