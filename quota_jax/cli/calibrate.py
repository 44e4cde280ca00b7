"""``quota-jax calibrate``: quantizes a full-precision checkpoint."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from quota_jax.cli.console import CheckpointPath, progress, size, table
from quota_jax.cli.convert import describe
from quota_jax.errors import QuotaError

if TYPE_CHECKING:
    from quota_jax.quant.calibrate import Options
    from quota_jax.quant.calibration_data import Sample


@dataclass(frozen=True, kw_only=True)
class Calibrate:
    """Quantize a full-precision checkpoint block by block.

    Round-to-nearest needs no data. SmoothQuant and FlatQuant look at pictures and texts: a JSON
    list of {"image": path, "text": prompt}, the image perhaps absent, paths relative to the file. A
    run that was killed leaves OUT.partial; the same command takes it up again.

    For example:
      quota-jax calibrate llava-7b --method flatquant --data calib.json --out llava-7b-w4a4
    """

    checkpoint: CheckpointPath
    """Full-precision checkpoint made by convert."""
    out: Path
    """Folder to write; must not exist."""
    method: Literal["rtn", "smoothquant", "flatquant"] = "rtn"
    """rtn: round to nearest; smoothquant: scaled channels; flatquant: learned transforms and
    clipping."""
    bits: str = "W4A4KV4"
    """Bits of weights, activations and KV cache (4, 8 or 16 each)."""
    modules: tuple[Literal["vision", "projector", "decoder"], ...] = (
        "vision",
        "projector",
        "decoder",
    )
    """Modules whose matrices are quantized."""
    data: Path | None = None
    """The list of pictures and texts."""
    samples: int | None = None
    """How many of the list, from its start; default 128 or as many as there are."""
    steps: int = 480
    """flatquant: optimizer steps for each block."""
    batch_size: int = 4
    """Samples that are computed together; with flatquant, in a step."""
    seed: int = 0
    """flatquant: of the rotations that transforms start from."""
    start: Literal["random", "identity"] = "random"
    """flatquant: what transforms start from."""
    alpha: float = 0.5
    """smoothquant: how much of the outliers moves into the weights, 0 to 1."""

    def run(self) -> int:
        from quota_jax.checkpoint import open_checkpoint
        from quota_jax.quant.calibrate import calibrate
        from quota_jax.quantization import QuantizationConfig

        start = time.perf_counter()
        if len(set(self.modules)) != len(self.modules) or not self.modules:
            raise QuotaError(f"--modules must name each module once, got {list(self.modules)}")
        quantization = QuantizationConfig.parse(self.bits, method=self.method, modules=self.modules)
        losses: list[tuple[str, str, str]] = []
        with progress("quantizing") as step:
            calibrate(
                self.checkpoint,
                self.out,
                quantization,
                samples=self._samples(),
                options=self._options(),
                progress=lambda name, done, total: step(done, total, name),
                report=lambda found: losses.append(
                    (found.name, f"{found.first_loss:.3e}", f"{found.last_loss:.3e}")
                ),
            )
        if losses:
            print(table(("block", "first loss", "last loss"), losses))
        before = open_checkpoint(self.checkpoint).sizes()["files"]
        print(
            f"wrote {self.out}: {describe(self.out)} (before: {size(before)}), "
            f"in {time.perf_counter() - start:.1f} s"
        )
        return 0

    def _samples(self) -> list[Sample]:
        from quota_jax.quant.calibration_data import read_samples

        if self.method == "rtn":
            if self.data is not None or self.samples is not None:
                raise QuotaError("--data and --samples are of no use to --method rtn")
            return []
        if self.data is None:
            raise QuotaError(
                f"--method {self.method} needs --data, a JSON list of pictures and texts"
            )
        if self.samples is not None and self.samples < 1:
            raise QuotaError(f"--samples must be at least 1, got {self.samples}")
        found = read_samples(self.data, self.samples)
        return found if self.samples else found[:128]

    def _options(self) -> Options | None:
        from quota_jax.quant.calibrate_flatquant import FlatQuantOptions
        from quota_jax.quant.smoothquant import SmoothQuantOptions

        if self.method == "flatquant":
            return FlatQuantOptions(
                steps=self.steps, batch_size=self.batch_size, seed=self.seed, start=self.start
            )
        if self.method == "smoothquant":
            return SmoothQuantOptions(alpha=self.alpha, batch_size=self.batch_size)
        return None
