"""Measures FlatQuant's calibration of one decoder block at a real model's shape.

    python examples/measure_calibration.py --preset llava_1_5_7b --samples 128

Random weights and activations: what is learned means nothing, what it costs does. The block is
trained as `calibrate` trains it (every step of every round); the projection
to the whole model multiplies by the number of decoder layers and leaves out the vision tower,
reading and writing.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np

from quota_jax.bench import example_batch
from quota_jax.config import PRESETS
from quota_jax.models.params import blocks
from quota_jax.quant.blocks import Block, forward
from quota_jax.quant.calibrate_flatquant import FlatQuantOptions, Task, block_sites
from quota_jax.quant.calibration_data import CalibrationData
from quota_jax.quantization import QuantizationConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="llava_1_5_7b", choices=sorted(PRESETS))
    parser.add_argument("--bits", default="W4A4KV4")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--text-tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=FlatQuantOptions().steps)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()

    config = PRESETS[options.preset]
    learning = FlatQuantOptions(steps=options.steps)
    quantization = learning.configure(QuantizationConfig.parse(options.bits, method="flatquant"))
    name = "decoder_layer_000"
    block = Block.named(config, name)
    assert block is not None
    rng = np.random.default_rng(0)
    specs = blocks(config, QuantizationConfig.none, jnp.float32)[name]
    stored = {
        key: np.ones(spec.shape, np.float32)
        if key.endswith("scale")
        else rng.standard_normal(spec.shape, np.float32) * spec.shape[-1] ** -0.5
        for key, spec in specs.items()
    }
    size = learning.batch_size
    one = example_batch(config, size, options.text_tokens)
    data = CalibrationData(
        batches=[one] * -(-options.samples // size), counts=[size] * -(-options.samples // size)
    )
    length = one.visual_bucket + one.text_bucket
    shape = size, length, config.text.hidden_size
    inputs = [rng.standard_normal(shape, np.float32) for _ in data.batches]
    params = jax.device_put(stored)
    outputs = [np.asarray(forward(params, x, one, block=block)) for x in inputs]
    del params
    task = Task(
        block=block,
        quantization=quantization,
        sites=block_sites(block, stored, quantization),
        options=learning,
    )

    def train() -> float:
        begun = time.perf_counter()
        task.learn(name, stored, inputs, outputs, data)
        return time.perf_counter() - begun

    first, second = train(), train()  # the first one compiles
    stats = jax.devices()[0].memory_stats() or {}
    layers = config.text.num_layers
    found = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "command": " ".join(["python examples/measure_calibration.py", *sys.argv[1:]]),
        "samples": len(data.batches) * size,
        "tokens": length,
        "steps": options.steps,
        "first_block_seconds": round(first, 1),
        "next_block_seconds": round(second, 1),
        "peak_gib": round(stats.get("peak_bytes_in_use", 0) / 2**30, 2),
        "decoder_minutes": round((first + (layers - 1) * second) / 60, 1),
    }
    print(json.dumps(found, indent=1))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
