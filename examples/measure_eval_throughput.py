"""How much of the bare compiled step's throughput `quota-jax eval` reaches.

    python examples/measure_eval_throughput.py                      # LLaVA-1.5-7B shape, on a GPU
    python examples/measure_eval_throughput.py --preset small       # the shipped model's, anywhere

Weights are random, pictures are drawn noise stored as JPEG files (640 x 480, like COCO's). Both
ways answer the same batches: the runner opens files, resizes, tokenizes and decodes text beside the
device; the bare step finds its batches on the device. What is printed last is the runner's share.
On a CPU host and device are the same cores, so only the figures of a GPU mean anything.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from quota_jax.bench import random_model
from quota_jax.config import PRESETS, config_from_hf
from quota_jax.evaluate.engine import Engine
from quota_jax.evaluate.parallel import local_mesh
from quota_jax.evaluate.schedule import Request, encode
from quota_jax.evaluate.throughput import measure_throughput
from quota_jax.processing import Processor
from quota_jax.quantization import QuantizationConfig
from quota_jax.recipe import Recipe
from quota_jax.testbed import small_llava_path

QUESTION = "Is there a red car left of the blue house?"


@dataclass(frozen=True)
class File:
    """A picture source."""

    path: Path

    @property
    def name(self) -> str:
        return str(self.path)

    def load(self) -> Image.Image:
        return Image.open(self.path)


def write_pictures(folder: Path, count: int) -> list[File]:
    """Noise of some coarseness, so that files are about as large as photographs."""
    rng = np.random.default_rng(0)
    files = []
    for place in range(count):
        coarse = rng.integers(0, 256, (60, 80, 3), np.uint8)
        picture = Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC)
        files.append(File(folder / f"{place}.jpg"))
        picture.save(files[-1].path, quality=90)
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="llava_1_5_7b", help="a LLaVA preset, or small")
    parser.add_argument("--bits", default="W4A4KV4")
    parser.add_argument("--keep", type=float, default=0.3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--new", type=int, default=16, help="new tokens of each answer")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1))
    args = parser.parse_args()

    small = config_from_hf(json.loads((small_llava_path() / "config.json").read_text()))
    config = small if args.preset == "small" else PRESETS[args.preset]
    # The shipped model's tokenizer stands in for LLaVA's, hence also its image token.
    config = dataclasses.replace(config, image_token_id=small.image_token_id)
    processor = Processor.from_folder(small_llava_path(), config)
    # No stop ids: every answer has the same number of tokens.
    processor = dataclasses.replace(processor, stop_ids=())
    quantization = QuantizationConfig.parse(args.bits)
    recipe: Any = Recipe.none(config.text.num_layers)
    if args.keep < 1:
        layers = range(2, 7)
        recipe = Recipe.uniform(
            num_layers=config.text.num_layers, layers=list(layers), keep=args.keep
        )
    engine = Engine(
        model=random_model(config, quantization, jnp.bfloat16),
        processor=processor,
        recipe=recipe,
        mesh=local_mesh(),
        batch_size=args.batch_size,
        workers=args.workers,
    )
    with tempfile.TemporaryDirectory() as folder:
        requests = [
            Request(
                name=file.name,
                conversation=[
                    {
                        "role": "user",
                        "content": [
                            {"type": "image", "image": file},
                            {"type": "text", "text": QUESTION},
                        ],
                    }
                ],
                max_new_tokens=args.new,
            )
            for file in write_pictures(Path(folder), args.samples)
        ]
        found = measure_throughput(engine, encode(requests, processor))
    device = jax.devices()[0].device_kind
    print(
        f"{args.preset} {quantization.label} keep {args.keep:g}, batch {args.batch_size} on "
        f"{engine.mesh.size} x {device}, {args.samples} samples, {args.workers} workers, "
        f"jax {jax.__version__}"
    )
    print(f"bare step  {found.bare:8.2f} samples/s")
    print(
        f"runner     {found.runner:8.2f} samples/s, device busy "
        f"{100 * found.timings.busy_share:.1f} % of the time"
    )
    print(f"share      {100 * found.share:8.1f} %")


if __name__ == "__main__":
    main()
