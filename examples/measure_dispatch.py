"""Measures what starting a decode step costs on the host, at the depth of a 7B model.

    python examples/measure_dispatch.py

A tiny random LLaVA with 32 decoder layers, so that computing takes next to nothing. `decode_chunk`
with limit 0 runs no step, so the time until the call returns is what a step costs the host before
the device works: flattening the model's pytree, donation, handing over. The target is a median of
at most 0.3 ms on a CPU. "done" adds the empty program itself.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np

from quota_jax.batch import Batch
from quota_jax.config import LlavaConfig, TextConfig, VisionConfig
from quota_jax.generation import begin, decode_chunk
from quota_jax.models.params import build_model, init_params
from quota_jax.quant.calibrate import quantize_params
from quota_jax.quantization import QuantizationConfig
from quota_jax.recipe import Recipe

TARGET_MS = 0.3


def config(num_layers: int) -> LlavaConfig:
    vision = VisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_layers=24,
        num_heads=2,
        image_size=56,
        patch_size=14,
    )
    text = TextConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_layers=num_layers,
        num_heads=4,
        num_kv_heads=4,
        head_dim=16,
    )
    return LlavaConfig(vision=vision, text=text, image_token_id=1)


def text_batch(length: int) -> Batch:
    places = jnp.arange(length, dtype=jnp.int32)[None]
    return Batch(
        tokens=places + 2,
        lengths=jnp.asarray([length], jnp.int32),
        visual_index=jnp.full((1, length), -1, jnp.int32),
        positions=places,
        pixels=jnp.zeros((0, 3, 56, 56), jnp.float32),
        text_bucket=length,
        visual_bucket=0,
    )


def median_ms(model, state, limit: int, repeats: int) -> tuple[float, float]:
    """Median time until the call returns, and until its result is there."""
    called, ready = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        state = decode_chunk(model, state, np.int32(limit))
        called.append(time.perf_counter() - start)
        jax.block_until_ready(state)
        ready.append(time.perf_counter() - start)
    return 1e3 * statistics.median(called), 1e3 * statistics.median(ready)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=300)
    options = parser.parse_args()
    shape = config(options.layers)
    params = init_params(shape, jax.random.key(0))
    recipe = Recipe.uniform(
        num_layers=options.layers, layers=range(2, min(7, options.layers)), keep=0.3
    )
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}, {options.layers} layers")
    worst = 0.0
    for label in ("W16A16KV16", "W4A4KV4"):
        bits = QuantizationConfig.parse(label)
        arrays = quantize_params({n: np.asarray(a) for n, a in params.items()}, bits)
        model = build_model(shape, bits, {n: jnp.asarray(a) for n, a in arrays.items()})
        for name, kept in (("unpruned", None), ("pruned", recipe)):
            state = begin(model, text_batch(16), recipe=kept, max_new_tokens=100)
            leaves = len(jax.tree.leaves((model, state)))
            state = decode_chunk(model, state, np.int32(1))
            called, ready = median_ms(model, state, 0, options.repeats)
            worst = max(worst, called)
            print(
                f"{label:10} {name:8}  {leaves:3d} arrays  returns after {called:.3f} ms, "
                f"done after {ready:.3f} ms"
            )
    print(f"worst {worst:.3f} ms, target {TARGET_MS} ms")
    return 0 if worst <= TARGET_MS else 1


if __name__ == "__main__":
    sys.exit(main())
