"""Profiles the prefill of a 4-bit model at its real shape: what the time to the first token is made
of.

    python examples/measure_prefill.py --batch 1 --keep 0.3      # one NVIDIA GPU

Random weights. Prints lowering and compile time, the wall time of a prefill, how long its caller is
busy starting it, the number of launches, the sum of kernel times (CUPTI), and the kernels that
take most of it.
"""

from __future__ import annotations

import argparse
import collections
import functools
import re
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp

from quota_jax.bench import example_batch, random_model
from quota_jax.config import PRESETS
from quota_jax.generation import prefill
from quota_jax.prune.presets import candidates
from quota_jax.quantization import QuantizationConfig
from quota_jax.recipe import Recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="llava_1_5_7b", choices=sorted(PRESETS))
    parser.add_argument("--bits", default="W4A4KV4")
    parser.add_argument("--method", default="rtn")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--keep", type=float, default=0.3)
    parser.add_argument("--top", type=int, default=30, help="kernels to print")
    options = parser.parse_args()
    config = PRESETS[options.preset]
    depth = config.text.num_layers
    recipe = Recipe.uniform(num_layers=depth, layers=candidates(config), keep=options.keep)
    quantization = QuantizationConfig.parse(options.bits, method=options.method)
    model = random_model(config, quantization, jnp.bfloat16)
    batch = jax.device_put(example_batch(config, options.batch, 64))
    run = functools.partial(prefill, recipe=recipe)

    begun = time.perf_counter()
    lowered = jax.jit(run).lower(model, batch)
    lowering = time.perf_counter() - begun
    program = lowered.compile()
    compiling = time.perf_counter() - begun - lowering
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {options.preset}", flush=True)
    print(f"lowered in {lowering:.1f} s, compiled in {compiling:.1f} s", flush=True)

    jax.block_until_ready(program(model, batch))
    whole, starting = [], []
    for _ in range(10):
        begun = time.perf_counter()
        result = program(model, batch)
        starting.append(time.perf_counter() - begun)
        jax.block_until_ready(result)
        whole.append(time.perf_counter() - begun)
    kernels = kernel_times(program, model, batch)
    print(
        f"{1e3 * statistics.median(whole):.2f} ms, of which the caller is busy for "
        f"{1e3 * statistics.median(starting):.2f}; {len(kernels)} launches, kernels "
        f"{sum(ms for _, ms in kernels):.2f} ms"
    )
    times: dict[str, list[float]] = collections.defaultdict(list)
    for name, ms in kernels:
        times[re.sub(r"_\d+$", "", name)].append(1e3 * ms)
    for name, us in sorted(times.items(), key=lambda item: -sum(item[1]))[: options.top]:
        print(f"{sum(us):9.1f} us {len(us):5d} x {sum(us) / len(us):7.2f}  {name[:90]}")


def kernel_times(function: Any, *arguments: Any) -> list[tuple[str, float]]:
    """Name and milliseconds of each kernel of one call, in order."""
    from jax.experimental.mosaic.gpu import profiler

    cupti = profiler.Cupti(finalize=False)
    found: Any = cupti.measure(function, aggregate=False)(*arguments)[1]
    return list(found)


if __name__ == "__main__":
    main()
