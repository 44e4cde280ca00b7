"""Options of ``recipe`` that derive QUOTA's schedule from measured sensitivities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from quota_jax.cli.console import table
from quota_jax.errors import QuotaError

if TYPE_CHECKING:
    from quota_jax.checkpoint import Checkpoint
    from quota_jax.prune.allocator import Allocation
    from quota_jax.prune.sensitivity import Sensitivities
    from quota_jax.quant.calibration_data import Sample
    from quota_jax.recipe import Recipe

RHO = 0.3
"""The paper's final keep ratio."""


@dataclass(frozen=True, kw_only=True)
class DeriveOptions:
    """Calibration data and QUOTA's own parameters."""

    derive: bool = False
    """Derive QUOTA's schedule: layers that quantization disturbs less drop more tokens."""
    rho: float | None = None
    """With --derive: fraction of the visual tokens that is left after the last stage; default
    0.3."""
    tau: float = 1.0
    """With --derive: temperature of the allocation; the higher, the more alike the drops."""
    data: Path | None = None
    """With --derive: a JSON list of pictures and texts, as calibrate takes."""
    reference: Path | None = None
    """With --derive: the full-precision checkpoint that this one was calibrated from."""
    sensitivities: Path | None = None
    """With --derive: a file of measured sensitivities to take, or with --data to write; default
    CHECKPOINT.sensitivities.json beside the checkpoint."""
    samples: int | None = None
    """How many of the list, from its start; default 128 or as many as there are."""
    batch_size: int = 4
    """Samples that are computed together."""
    local: bool = False
    """Measure each layer on full-precision inputs, instead of errors that accumulate."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Measure in this dtype; None takes the stored one."""

    def measured(self, checkpoint: Checkpoint) -> tuple[Sensitivities, str]:
        """Sensitivities, measured or out of a file, and a line that says which."""
        from quota_jax.checkpoint import open_checkpoint
        from quota_jax.prune.sensitivity import (
            Sensitivities,
            SensitivityOptions,
            measure_sensitivities,
            sensitivity_identity,
        )

        if (self.data is None) != (self.reference is None):
            raise QuotaError("--data and --reference belong together")
        if self.data is None or self.reference is None:
            if self.sensitivities is None:
                raise QuotaError(
                    "--derive needs --data and --reference, or --sensitivities with a file of "
                    "measured ones"
                )
            found = Sensitivities.read(self.sensitivities)
            if found.provenance.get("checkpoint") != checkpoint.fingerprint:
                raise QuotaError(f"{self.sensitivities}: was measured on another checkpoint")
            return found, f"sensitivities from {self.sensitivities}"
        samples = read_some(self.data, self.samples)
        reference = open_checkpoint(self.reference)
        options = SensitivityOptions(local=self.local, batch_size=self.batch_size, dtype=self.dtype)
        path = self.sensitivities or beside(checkpoint.path, ".sensitivities.json")
        identity = sensitivity_identity(checkpoint, reference, samples, options)
        if path.exists():
            found = Sensitivities.read(path)
            if found.provenance == identity:
                return found, f"sensitivities from {path}"
            if self.sensitivities is not None:
                raise QuotaError(
                    f"{path}: was measured on other checkpoints, data or options; remove it or "
                    "name another file"
                )
        found = measure_sensitivities(
            checkpoint,
            reference,
            samples,
            path.with_name(path.name + ".partial"),
            options=options,
            progress=True,
        )
        found.write(path)
        return found, f"wrote {path}: sensitivities measured on {len(samples)} samples"


def read_some(path: Path, count: int | None) -> list[Sample]:
    """The samples of a calibration list: the first ``count``, or up to 128."""
    from quota_jax.quant.calibration_data import read_samples

    if count is not None and count < 1:
        raise QuotaError(f"--samples must be at least 1, got {count}")
    found = read_samples(path, count)
    return found if count else found[:128]


def beside(folder: Path, ending: str) -> Path:
    """A file beside a folder, named after it."""
    folder = folder if folder.name not in ("", "..") else folder.resolve()
    return folder.with_name(folder.name + ending)


def allocation_table(allocation: Allocation, recipe: Recipe, tokens: int) -> str:
    """The derivation of each candidate layer's budget, Eq. 1 to 5."""
    rows: list[Sequence[object]] = [
        (
            layer,
            f"{sensitivity:.4f}",
            f"{scaled:.3f}",
            f"{weight:.4f}",
            f"{drop:.4f}",
            f"{ratio:.4f}",
            recipe.target(tokens, ratio),
        )
        for layer, sensitivity, scaled, weight, drop, ratio in zip(
            allocation.candidates,
            allocation.sensitivities,
            allocation.normalised,
            allocation.weights,
            allocation.drops,
            allocation.ratios,
            strict=True,
        )
    ]
    header = ("layer", "sensitivity", "rescaled", "weight", "drop", "keep", f"of {tokens}")
    return table(header, rows)
