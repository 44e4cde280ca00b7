"""Measures the GPU kernels at the shapes of 7B models, beside XLA and the device's copy bandwidth.

    python examples/measure_kernels.py --out pallas_kernels/measured      # one NVIDIA GPU

Times are sums of kernel times (CUPTI), medians, warm, on random data; weights rotate over twelve
layers so that the L2 cache holds none of them. Every kernel is checked against the reference in the
same run. Writes a table (Markdown) and the numbers (JSON).
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
from kernel_timing import (  # pyrefly: ignore (beside this file)
    GROUP,
    LAYERS,
    WEIGHTS,
    copy_gbs,
    int4_example,
    kernel_us,
    over_layers,
    w4a16_example,
)

from pallas_kernels import jax_triton_calls
from pallas_kernels.attention import sequence_attention
from pallas_kernels.attention_mass import attention_mass
from pallas_kernels.int4_matmul import int4_matmul
from pallas_kernels.int4_matmul.api import automatic, refusals
from pallas_kernels.kv4_attention import kv4_attention
from pallas_kernels.kv4_attention.api import automatic as attention_automatic
from pallas_kernels.kv4_attention.api import refusals as attention_refusals
from pallas_kernels.w4a16_matmul import w4a16_matmul

MATMULS = "mosaic_gpu", "pallas_triton", "triton"
ATTENTIONS = "pallas_triton_blocks", "pallas_triton", "triton"


def bf16_us(x: jax.Array, outputs: int) -> float:
    """XLA's product with a bfloat16 weight."""
    # Separate arrays: a scan would copy each slice of the weights. Three of them exceed the cache.
    shape = outputs, x.shape[1]
    dense = [jax.random.normal(jax.random.key(4 + i), shape, jnp.bfloat16) for i in range(3)]

    @jax.jit
    def bf16(x, weights):
        return [jax.lax.dot_general(x, w, (((1,), (1,)), ((), ()))) for w in weights]

    return kernel_us(bf16, x, dense) / len(dense)


def measure_matmul(rows: int, outputs: int, inputs: int) -> dict[str, Any]:
    packed, scale, x, x_scale = int4_example(rows, outputs, inputs, most=127)
    found: dict[str, Any] = {"rows": rows, "outputs": outputs, "inputs": inputs}
    expected = int4_matmul(x, x_scale, packed, scale, 3, impl="xla")
    for impl in MATMULS:
        if impl in refusals(rows, outputs, inputs) or (impl == "pallas_triton" and rows > 8):
            continue
        if impl == jax_triton_calls.NAME and jax_triton_calls.broken():
            continue
        call = functools.partial(int4_matmul, out_dtype=jnp.bfloat16, impl=impl)
        error = jnp.abs(int4_matmul(x, x_scale, packed, scale, 3, impl=impl) - expected).max()
        assert float(error) <= 3e-7 * float(jnp.abs(expected).max()), (impl, rows, float(error))
        found[impl] = kernel_us(over_layers(call), x, x_scale, packed, scale) / LAYERS
    found["xla_bf16"] = bf16_us(x.astype(jnp.bfloat16), outputs)
    found["auto"] = automatic(rows, outputs, inputs)
    best = found[found["auto"]]
    found["tops"] = 2 * rows * outputs * inputs / best / 1e6
    found["weight_gbs"] = outputs * inputs / 2 / best / 1e3
    return found


def measure_w4a16(rows: int, outputs: int, inputs: int) -> dict[str, Any]:
    """The weight-only matmul by its kernel, and as XLA dequantizes and multiplies."""
    arguments = w4a16_example(rows, outputs, inputs)
    found: dict[str, Any] = {"rows": rows, "outputs": outputs, "inputs": inputs}
    call = functools.partial(w4a16_matmul, group_size=GROUP)
    results = []
    for impl in ("xla", "pallas_triton"):
        run = functools.partial(call, impl=impl)
        results.append(jax.jit(run)(*arguments, 3))
        short = functools.partial(run, out_dtype=jnp.bfloat16)
        found[impl] = kernel_us(over_layers(short), *arguments) / LAYERS
    error = float(jnp.abs(results[0] - results[1]).max() / jnp.abs(results[0]).max())
    assert error <= 1e-5, (rows, outputs, error)
    found["xla_bf16"] = bf16_us(arguments[0], outputs)
    stored = sum(a.nbytes for a in arguments[1:]) / LAYERS
    found["weight_gbs"] = stored / found["pallas_triton"] / 1e3
    return found


