"""Packed int4 weights times int8 tokens in Triton's language, by jax-triton: Ampere and newer.

One token: four-way dot products (dp4a) on packed words, as in ``pallas_triton``. More: tensor cores
for int8. A byte holds two neighbouring inputs, so the inputs are summed as even and odd ones: the
low nibbles of a weight tile times the even inputs of the tokens, the high ones times the odd, and
no tile is interleaved. Sums are int32 and exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jaxtyping import Array, Float, Int, UInt8

from pallas_kernels.jax_triton_calls import call
from pallas_kernels.packing import as_words
from pallas_kernels.triton_arithmetic import DOT


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiles:
    """Tokens, outputs and bytes of weights (two inputs each) of a step; warps, and steps that are
    loaded ahead."""

    tokens: int
    outputs: int
    bytes: int
    warps: int
    stages: int

    @classmethod
    def of(cls, rows: int) -> Tiles:
        """Near the fastest of those measured at 8 and 640 tokens on one H100
        (``measured/kernel_choices.md``); no GPU before it was there."""
        if rows <= 64:
            tokens = max(16, 1 << (rows - 1).bit_length())
            return cls(tokens=tokens, outputs=32, bytes=128, warps=4, stages=4)
        return cls(tokens=128, outputs=64, bytes=64, warps=8, stages=3)


def int4_matmul_jax_triton(
    x: Int[Array, "M K"],
    x_scale: Float[Array, " P"],
    packed: UInt8[Array, "L N bytes"],
    scale: Float[Array, "L N"],
    layer: Int[Array, ""],
    *,
    out_dtype: Any,
    tiles: Tiles | None = None,
) -> Float[Array, "M N"]:
    """See ``pallas_kernels.int4_matmul.int4_matmul``; ``K`` is a multiple of 8."""
    rows, inputs = x.shape
    depth, outputs, half = packed.shape
    out = jax.ShapeDtypeStruct((rows, outputs), out_dtype)
    x, layer = x.astype(jnp.int8), layer.reshape(1)
    scales = scale.astype(jnp.float32).reshape(-1), x_scale.astype(jnp.float32)
    if rows == 1 and tiles is None:
        height, words = 4, inputs // 8
        return call(
            _one_token,
            as_words(packed).reshape(depth * outputs, words),
            as_words(x),
            *scales,
            layer,
            out=out,
            grid=(triton.cdiv(outputs, height),),
            warps=4,
            stages=1,
            outputs=outputs,
            words=words,
            height=height,
            width=512,
            asm=DOT,
        )
    tiles = tiles or Tiles.of(rows)
    even, odd = (x[:, start::2] for start in (0, 1))
    return call(
        _tile,
        packed.reshape(depth * outputs, half),
        even,
        odd,
        *scales,
        layer,
        out=out,
        grid=(triton.cdiv(rows, tiles.tokens) * triton.cdiv(outputs, tiles.outputs),),
        warps=tiles.warps,
        stages=tiles.stages,
        rows=rows,
        outputs=outputs,
        half=half,
        tokens=tiles.tokens,
        height=tiles.outputs,
        width=tiles.bytes,
    )


@triton.jit
def _one_token(
    w_ptr,
    x_ptr,
    w_scale_ptr,
    x_scale_ptr,
    layer_ptr,
    out_ptr,
    outputs: tl.constexpr,
    words: tl.constexpr,
    height: tl.constexpr,
    width: tl.constexpr,
    asm: tl.constexpr,
):
    """``height`` outputs, ``width`` words of weights at a time."""
    place = tl.program_id(0) * height + tl.arange(0, height)
    own = tl.load(layer_ptr).to(tl.int64) * outputs + tl.minimum(place, outputs - 1)
    sums = tl.zeros((height, width), tl.int32)
    for start in range(0, words, width):
        column = start + tl.arange(0, width)
        real = column < words
        mask = tl.broadcast_to(real[None, :], (height, width))
        codes = tl.load(w_ptr + own[:, None] * words + column[None, :], mask=mask, other=0)
        left = tl.load(x_ptr + 2 * column, mask=real, other=0)
        right = tl.load(x_ptr + 2 * column + 1, mask=real, other=0)
        sums = tl.inline_asm_elementwise(
            asm,
            "=r,r,r,r,r",
            [
                codes,
                tl.broadcast_to(left[None, :], (height, width)),
                tl.broadcast_to(right[None, :], (height, width)),
                sums,
            ],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    # The dot products are 16 times too large: an exact shift.
    total = (tl.sum(sums, 1) >> 4).to(tl.float32)
    total = total * tl.load(x_scale_ptr) * tl.load(w_scale_ptr + own)
    tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=place < outputs)


@triton.jit
def _tile(
    w_ptr,
    even_ptr,
    odd_ptr,
    w_scale_ptr,
    x_scale_ptr,
    layer_ptr,
    out_ptr,
    rows: tl.constexpr,
    outputs: tl.constexpr,
    half: tl.constexpr,
    tokens: tl.constexpr,
    height: tl.constexpr,
    width: tl.constexpr,
):
    """``tokens`` x ``height`` outputs, ``width`` bytes of weights at a time."""
    # Neighbouring programs share a tile of weights in the L2 cache.
    row_blocks: tl.constexpr = (rows + tokens - 1) // tokens
    row = (tl.program_id(0) % row_blocks) * tokens + tl.arange(0, tokens)
    place = (tl.program_id(0) // row_blocks) * height + tl.arange(0, height)
    own = tl.load(layer_ptr).to(tl.int64) * outputs + tl.minimum(place, outputs - 1)
    x_row = tl.minimum(row, rows - 1)[:, None].to(tl.int64) * half
    sums = tl.zeros((tokens, height), tl.int32)
    for start in range(0, half, width):
        column = start + tl.arange(0, width)
        real = column < half
        w_mask = tl.broadcast_to(real[None, :], (height, width))
        x_mask = tl.broadcast_to(real[None, :], (tokens, width))
        pairs = tl.load(w_ptr + own[:, None] * half + column[None, :], mask=w_mask, other=0)
        pairs = pairs.to(tl.int8, bitcast=True)
        even = tl.load(even_ptr + x_row + column[None, :], mask=x_mask, other=0)
        odd = tl.load(odd_ptr + x_row + column[None, :], mask=x_mask, other=0)
        low, high = (pairs << 4) >> 4, pairs >> 4
        sums = tl.dot(even, tl.trans(low), sums, out_dtype=tl.int32)
        sums = tl.dot(odd, tl.trans(high), sums, out_dtype=tl.int32)
    x_scale = tl.load(x_scale_ptr + row, mask=row < rows, other=0.0)
    total = sums.to(tl.float32) * x_scale[:, None] * tl.load(w_scale_ptr + own)[None, :]
    target = out_ptr + row[:, None].to(tl.int64) * outputs + place[None, :]
    mask = (row < rows)[:, None] & (place < outputs)[None, :]
    tl.store(target, total.to(out_ptr.dtype.element_ty), mask=mask)
