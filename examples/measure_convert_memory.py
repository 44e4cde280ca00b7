"""Measures the peak host memory of converting a random LLaVA checkpoint.

    python examples/measure_convert_memory.py                     # 2 GB in bfloat16
    python examples/measure_convert_memory.py --gigabytes 8 --dtype float32

The checkpoint is written to a temporary folder tensor by tensor and removed afterwards. Writing and
converting run in processes of their own; the peak is the kernel's `ru_maxrss` of the second. The
claim: peak <= 3 x the largest block + 1 GiB, whatever the size of checkpoint and shards.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

GIB = 2**30


def make(folder: Path, gigabytes: float) -> None:
    """Writes a random checkpoint of about that size in bfloat16, in shards of 1 GB."""
    import ml_dtypes
    import numpy as np

    from converters.hf_writer import HfWriter, TensorSpec
    from converters.llava_rules import LLAVA_RULES
    from converters.rules import assign
    from quota_jax.config import LlavaConfig, TextConfig, VisionConfig
    from quota_jax.models.params import blocks

    def config(num_layers: int) -> LlavaConfig:
        vision = VisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_layers=4,
            num_heads=16,
            image_size=336,
            patch_size=14,
        )
        text = TextConfig(
            vocab_size=32064,
            hidden_size=2048,
            intermediate_size=5504,
            num_layers=num_layers,
            num_heads=16,
            num_kv_heads=16,
            head_dim=128,
        )
        return LlavaConfig(vision=vision, text=text, image_token_id=32000)

    def size(num_layers: int) -> int:
        described = blocks(config(num_layers)).values()
        return sum(2 * spec.size for params in described for spec in params.values())

    num_layers = max(1, round((gigabytes * 1e9 - size(1)) / (size(2) - size(1))) + 1)
    model = config(num_layers)
    plan = assign(LLAVA_RULES, model, blocks(model), LLAVA_RULES.layout("hub"))
    dtype = np.dtype(ml_dtypes.bfloat16)
    specs = {
        piece.name: TensorSpec(shape=piece.shape, dtype=dtype)
        for assignments in plan.blocks.values()
        for assignment in assignments
        for piece in assignment.pieces
    }
    folder.mkdir()
    writer = HfWriter(folder, specs, 1e9)
    rng = np.random.default_rng(0)
    for name, spec in specs.items():
        writer.write(name, (0.02 * rng.standard_normal(spec.shape, np.float32)).astype(dtype))
    writer.finish()
    (folder / "config.json").write_text(json.dumps(model.to_hf()))


def run(mode: str, *arguments: object) -> tuple[int, float]:
    """Runs this script in another process; its peak resident bytes and seconds."""
    started = time.perf_counter()
    command = [sys.executable, __file__, "--mode", mode, *map(str, arguments)]
    child = subprocess.Popen(command)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != 0:
        sys.exit(f"error: {mode} failed with status {child.returncode}")
    unit = 1 if sys.platform == "darwin" else 1024
    return usage.ru_maxrss * unit, time.perf_counter() - started


def report(work: Path, gigabytes: float, dtype: str | None) -> bool:
    """Makes, converts and prints; True if the peak is within the bound."""
    source, out = work / "hf", work / "checkpoint"
    _, seconds = run("make", source, gigabytes)
    shards = list(source.glob("*.safetensors"))
    stored = sum(shard.stat().st_size for shard in shards)
    print(
        f"checkpoint     {stored / 1e9:8.2f} GB in {len(shards)} shards (made in {seconds:.0f} s)"
    )
    peak, seconds = run("convert", source, out, dtype or "as-stored")
    manifest = json.loads((out / "manifest.json").read_text())
    per_block = {
        name: sum(file["bytes"] for file in block["files"].values())
        for name, block in manifest["blocks"].items()
    }
    largest = max(per_block, key=per_block.__getitem__)
    bound = 3 * per_block[largest] + GIB
    print(f"largest block  {per_block[largest] / GIB:8.3f} GiB ({largest})")
    print(f"peak memory    {peak / GIB:8.3f} GiB resident, interpreter and libraries included")
    print(f"bound          {bound / GIB:8.3f} GiB (3 x largest block + 1 GiB)")
    print(f"time           {seconds:8.1f} s ({stored / 1e6 / seconds:.0f} MB/s)")
    return peak <= bound


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the checkpoint")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], help="cast to")
    parser.add_argument("--folder", type=Path, help="where the temporary folder goes")
    parser.add_argument("--mode", choices=["make", "convert"], help=argparse.SUPPRESS)
    parser.add_argument("rest", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.mode == "make":
        make(Path(options.rest[0]), float(options.rest[1]))
        return 0
    if options.mode == "convert":
        from converters import convert

        source, out, dtype = options.rest
        convert(source, out, dtype=None if dtype == "as-stored" else dtype)
        return 0
    with tempfile.TemporaryDirectory(dir=options.folder) as work:
        within = report(Path(work), options.gigabytes, options.dtype)
    print("within the bound" if within else "error: beyond the bound")
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
