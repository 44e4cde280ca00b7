"""``quota-jax convert``: from a Hugging Face checkpoint."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from quota_jax.cli.console import converters, progress, size


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Convert a LLaVA-1.5 or Qwen2.5-VL checkpoint, a folder or a hub id, block by block.

    Weights that AWQ (GEMM), GPTQ or compressed-tensors (pack-quantized) has quantized to 4 bits
    keep their codes. A run that was killed leaves OUT.partial; the same command takes it up again.

    For example:
      quota-jax convert llava-hf/llava-1.5-7b-hf --out llava-7b
    """

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")]
    """Folder with safetensors, or a hub id (owner/name, owner/name@revision)."""
    out: Path
    """Folder to write; must not exist."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Cast all tensors but quantized ones and their scales; None keeps each tensor's own."""

    def run(self) -> int:
        start = time.perf_counter()
        with progress("converting") as step:
            converters().convert(self.source, self.out, dtype=self.dtype, progress=step)
        print(f"wrote {self.out}: {describe(self.out)}, in {time.perf_counter() - start:.1f} s")
        return 0


def describe(path: Path) -> str:
    """One phrase about a finished checkpoint: model type, depth, bits, bytes."""
    from quota_jax.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(path)
    bits = checkpoint.quantization.label
    if checkpoint.quantization.is_none:
        bits = checkpoint.dtype.name
    return (
        f"{checkpoint.config.model_type}, {checkpoint.config.text.num_layers} decoder layers, "
        f"{bits}, {size(checkpoint.sizes()['files'])} in {len(checkpoint.block_names)} blocks"
    )
