"""``quota-jax export``: a checkpoint as a Hugging Face folder."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from quota_jax.cli.console import CheckpointPath, converters, progress, size


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write a checkpoint in Hugging Face format.

    hf: unquantized, for transformers. compressed-tensors: W4A16, for transformers and vLLM. native:
    any quantized checkpoint as safetensors, with transforms and clipping, for readers of your own.

    For example:
      quota-jax export llava-7b-awq --format compressed-tensors --out llava-7b-awq-hf
    """

    checkpoint: CheckpointPath
    """Checkpoint made by convert or calibrate."""
    out: Path
    """Folder to write; must not exist."""
    format: Literal["hf", "compressed-tensors", "native"] = "hf"
    """How matrices are stored."""
    layout: Literal["saved", "hub", "memory", "memory_vision_model"] | None = None
    """Names of the tensors: as transformers 5 saves them, as on the hub, or as modules are named
    in memory; None takes the source's."""

    def run(self) -> int:
        start = time.perf_counter()
        package = converters()
        write = {
            "hf": package.export_hf,
            "compressed-tensors": package.export_compressed_tensors,
            "native": package.export_native,
        }[self.format]
        with progress("exporting") as step:
            write(self.checkpoint, self.out, layout=self.layout, progress=step)
        total = sum(path.stat().st_size for path in self.out.iterdir())
        print(f"wrote {self.out}: {size(total)}, in {time.perf_counter() - start:.1f} s")
        return 0
