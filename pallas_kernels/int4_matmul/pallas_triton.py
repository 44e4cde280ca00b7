"""A few tokens at a time on any NVIDIA GPU: four-way dot products (dp4a) on packed words.

Decoding reads every weight once and computes almost nothing, so what counts is to touch each byte
with few instructions. A 32-bit word holds 8 codes; shifted into the high half of each byte they are
int8 values times 16, and two dp4a sum them against the matching bytes of the tokens. The factor 16
is divided out of the exact int32 sum at the end.

Pallas' Triton back end is deprecated in jax 0.11; the files named ``pallas_triton`` use it, because
it measured fastest (``pallas_kernels/measured``). The way out of this one is ``jax_triton``, the
same products in Triton's own language (``impl="triton"``).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int, UInt8

from pallas_kernels.packing import as_words
from pallas_kernels.triton_arithmetic import DOT


def int4_matmul_dot(
    x: Int[Array, "M K"],
    x_scale: Float[Array, " M"],
    packed: UInt8[Array, "L N bytes"],
    scale: Float[Array, "L N"],
    layer: Int[Array, ""],
    *,
    out_dtype: Any,
    block: tuple[int, int, int] | None = None,
) -> Float[Array, "M N"]:
    """See ``pallas_kernels.int4_matmul.int4_matmul``; ``K`` is a multiple of 8.

    block: weight rows and words of a program, and its warps.
    """
    rows, inputs = x.shape
    depth, outputs, _ = packed.shape
    words = inputs // 8
    height, width, warps = block or ((4, 512, 4) if rows == 1 else (8, 128, 4))

    call = pl.pallas_call(
        functools.partial(
            _kernel, rows=rows, outputs=outputs, words=words, height=height, width=width
        ),
        grid=(pl.cdiv(outputs, height),),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * 5,
        out_specs=pl.BlockSpec(memory_space=pl.ANY),
        out_shape=jax.ShapeDtypeStruct((rows, outputs), out_dtype),
        compiler_params=plt.CompilerParams(num_warps=warps, num_stages=1),
    )
    return call(
        as_words(packed).reshape(depth * outputs, words),
        as_words(x.astype(jnp.int8)),
        scale.astype(jnp.float32).reshape(-1),
        x_scale.astype(jnp.float32),
        layer.reshape(1),
    )


def _kernel(
    w_ref,
    x_ref,
    w_scale_ref,
    x_scale_ref,
    layer_ref,
    out_ref,
    *,
    rows,
    outputs,
    words,
    height,
    width,
):
    """One program: ``height`` weight rows against all tokens, ``width`` words at a time."""
    first = pl.program_id(0) * height
    place = first + jnp.arange(height)
    inside = place < outputs
    own = layer_ref[0] * outputs + jnp.minimum(place, outputs - 1)

    def step(index, sums):
        columns = index * width + jnp.arange(width)
        real = columns < words
        mask = jnp.broadcast_to(real[None], (height, width))
        codes = plt.load(w_ref.at[own[:, None], columns[None]], mask=mask, other=0)
        out = []
        for row in range(rows):
            left, right = (
                jnp.broadcast_to(
                    plt.load(x_ref.at[row, 2 * columns + half], mask=real, other=0)[None],
                    (height, width),
                )
                for half in (0, 1)
            )
            [total] = plt.elementwise_inline_asm(
                DOT,
                args=[codes, left, right, sums[row]],
                constraints="=r,r,r,r,r",
                pack=1,
                result_shape_dtypes=[jax.ShapeDtypeStruct((height, width), jnp.int32)],
            )
            out.append(total)
        return tuple(out)

    start = tuple(jnp.zeros((height, width), jnp.int32) for _ in range(rows))
    sums = lax.fori_loop(0, -(-words // width), step, start)
    w_scale = plt.load(w_scale_ref.at[own])
    for row in range(rows):
        total = lax.shift_right_arithmetic(sums[row].sum(1), jnp.full((height,), 4, jnp.int32))
        out = total.astype(jnp.float32) * x_scale_ref[row] * w_scale
        plt.store(out_ref.at[row, place], out.astype(out_ref.dtype), mask=inside)
