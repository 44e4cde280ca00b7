"""Measures what a 4-bit checkpoint occupies on disk at a real model's shape.

    python examples/measure_sizes.py --out /tmp/sizes              # both 7B models, about 6 GB free
    python examples/measure_sizes.py --out /tmp/sizes --models llava_1_5_7b --json sizes.json

Nothing is calibrated: every block gets random codes over their whole range (nothing compresses),
random scales, identities as transforms, and goes through the writer that calibration uses, so the
files are those of a real checkpoint. Each one is opened, checked against its checksums, read back
block by block and removed before the next is written. Bytes: logical (sum of the arrays), files
(their lengths) and disk (allocated, as `du` counts). GB are 10^9 bytes, as in the paper.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from quota_jax.checkpoint import CheckpointWriter, open_checkpoint
from quota_jax.config import PRESETS, ModelConfig
from quota_jax.models.params import blocks
from quota_jax.quantization import QuantizationConfig

MODELS = ("llava_1_5_7b", "qwen2_5_vl_7b")
LABELS = ("W4A4KV4", "W4A4KV4E8H8")
LIMITS = {
    ("llava_1_5_7b", "W4A4KV4"): 3.97,
    ("llava_1_5_7b", "W4A4KV4E8H8"): 3.70,
    ("qwen2_5_vl_7b", "W4A4KV4"): 5.86,
    ("qwen2_5_vl_7b", "W4A4KV4E8H8"): 4.72,
}
"""The paper's sizes in GB (Table 7), and this project's own with 8-bit embeddings and head."""
FREE = ml_dtypes.bfloat16


def draw(name: str, spec: jax.ShapeDtypeStruct, dtype: Any, rng: np.random.Generator) -> Any:
    """An array of this form: noise, or an identity for a square float matrix of a transform."""
    leaf = name.rpartition(".")[2]
    if spec.dtype.kind in "iu":
        return np.frombuffer(rng.bytes(spec.size * spec.dtype.itemsize), spec.dtype).reshape(
            spec.shape
        )
    if leaf in ("left", "right"):
        return np.eye(*spec.shape, dtype=spec.dtype)
    return (rng.random(spec.shape, np.float32) + 0.5).astype(dtype)


def write(out: Path, config: ModelConfig, quantization: QuantizationConfig) -> None:
    """A checkpoint of random content, one block in memory at a time."""
    # Two descriptions: what keeps its dtype whatever the model's floats are stored in.
    wide, narrow = blocks(config, quantization), blocks(config, quantization, FREE)
    rng = np.random.default_rng(0)
    with CheckpointWriter(
        out,
        config=config,
        quantization=quantization,
        provenance={"source": "random content of examples/measure_sizes.py"},
        assets={},
        fingerprint=f"measure_sizes {quantization.label}",
    ) as writer:
        for block in writer.missing:
            writer.write_block(
                block,
                {
                    name: draw(name, spec, narrow[block][name].dtype, rng)
                    for name, spec in wide[block].items()
                },
            )
        writer.finish()


def measure(out: Path, model: str, label: str, method: str) -> dict[str, Any]:
    """Sizes of one checkpoint in bytes; the folder is removed again."""
    try:
        write(out, PRESETS[model], QuantizationConfig.parse(label, method=method))
        checkpoint = open_checkpoint(out)
        checkpoint.verify_checksums()
        for block in checkpoint.block_names:
            checkpoint.read_block(block)
        sizes = checkpoint.sizes()
    finally:
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(out.with_name(out.name + ".partial"), ignore_errors=True)
    shared: dict[str, int] = {}
    for block, count in sizes["blocks"].items():
        kind = block.split("_layer_")[0] + (" layers" if "_layer_" in block else "")
        shared[kind] = shared.get(kind, 0) + count
    return {
        "model": model,
        "method": method,
        "label": label,
        **{key: sizes[key] for key in ("logical", "files", "disk", "dtypes")},
        "logical_by_block": shared,
        "limit_gb": LIMITS.get((model, label)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to make and remove")
    parser.add_argument("--models", nargs="+", default=MODELS, choices=sorted(PRESETS))
    parser.add_argument("--labels", nargs="+", default=LABELS)
    parser.add_argument("--method", default="flatquant")
    parser.add_argument("--json", type=Path, help="where to write all numbers")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True)
    rows = []
    try:
        for model in arguments.models:
            for label in arguments.labels:
                row = measure(arguments.out / f"{model}-{label}", model, label, arguments.method)
                rows.append(row)
                limit = f"  (at most {row['limit_gb']:.2f})" if row["limit_gb"] else ""
                print(
                    f"{model} {label}: logical {row['logical'] / 1e9:.3f} GB, files "
                    f"{row['files'] / 1e9:.3f} GB, disk {row['disk'] / 1e9:.3f} GB{limit}",
                    flush=True,
                )
    finally:
        shutil.rmtree(arguments.out)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
