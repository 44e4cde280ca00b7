"""Measures the choices that GPU kernels make among their own tiles and blocks (they are marked).

    python examples/measure_kernel_choices.py tiles    # of the int4 matmul; one NVIDIA GPU
    python examples/measure_kernel_choices.py plans    # of the W4A16 matmul
    python examples/measure_kernel_choices.py triton   # of the int4 matmul by jax-triton
    python examples/measure_kernel_choices.py split    # how a transform's rows are shared

Microseconds, times as in `measure_kernels.py`.
"""

from __future__ import annotations

import argparse
import functools
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
from kernel_timing import (  # pyrefly: ignore (beside this file)
    GROUP,
    LAYERS,
    WEIGHTS,
    int4_example,
    kernel_us,
    over_layers,
    w4a16_example,
)


def print_plans() -> None:
    """Microseconds of blocks of the W4A16 kernel, with XLA's sum of split inputs; its own choice is
    marked."""
    from pallas_kernels.w4a16_matmul.pallas_triton import Plan, w4a16_matmul_triton

    lanes = [
        (height, *width_warps, 1, splits)
        for height in (2, 4, 8)
        for width_warps in ((128, 2), (128, 4), (512, 4))
        for splits in (1, 2)
    ]
    tiles = [
        (height, width, 4, stages, splits)
        for height in (32, 64)
        for width in (16, 32)
        for stages in (1, 3)
        for splits in (2, 6)
    ]
    fields = "height", "width", "warps", "stages", "splits"
    print(f"| tokens | weights | {' | '.join(fields)} | us |\n{'|---' * 8}|")
    for rows, name in ((r, n) for r in (1, 4, 8) for n in ("one of gate_up", "down 7B")):
        outputs, inputs = WEIGHTS[name]
        arguments = w4a16_example(rows, outputs, inputs)
        own = Plan.of(outputs, inputs // 8, jnp.bfloat16)
        plans = [Plan(**dict(zip(fields, p, strict=True)), tensor_cores=False) for p in lanes]
        plans += [Plan(**dict(zip(fields, p, strict=True)), tensor_cores=True) for p in tiles]
        for plan in [own, *(p for p in plans if p != own and (p.tensor_cores or rows <= 4))]:
            call = functools.partial(w4a16_matmul_triton, group_size=GROUP, plan=plan)
            us = kernel_us(over_layers(call), *arguments) / LAYERS
            cells = " | ".join(str(getattr(plan, field)) for field in fields)
            kind = "tensor cores" if plan.tensor_cores else "lanes"
            print(
                f"| {rows} | {name}, {kind} | {cells} | {us:.1f}{'*' * (plan == own)} |", flush=True
            )


TILES = (
    (256, 128, 4), (128, 128, 4), (128, 256, 4), (64, 128, 6), (64, 256, 4), (64, 256, 6),
)  # fmt: skip
"""Tokens and inputs of a step, and steps loaded ahead."""


def measure_tiles(rows: int, outputs: int, inputs: int) -> str:
    """Microseconds of each tiling of the tensor-core kernel, as a row of a table."""
    from pallas_kernels.int4_matmul.mosaic_gpu import Tiles, int4_matmul_mosaic

    packed, scale, x, x_scale = int4_example(rows, outputs, inputs)
    chosen, cells = Tiles.of(rows, outputs, inputs), [str(rows), f"{outputs} x {inputs}"]
    for tokens, width, steps in TILES:
        tiles = Tiles(tokens=tokens, inputs=width, steps=steps)

        def call(x, x_scale, packed, scale, layer, tiles=tiles):
            return int4_matmul_mosaic(
                x, x_scale, packed, scale, layer, out_dtype=jnp.bfloat16, tiles=tiles
            )

        us = kernel_us(over_layers(call), x, x_scale, packed, scale) / LAYERS
        mark = "*" if (chosen.tokens, chosen.inputs) == (tokens, width) else ""
        cells.append(f"{us:.1f}{mark}")
    return f"| {' | '.join(cells)} |"


def print_tiles() -> None:
    """Tilings at the sizes of LLaVA-1.5-7B; the kernel's own choice is marked."""
    print(f"| tokens | weights | {' | '.join('/'.join(map(str, t)) for t in TILES)} |")
    print("|---" * (2 + len(TILES)) + "|")
    sizes = [(rows, *WEIGHTS[name]) for rows in (237, 640) for name in list(WEIGHTS)[:4]]
    sizes += [(577, *pair) for pair in ((3072, 1024), (1024, 1024), (4096, 1024), (1024, 4096))]
    sizes += [(rows, *WEIGHTS["gate_up 7B"]) for rows in (1896, 2560)]
    sizes += [(rows, *WEIGHTS[name]) for rows in (1896, 5120) for name in ("o 7B", "down 7B")]
    sizes.append((318, *WEIGHTS["qkv 7B"]))
    for size in sizes:
        print(measure_tiles(*size), flush=True)


def print_triton() -> None:
    """The int4 matmul by jax-triton: tokens, outputs and bytes of a step, warps, steps ahead."""
    from pallas_kernels.int4_matmul.jax_triton import Tiles, int4_matmul_jax_triton

    few = [
        (16, height, width, 4, stages)
        for height in (16, 32, 64)
        for width in (64, 128)
        for stages in (3, 5)
    ]
    many = [
        (tokens, height, width, warps, 3)
        for tokens, height in ((64, 128), (128, 64), (128, 128), (128, 256))
        for width in (32, 64)
        for warps in (4, 8)
    ]
    fields = "tokens", "outputs", "bytes", "warps", "stages"
    print(f"| tokens | weights | {' | '.join(fields)} | us |\n{'|---' * 8}|")
    for rows, name in ((r, n) for r in (1, 8, 640) for n in ("one of gate_up", "down 7B")):
        packed, scale, x, x_scale = int4_example(rows, *WEIGHTS[name])
        own = Tiles.of(rows)
        tried = [] if rows == 1 else few if rows <= 16 else many
        plans = [Tiles(**dict(zip(fields, p, strict=True))) for p in tried]
        for tiles in [None, *(p for p in plans if p != own)]:
            call = functools.partial(int4_matmul_jax_triton, out_dtype=jnp.bfloat16, tiles=tiles)
            try:
                us = kernel_us(over_layers(call), x, x_scale, packed, scale) / LAYERS
            except Exception as error:  # too much shared memory, say
                print(f"{tiles}: {str(error)[:60]}", file=sys.stderr, flush=True)
                continue
            shown = tiles or own
            one = ["one token"] + ["-"] * 4
            cells = " | ".join(one if rows == 1 else [str(getattr(shown, f)) for f in fields])
            print(f"| {rows} | {name} | {cells} | {us:.1f}{'*' * (tiles is None)} |", flush=True)


def print_split() -> None:
    """A gated transform by one program a row, and by several with so many columns and warps."""
    from pallas_kernels.transform_quantize.api import is_split
    from pallas_kernels.transform_quantize.pallas_triton import transform_quantize_triton
    from pallas_kernels.transform_quantize.pallas_triton_split import Plan, transform_quantize_split
    from pallas_kernels.transform_quantize.reference import Sites

    print(f"| rows | factors | columns | warps | us |\n{'|---' * 5}|")
    for a, b in ((86, 128), (128, 148)):
        key = jax.random.key(a)
        sites = Sites(
            left=jax.random.normal(key, (LAYERS, a, a)) * a**-0.5,
            right=jax.random.normal(key, (LAYERS, b, b)) * b**-0.5,
            clip=jnp.ones((LAYERS, 2)),
        )
        for rows in (1, 8, 32, 64, 237, 640, 2560):
            x = jax.random.normal(key, (rows, 2 * a * b), jnp.bfloat16)
            plans = [
                Plan(columns=columns, warps=warps) for columns in (16, 32, 64) for warps in (4, 8)
            ]
            for plan in [*((None,) if b <= 128 else ()), *plans]:

                def call(x, sites, layer, plan=plan):
                    if plan is None:
                        return transform_quantize_triton(
                            x, None, sites, layer, bits=4, eps=0.0, gated=True
                        ).codes
                    return transform_quantize_split(
                        x, sites, layer, bits=4, gated=True, plan=plan
                    ).codes

                us = kernel_us(over_layers(call), x, sites) / LAYERS
                own = plan == (Plan.of(rows) if is_split(rows, a * b, a) else None)
                cells = f"{plan.columns} | {plan.warps}" if plan else "one program |"
                print(f"| {rows} | {a} x {b} | {cells} | {us:.1f}{'*' * own} |", flush=True)


CHOICES = {
    "tiles": print_tiles,
    "plans": print_plans,
    "triton": print_triton,
    "split": print_split,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("choice", choices=sorted(CHOICES))
    warnings.filterwarnings("ignore", "The Pallas Triton backend", DeprecationWarning)
    CHOICES[parser.parse_args().choice]()


if __name__ == "__main__":
    main()
