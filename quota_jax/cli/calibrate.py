"""``quota-jax calibrate``: quantizes a full-precision checkpoint."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from quota_jax.cli.console import CheckpointPath, progress, size
from quota_jax.cli.convert import describe
from quota_jax.errors import QuotaError


@dataclass(frozen=True, kw_only=True)
class Calibrate:
    """Quantize a full-precision checkpoint block by block.

    Round-to-nearest needs no data. A run that was killed leaves OUT.partial; the same command takes
    it up again.

    For example:
      quota-jax calibrate llava-7b --bits W4A8KV4 --out llava-7b-w4a8
    """

    checkpoint: CheckpointPath
    """Full-precision checkpoint made by convert."""
    out: Path
    """Folder to write; must not exist."""
    method: Literal["rtn"] = "rtn"
    """rtn: round to nearest."""
    bits: str = "W4A4KV4"
    """Bits of weights, activations and KV cache (4, 8 or 16 each)."""
    modules: tuple[Literal["vision", "projector", "decoder"], ...] = (
        "vision",
        "projector",
        "decoder",
    )
    """Modules whose matrices are quantized."""

    def run(self) -> int:
        from quota_jax.checkpoint import open_checkpoint
        from quota_jax.quant.calibrate import calibrate
        from quota_jax.quantization import QuantizationConfig

        start = time.perf_counter()
        if len(set(self.modules)) != len(self.modules) or not self.modules:
            raise QuotaError(f"--modules must name each module once, got {list(self.modules)}")
        quantization = QuantizationConfig.parse(self.bits, method=self.method, modules=self.modules)
        with progress("quantizing") as step:
            calibrate(
                self.checkpoint,
                self.out,
                quantization,
                progress=lambda name, done, total: step(done, total, name),
            )
        before = open_checkpoint(self.checkpoint).sizes()["files"]
        print(
            f"wrote {self.out}: {describe(self.out)} (before: {size(before)}), "
            f"in {time.perf_counter() - start:.1f} s"
        )
        return 0
