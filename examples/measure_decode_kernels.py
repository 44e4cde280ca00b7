"""Measures the kernels between the matmuls of a decode step, and whole decoder layers, on one GPU.

    python examples/measure_decode_kernels.py --out measured --seconds 200

Every variant is checked against the reference first and timed after that; one that fails is named
and the others go on. Whole layers (7B shapes, 32 of them in one program, random numbers) are timed
by the wall clock, kernels alone by CUPTI, over twelve layers of parameters. Prints a table; writes
JSON to ``--out``.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from kernel_timing import LAYERS, copy_gbs, kernel_us, over_layers  # pyrefly: ignore (beside this file)

from pallas_kernels.int4_matmul import int4_matmul
from pallas_kernels.kv4_append import kv4_append
from pallas_kernels.kv4_attention import kv4_attention
from pallas_kernels.transform_quantize import transform_quantize

DEPTH = 32
WIDTH, FFN, DIM = 4096, 11008, 128
ROWS: list[dict[str, Any]] = []


class Budget:
    """Stops starting variants when the time is over, and keeps going when one fails."""

    def __init__(self, seconds: float):
        self.end = time.perf_counter() + seconds

    def run(self, group: str, name: str, measure: Callable[[], dict[str, Any]]) -> None:
        if time.perf_counter() > self.end:
            return
        begun = time.perf_counter()
        try:
            found = measure()
        except Exception as error:  # any failure of one variant must not stop the others
            found = {"error": f"{type(error).__name__}: {str(error).splitlines()[:1]}"[:200]}
        found = {"group": group, "name": name, **found}
        ROWS.append(found | {"seconds": round(time.perf_counter() - begun, 1)})
        rest = {k: round(v, 2) if isinstance(v, float) else v for k, v in found.items()}
        print(*(f"{key}={value}" for key, value in rest.items()), flush=True)


def near(codes: Any, expected: Any, most: float = 0.03) -> float:
    """Share of codes that differ; by more than 1, or too many, is an error."""
    off = np.abs(np.asarray(codes, int) - np.asarray(expected, int))
    assert off.max() <= 1, f"off by {off.max()}"
    assert off.mean() <= most, f"{off.mean():.4f} of the codes differ"
    return float(off.mean())


def normal(seed: int, *shape: int, dtype: Any = jnp.float32, scale: float = 1.0) -> jax.Array:
    return (jax.random.normal(jax.random.key(seed), shape) * scale).astype(dtype)


def factors(inputs: int, depth: int) -> dict[str, jax.Array]:
    """Random parameters of a transform."""
    a = {4096: 64, 11008: 86, 3584: 56, 1024: 32, 1280: 32, 3420: 38}[inputs]
    b = inputs // a
    return {
        "left": normal(1, depth, a, a, scale=a**-0.5),
        "right": normal(2, depth, b, b, scale=b**-0.5),
        "clip": jnp.full((depth, 2), 0.9),
    }


def cache(depth: int, batch: int, kv_heads: int, tokens: int) -> tuple[jax.Array, ...]:
    key, shape = jax.random.key(3), (depth, batch, kv_heads, tokens)
    codes = jax.random.bits(key, (*shape, DIM // 2), jnp.uint8)
    scale = (jax.random.uniform(key, shape) * 0.2 + 0.1).astype(jnp.bfloat16)
    return codes, scale, jax.random.bits(key, shape, jnp.uint8) & 15


# Whole layers


def layer_weights(transform: bool) -> dict[str, Any]:
    def weight(seed, outputs, inputs):
        bits = jax.random.bits(jax.random.key(seed), (DEPTH, outputs, inputs // 2), jnp.uint8)
        sites = factors(inputs, DEPTH) if transform else {}
        return {"packed": bits, "scale": jnp.full((DEPTH, outputs), 0.003), "sites": sites}

    return {
        "qkv": weight(4, 3 * WIDTH, WIDTH),
        "o": weight(5, WIDTH, WIDTH),
        "gate_up": weight(6, 2 * FFN, WIDTH),
        "down": weight(7, WIDTH, FFN),
        "norm": jnp.ones((DEPTH, WIDTH), jnp.bfloat16),
    }


def layers(weights, x, key, value, lengths, cos, sin, *, impls: dict[str, str]):
    """One decode step through all layers, without embeddings and head."""

    def matmul(name, rows, index):
        own = weights[name]
        return int4_matmul(
            rows.codes, rows.scale, own["packed"], own["scale"], index, out_dtype=x.dtype
        )

    def quantize(rows, name, index, **options):
        sites = weights[name]["sites"]
        return transform_quantize(rows, index, bits=4, impl=impls["quantize"], **sites, **options)

    reach = lengths + 1

    def layer(carry, index):
        x, added, key, value = carry
        norm = {"norm": weights["norm"], "eps": 1e-5}
        first = quantize(x, "qkv", index, added=added, **norm)
        qkv = matmul("qkv", first, index)
        query, key, value = kv4_append(
            qkv, cos, sin, key, value, lengths, index, impl=impls["append"]
        )
        heads = kv4_attention(
            query, key[0], value[0], key[1], value[1], key[2], value[2], reach, index,
            sm_scale=DIM**-0.5, impl=impls["attention"],
        )  # fmt: skip
        rows = heads.astype(x.dtype).reshape(x.shape[0], -1)
        out = matmul("o", quantize(rows, "o", index), index)
        second = quantize(first.states, "gate_up", index, added=out, **norm)
        hidden = matmul("gate_up", second, index)
        out = matmul("down", quantize(hidden, "down", index, gated=True), index)
        return (second.states, out, key, value), None

    start = (x, jnp.zeros_like(x), key, value)
    (x, added, key, value), _ = jax.lax.scan(layer, start, jnp.arange(DEPTH, dtype=jnp.int32))
    return x + added, key, value


def measure_layers(budget: Budget, batches: tuple[int, ...], tokens: int = 384) -> None:
    for transform in (False, True):
        weights = layer_weights(transform)
        for batch in batches:
            angle = jax.random.uniform(jax.random.key(8), (batch, DIM // 2)) * 6
            lengths = jnp.full((batch,), 240, jnp.int32)
            x = normal(9, batch, WIDTH, dtype=jnp.bfloat16)

            def one(impls, weights=weights, batch=batch, angle=angle, lengths=lengths, x=x):
                run = jax.jit(functools.partial(layers, impls=impls), donate_argnums=(2, 3))
                key, value = (cache(DEPTH, batch, 32, tokens) for _ in range(2))
                times = []
                for repeat in range(4):
                    begun, out = time.perf_counter(), x
                    for _ in range(1 if repeat == 0 else 20):
                        out, key, value = run(
                            weights, x, key, value, lengths, jnp.cos(angle), jnp.sin(angle)
                        )
                    jax.block_until_ready(out)
                    times.append(time.perf_counter() - begun)
                assert bool(jnp.isfinite(out.astype(jnp.float32)).all())
                step = statistics.median(times[1:]) / 20
                return {"us_per_layer": 1e6 * step / DEPTH, "compile_s": times[0]}

            new = {"quantize": "pallas_triton", "append": "pallas_triton"}
            for name, impls in (
                ("now", {"quantize": "xla", "append": "xla", "attention": "pallas_triton"}),
                ("fused", new | {"attention": "pallas_triton"}),
                ("fused, attention by blocks", new | {"attention": "pallas_triton_blocks"}),
            ):
                label = f"batch {batch}, {'FlatQuant' if transform else 'RTN'}: {name}"
                budget.run("layer", label, functools.partial(one, impls))


# Kernels alone


def measure_quantize(budget: Budget, copy: float) -> None:
    from pallas_kernels.transform_quantize.pallas_triton import Plan, transform_quantize_triton
    from pallas_kernels.transform_quantize.reference import Sites

    def one(rows, inputs, transform, plan):
        gated = inputs in (11008, 3420)
        sites = factors(inputs, LAYERS) if transform else {}
        if not gated:
            sites["norm"] = jnp.ones((LAYERS, inputs), jnp.bfloat16)
        x = normal(10, rows, 2 * inputs if gated else inputs, dtype=jnp.bfloat16)
        added = None if gated else normal(11, rows, inputs, dtype=jnp.bfloat16)
        options = {"bits": 4, "eps": 1e-5, "gated": gated}

        def kernel(x, added, sites, layer):
            found = transform_quantize_triton(x, added, Sites(**sites), layer, **options, plan=plan)
            return found.codes, found.scale

        codes, _scale = jax.jit(kernel)(x, added, sites, jnp.int32(2))
        want = jax.jit(
            lambda x, added, sites: transform_quantize(
                x, 2, **options, added=added, **sites, impl="xla"
            )
        )(x, added, sites)
        off = near(codes, want.codes)
        us = kernel_us(jax.jit(kernel), x, added, sites, jnp.int32(2))
        moved = x.nbytes + rows * inputs * (1 if gated else 5)
        flops = (
            2
            * rows
            * inputs
            * (sites["left"].shape[1] + sites["right"].shape[1] if transform else 0)
        )
        floor = max(moved / copy / 1e3, flops / 300e6)
        return {"us": us, "of_floor": 100 * floor / us, "off": off}

    for rows, inputs, transform, plans in (
        (1, 4096, False, [(1, 4), (1, 8), (1, 16)]),
        (1, 4096, True, [(1, 4), (1, 8)]),
        (1, 11008, False, [(1, 8), (1, 16)]),
        (1, 11008, True, [(1, 8), (1, 16)]),
        (2560, 4096, True, [(1, 4), (4, 4), (8, 4), (4, 8)]),
        (2560, 4096, False, [(1, 4), (1, 8)]),
        (2560, 11008, True, [(1, 8), (4, 8), (8, 8)]),
        (2560, 3584, True, [(4, 4)]),
        (640, 1024, True, [(4, 4)]),
        (1296, 3420, True, [(4, 8)]),
    ):
        for rows_each, warps in plans:
            plan = Plan(rows=rows_each, warps=warps)
            label = f"{rows} x {inputs}{' transform' if transform else ''}, {rows_each} rows, "
            label += f"{warps} warps"
            call = functools.partial(one, rows, inputs, transform, plan)
            budget.run("transform_quantize", label, call)


def measure_attention(budget: Budget, copy: float) -> None:
    from pallas_kernels.kv4_attention.pallas_triton_blocks import Plan, kv4_attention_blocks

    def one(batch, tokens, heads, kv_heads, plan):
        key, value = (cache(LAYERS, batch, kv_heads, tokens) for _ in range(2))
        q = normal(12, batch, heads, DIM, dtype=jnp.bfloat16)
        lengths = jnp.full((batch,), tokens, jnp.int32)
        arrays = (q, key[0], value[0], key[1], value[1], key[2], value[2], lengths)

        def call(*arrays, plan=plan):
            if plan is None:
                return kv4_attention(*arrays, sm_scale=DIM**-0.5, impl="pallas_triton")
            return kv4_attention_blocks(*arrays, sm_scale=DIM**-0.5, plan=plan)

        want = kv4_attention(*arrays, 3, sm_scale=DIM**-0.5, impl="xla")
        off = float(jnp.abs(call(*arrays, jnp.int32(3)) - want).max() / jnp.abs(want).max())
        assert off < 1e-3, f"relative error {off:.2g}"
        us = kernel_us(over_layers(call), *arrays) / LAYERS
        stored = 2 * batch * kv_heads * tokens * (DIM // 2 + 3)
        return {"us": us, "of_copy": 100 * stored / us / 1e3 / copy, "off": off}

    for batch, tokens, heads, kv_heads, plans in (
        (1, 768, 32, 32, [None, (64, 2, 0), (64, 1, 0), (128, 4, 0), (64, 4, 1)]),
        (8, 1408, 28, 4, [None, (64, 2, 1), (64, 4, 1), (128, 4, 1)]),
        (1, 1408, 28, 4, [None, (64, 2, 1), (64, 4, 1), (32, 2, 1)]),
        (32, 768, 32, 32, [None, (64, 2, 0), (64, 1, 0), (32, 1, 0), (128, 4, 0), (64, 4, 1)]),
    ):
        for choice in plans:
            plan = None
            if choice is not None:
                tokens_each, warps, grouped = choice
                plan = Plan(tokens=tokens_each, warps=warps, grouped=bool(grouped))
            label = f"batch {batch}, {tokens} tokens, {heads}/{kv_heads} heads: {choice or 'now'}"
            call = functools.partial(one, batch, tokens, heads, kv_heads, plan)
            budget.run("kv4_attention", label, call)


def measure_skinny(budget: Budget, copy: float) -> None:
    from pallas_kernels.int4_matmul.mosaic_gpu import Tiles, int4_matmul_mosaic
    from pallas_kernels.int4_matmul.pallas_triton import int4_matmul_dot

    def one(rows, outputs, inputs, kernel):
        packed = jax.random.bits(jax.random.key(13), (LAYERS, outputs, inputs // 2), jnp.uint8)
        scale = jax.random.uniform(jax.random.key(14), (LAYERS, outputs)) + 0.1
        x = jax.random.bits(jax.random.key(15), (rows, inputs), jnp.uint8).astype(jnp.int8)
        arrays = (x, jnp.ones(rows), packed)
        ones = jnp.ones_like(scale)
        want = int4_matmul(*arrays, ones, 3, impl="xla")
        found = kernel(*arrays, ones, jnp.int32(3), out_dtype=jnp.float32)
        assert bool((found == want).all()), "not exact"
        call = functools.partial(kernel, out_dtype=jnp.bfloat16)
        us = kernel_us(over_layers(call), *arrays, scale) / LAYERS
        return {"us": us, "of_copy": 100 * outputs * inputs / 2 / us / 1e3 / copy}

    for outputs, inputs, blocks in (
        (4096, 11008, [(4, 512, 4), (4, 128, 1), (8, 128, 4), (4, 256, 2), (2, 512, 2)]),
        (11008, 4096, [(4, 512, 4), (2, 512, 2), (4, 512, 8), (8, 512, 8), (2, 512, 4)]),
    ):
        for block in blocks:
            kernel = functools.partial(int4_matmul_dot, block=block)
            label = f"1 x {outputs} x {inputs}, block {block}"
            budget.run("int4_matmul", label, functools.partial(one, 1, outputs, inputs, kernel))
    for outputs, inputs in ((4096, 11008), (11008, 4096)):
        for wide, steps in ((256, 6), (128, 8), (256, 8)):
            tiles = Tiles(tokens=8, inputs=wide, steps=steps)
            kernel = functools.partial(int4_matmul_mosaic, tiles=tiles)
            label = f"8 x {outputs} x {inputs}, {wide} inputs, {steps} steps"
            budget.run("int4_matmul", label, functools.partial(one, 8, outputs, inputs, kernel))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for decode_kernels.json")
    parser.add_argument("--seconds", type=float, default=200, help="start no variant after")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", "The Pallas Triton backend", DeprecationWarning)
    budget = Budget(options.seconds)
    copy = copy_gbs()
    print(
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}, copy {copy:.0f} GB/s", flush=True
    )
    try:
        measure_layers(budget, (1,))
        measure_quantize(budget, copy)
        measure_attention(budget, copy)
        measure_skinny(budget, copy)
        measure_layers(budget, (8,))
    finally:
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
            report = {"device": jax.devices()[0].device_kind, "copy_gbs": copy, "rows": ROWS}
            (options.out / "decode_kernels.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
