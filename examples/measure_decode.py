"""Measures decoding and the time to the first token of a 4-bit model at its real shape.

    python examples/measure_decode.py --batch 1 8 32 --method rtn flatquant

Random weights, 64 text tokens beside the preset's picture, the candidate layers' uniform recipe.
Decoding comes first, from caches that no prefill filled, because a prefill takes longest to
compile. Every number is printed as soon as it is there.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp

from quota_jax.bench import measure, measure_decoding, random_model
from quota_jax.config import PRESETS
from quota_jax.prune.presets import candidates
from quota_jax.quantization import QuantizationConfig
from quota_jax.recipe import Recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="llava_1_5_7b", choices=sorted(PRESETS))
    parser.add_argument("--bits", default="W4A4KV4")
    parser.add_argument("--method", nargs="+", default=["rtn", "flatquant"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--keep", type=float, default=0.3)
    parser.add_argument("--new", type=int, default=64, help="tokens to decode")
    parser.add_argument("--first-token", action="store_true", help="also the time to it, batch 1")
    parser.add_argument("--layers", type=int, help="decoder layers (the preset's)")
    options = parser.parse_args()

    config = PRESETS[options.preset]
    if options.layers is not None:
        text = dataclasses.replace(config.text, num_layers=options.layers)
        config = dataclasses.replace(config, text=text)
    depth = config.text.num_layers
    recipe = Recipe.uniform(num_layers=depth, layers=candidates(config), keep=options.keep)
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {options.preset}", flush=True)

    def model_of(method):
        quantization = QuantizationConfig.parse(options.bits, method=method)
        return random_model(config, quantization, jnp.bfloat16)

    for method in options.method:
        model = model_of(method)
        for batch in options.batch:
            begun = time.perf_counter()
            step = measure_decoding(model, recipe, batch_size=batch, new_tokens=options.new)
            print(
                f"{options.bits} {method}, batch {batch}: {1e3 * step:.3f} ms a step, "
                f"{batch / step:.0f} tokens/s ({time.perf_counter() - begun:.0f} s)",
                flush=True,
            )
    for method in options.method if options.first_token else ():
        result = measure(model_of(method), recipe, new_tokens=options.new, repeats=5)
        print(
            f"{result.label} {method}, batch 1: first token {1e3 * result.first_token:.2f} ms, "
            f"decode step {1e3 * result.decode_step:.3f} ms (lowering {result.lowering:.1f} s, "
            f"compile {result.compile:.1f} s)",
            flush=True,
        )


if __name__ == "__main__":
    main()