def measure_kv4(batch: int, tokens: int, heads: int, kv_heads: int, dim: int) -> dict[str, Any]:
    shape = (LAYERS, batch, kv_heads, tokens)
    key = jax.random.key(5)
    k, v = (
        jax.random.bits(jax.random.fold_in(key, i), (*shape, dim // 2), jnp.uint8) for i in (0, 1)
    )
    scale = (jax.random.uniform(key, shape) + 0.1).astype(jnp.bfloat16)
    zero = jax.random.bits(key, shape, jnp.uint8) & 15
    q = jax.random.normal(key, (batch, heads, dim), jnp.bfloat16)
    lengths = jnp.full((batch,), tokens, jnp.int32)
    arguments = (q, k, v, scale, scale, zero, zero, lengths)

    def call(q, k, v, ks, vs, kz, vz, lengths, layer, impl):
        return kv4_attention(q, k, v, ks, vs, kz, vz, lengths, layer, sm_scale=dim**-0.5, impl=impl)

    expected = call(*arguments, 3, impl="xla")
    times = {}
    for impl in ATTENTIONS:
        if impl in attention_refusals(dim, heads // kv_heads):
            continue
        if impl == jax_triton_calls.NAME and jax_triton_calls.broken():
            continue
        run = functools.partial(call, impl=impl)
        assert float(jnp.abs(run(*arguments, 3) - expected).max()) < 1e-3, impl
        times[impl] = kernel_us(over_layers(run), *arguments) / LAYERS
    auto = attention_automatic(dim, heads // kv_heads)
    us = times[auto]
    dense = jax.random.normal(key, (2, batch, tokens, kv_heads, dim), jnp.bfloat16)

    def library(q, kv, lengths):
        return jax.nn.dot_product_attention(
            q[:, None],
            kv[0],
            kv[1],
            key_value_seq_lengths=lengths,
            implementation="cudnn",
            query_seq_lengths=jnp.ones_like(lengths),
        )

    bf16 = kernel_us(jax.jit(library), q, dense, lengths)
    stored = 2 * batch * kv_heads * tokens * (dim // 2 + 3)
    return {
        **{"batch": batch, "tokens": tokens, "heads": heads, "kv_heads": kv_heads, "dim": dim},
        **{"kv4": us, "cudnn_bf16": bf16, "kv4_gbs": stored / us / 1e3},
        **{"auto": auto, "impls": times},
    }


def measure_mass(batch: int, tokens: int, heads: int, dim: int) -> dict[str, Any]:
    """Column sums of attention: 9 of 10 tokens are of a picture, as in LLaVA-1.5's prompts."""
    key = jax.random.key(8)
    q, k = (
        jax.random.normal(jax.random.fold_in(key, i), (batch, tokens, heads, dim), jnp.bfloat16)
        for i in (0, 1)
    )
    place = jnp.arange(tokens)
    is_visual = jnp.broadcast_to((place >= 5) & (place < 5 + tokens * 9 // 10), (batch, tokens))
    arguments = (q, k, jnp.full((batch,), tokens, jnp.int32), is_visual)
    found: dict[str, Any] = {"batch": batch, "tokens": tokens, "heads": heads, "dim": dim}
    results = []
    for impl in ("pallas_triton", "xla"):
        call = jax.jit(functools.partial(attention_mass, sm_scale=dim**-0.5, impl=impl))
        results.append(call(*arguments))
        found[impl] = kernel_us(call, *arguments)
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for kernels.json and kernels.md")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop starting shapes after")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", "The Pallas Triton backend", DeprecationWarning)
    started = time.perf_counter()
    copy = copy_gbs()
    device = jax.devices()[0].device_kind
    lines = [f"{device}, jax {jax.__version__}, device copy {copy:.0f} GB/s (read + written)", ""]
    lines += [
        "| tokens | weights | kernel | us | TOPS | of copy | bf16 us | speed-up | others us |"
    ]
    lines += ["|---" * 9 + "|"]
    report: dict[str, Any] = {"device": device, "jax": jax.__version__, "copy_gbs": copy}
    parts = ("matmul", "w4a16", "kv4_attention", "attention", "attention_mass")
    report |= {name: [] for name in parts}
    print("\n".join(lines), flush=True)

    def show(line: str) -> None:
        lines.append(line)
        print(line, flush=True)

    shapes = [
        (rows, name)
        for names, sizes in (
            (["one of gate_up"], (640, 2560, 1, 8, 1896, 577, 237, 32)),
            (["down 7B"], (640, 1, 8)),
            (["qkv 7B", "o 7B", "gate_up 7B"], (1, 640)),
            (["one of gate_up", "down 7B"], (2, 4, 16, 64)),
        )
        for rows in sizes
        for name in names
    ]
    for rows, name in shapes:
        if time.perf_counter() - started > options.seconds:
            break
        outputs, inputs = WEIGHTS[name]
        row = measure_matmul(rows, outputs, inputs)
        report["matmul"].append(row)
        best, bf16 = row[row["auto"]], row.get("xla_bf16", float("nan"))
        others = ", ".join(
            f"{impl} {row[impl]:.1f}" for impl in MATMULS if impl in row and impl != row["auto"]
        )
        show(
            f"| {rows} | {name} {outputs} x {inputs} | {row['auto']} | {best:.1f} | "
            f"{row['tops']:.0f} | {100 * row['weight_gbs'] / copy:.0f} % | {bf16:.1f} | "
            f"{bf16 / best:.2f} | {others} |"
        )
    show("")
    show("| tokens | W4A16, groups of 128 | us | of copy | XLA us | ratio | bf16 us | ratio |")
    show("|---" * 8 + "|")
    for rows, name in ((r, n) for r in (1, 8) for n in ("one of gate_up", "down 7B")):
        if time.perf_counter() - started > options.seconds + 30:
            break
        row = measure_w4a16(rows, *WEIGHTS[name])
        report["w4a16"].append(row)
        us, xla, bf16 = row["pallas_triton"], row["xla"], row["xla_bf16"]
        show(
            f"| {rows} | {name} {row['outputs']} x {row['inputs']} | {us:.1f} | "
            f"{100 * row['weight_gbs'] / copy:.0f} % | {xla:.1f} | {xla / us:.2f} | {bf16:.1f} | "
            f"{bf16 / us:.2f} |"
        )
    show("")
    show("| batch | tokens | heads | KV4 us | of copy | bf16 cuDNN us | speed-up | others us |")
    show("|---" * 8 + "|")
    for batch, tokens, heads, kv_heads in (
        (1, 768, 32, 32), (8, 768, 32, 32), (32, 768, 32, 32), (8, 2048, 32, 32), (1, 1408, 28, 4),
        (8, 1408, 28, 4),
    ):  # fmt: skip
        if time.perf_counter() - started > options.seconds + 60:
            break
        row = measure_kv4(batch, tokens, heads, kv_heads, 128)
        report["kv4_attention"].append(row)
        others = ", ".join(
            f"{impl} {us:.1f}" for impl, us in row["impls"].items() if impl != row["auto"]
        )
        show(
            f"| {batch} | {tokens} | {heads} / {kv_heads} | {row['kv4']:.1f} | "
            f"{100 * row['kv4_gbs'] / copy:.0f} % | {row['cudnn_bf16']:.1f} | "
            f"{row['cudnn_bf16'] / row['kv4']:.2f} | {others} |"
        )
    show("")
    for batch, tokens, heads, kv_heads, causal in ((1, 640, 32, 32, True), (8, 640, 32, 32, True)):
        q = jax.random.normal(jax.random.key(6), (batch, tokens, heads, 128), jnp.bfloat16)
        k = jax.random.normal(jax.random.key(7), (batch, tokens, kv_heads, 128), jnp.bfloat16)
        lengths = jnp.full((batch,), tokens, jnp.int32)
        call = jax.jit(functools.partial(sequence_attention, sm_scale=0.09, causal=causal))
        us = kernel_us(call, q, k, k, lengths)
        report["attention"].append({"batch": batch, "tokens": tokens, "us": us})
        show(f"attention, batch {batch}, {tokens} tokens, {heads} heads of 128: {us:.1f} us")
    show("")
    show("| batch | tokens | heads | column sums us | XLA us | speed-up |")
    show("|---" * 6 + "|")
    for batch in (1, 8):
        row = measure_mass(batch, 640, 32, 128)
        report["attention_mass"].append(row)
        ours, xla = row["pallas_triton"], row["xla"]
        show(f"| {batch} | 640 | 32 of 128 | {ours:.1f} | {xla:.1f} | {xla / ours:.1f} |")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "kernels.json").write_text(json.dumps(report, indent=1) + "\n")
        text = "# Kernels, measured\n\n" + "\n".join(lines) + "\n\n"
        text += "Made by `python examples/measure_kernels.py --out pallas_kernels/measured`.\n"
        (options.out / "kernels.md").write_text(text)


if __name__ == "__main__":
    main()
