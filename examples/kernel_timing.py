"""What the kernel measurements share: shapes, the GPU's own times, and its copy bandwidth."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

LAYERS = 12
WEIGHTS = {
    "qkv 7B": (12288, 4096),
    "o 7B": (4096, 4096),
    "gate_up 7B": (22016, 4096),
    "down 7B": (4096, 11008),
    "one of gate_up": (11008, 4096),
}


def kernel_us(function: Callable[..., Any], *arguments: Any, iterations: int = 3) -> float:
    """Median microseconds of GPU kernels in one call."""
    from jax.experimental.mosaic.gpu import profiler

    jax.block_until_ready(function(*arguments))
    cupti = profiler.Cupti(finalize=False)
    runs: Any = cupti.measure(function, iterations=iterations)(*arguments)[1]
    totals = [sum(ms for _, ms in run) if isinstance(run, list | tuple) else run for run in runs]
    return 1e3 * statistics.median(totals)


def copy_gbs() -> float:
    """Bytes read and written by a device copy, GB/s."""
    x = jax.random.bits(jax.random.key(0), (2**28,), jnp.uint32)
    us = kernel_us(jax.jit(lambda x: x ^ jnp.uint32(1)), x)
    return 2 * x.nbytes / us / 1e3


def over_layers(call: Callable[..., Any]) -> Callable[..., Any]:
    """All layers in one program, one after the other; only the last result is kept."""

    def run(*arguments):
        def step(carry, layer):
            return call(*arguments, layer), None

        start: Any = jax.eval_shape(call, *arguments, jnp.int32(0))
        zero = jnp.zeros(start.shape, start.dtype)
        return jax.lax.scan(step, zero, jnp.arange(LAYERS, dtype=jnp.int32))[0]

    return jax.jit(run)


def int4_example(rows: int, outputs: int, inputs: int, most: int = 7) -> tuple[jax.Array, ...]:
    """Packed weights of all layers, their scales, tokens of codes up to ``most``, and theirs."""
    return (
        jax.random.bits(jax.random.key(1), (LAYERS, outputs, inputs // 2), jnp.uint8),
        jax.random.uniform(jax.random.key(2), (LAYERS, outputs)) + 0.1,
        jax.random.randint(jax.random.key(3), (rows, inputs), -most, most + 1, jnp.int8),
        jax.random.uniform(jax.random.key(4), (rows,)) + 0.1,
    )


GROUP = 128


def w4a16_example(rows: int, outputs: int, inputs: int) -> tuple[jax.Array, ...]:
    """Tokens, and a stack of weights in groups of 128 with zero points, as AWQ has."""
    keys = [jax.random.key(i) for i in range(4)]
    groups = (LAYERS, outputs, inputs // GROUP)
    return (
        jax.random.normal(keys[0], (rows, inputs), jnp.bfloat16),
        jax.random.bits(keys[1], (LAYERS, outputs, inputs // 2), jnp.uint8),
        (0.05 * jax.random.uniform(keys[2], groups) + 0.005).astype(jnp.bfloat16),
        jax.random.randint(keys[3], groups, 0, 16, jnp.uint8),
    )
