"""A row's transform over several multiprocessors, in two launches, any NVIDIA GPU.

``L^T X R`` falls apart by columns of R: a program makes a few columns of the result from the whole
row, without computing anything that another one computes too. It writes them in float32, and the
largest and smallest of them; a second launch turns all columns of a row into codes.

For few rows, which would keep few multiprocessors busy with one product after the other, and for
factors of more than 128, of which one program cannot hold all products. Arithmetic and accuracy are
those of ``pallas_triton``, and so is the way out.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int

from pallas_kernels.transform_quantize.reference import TINY, Quantized, Sites, whole
from pallas_kernels.triton_arithmetic import (
    activated,
    gated_product,
    into_range,
    nearest,
    operands,
    product,
)

CHUNK = 2048
"""Values that a program of the second launch turns into codes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Columns of one program of the first launch, and its warps."""

    columns: int
    warps: int

    @classmethod
    def of(cls, rows: int) -> Plan:
        """Few rows: as many programs as possible. Many: rows and factors are read less often."""
        return cls(columns=16 if rows <= 8 else 64, warps=8 if rows <= 64 else 4)


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What one call does; see ``pallas_triton.Work``."""

    factors: tuple[int, int]
    padding: int
    bits: int
    gated: bool
    activation: str | None
    clip: bool
    columns: int

    @property
    def blocks(self) -> int:
        """Programs of a row in the first launch."""
        return pl.cdiv(self.factors[1], self.columns)

    @property
    def parts(self) -> list[tuple[int, int]]:
        """First column and power of two of the pieces in which a row is read: 148 as 128 + 32."""
        found, start, b = [], 0, self.factors[1]
        while start < b:
            left = b - start
            size = 1 << (left.bit_length() - 1)
            if left - size > size // 2 or size < 16:  # one larger piece, in part empty
                size = max(16, 1 << (left - 1).bit_length())
            found.append((start, size))
            start += size
        return found


def transform_quantize_split(
    x: Float[Array, "M width"],
    sites: Sites,
    layer: Int[Array, ""],
    *,
    bits: int,
    gated: bool = False,
    activation: str | None = None,
    padding: int = 0,
    plan: Plan | None = None,
    interpret: bool = False,
) -> Quantized:
    """See ``pallas_kernels.transform_quantize.transform_quantize``; ``sites`` are whole stacks with
    both factors and without a norm."""
    total, width = x.shape
    inputs = width // 2 if gated else width
    assert sites.left is not None
    assert sites.right is not None
    assert sites.norm is None
    plan = plan or Plan.of(total)
    work = Work(
        factors=(sites.left.shape[-1], sites.right.shape[-1]),
        padding=padding,
        bits=bits,
        gated=gated,
        activation=activation,
        clip=sites.clip is not None,
        columns=plan.columns,
    )
    layer = layer.reshape(1)
    turned, extremes = _call(
        functools.partial(_turn, work=work),
        (total, work.blocks),
        [x, sites.left, sites.right, layer],
        [
            jax.ShapeDtypeStruct((total, inputs - padding), jnp.float32),
            jax.ShapeDtypeStruct((total, 2, work.blocks), jnp.float32),
        ],
        warps=plan.warps,
        interpret=interpret,
    )
    clip = [] if sites.clip is None else [sites.clip]
    codes, scale = _call(
        functools.partial(_round, work=work),
        (total, pl.cdiv(inputs, CHUNK)),
        [turned, extremes, *clip, layer],
        [
            jax.ShapeDtypeStruct((total, inputs), jnp.int8),
            jax.ShapeDtypeStruct((whole(total),), jnp.float32),
        ],
        warps=4,
        interpret=interpret,
    )
    return Quantized(codes, scale, None)


def _call(
    kernel: Any, grid: tuple[int, ...], arrays: Any, outputs: Any, *, warps: int, interpret: bool
) -> Any:
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * len(arrays),
        out_specs=[pl.BlockSpec(memory_space=pl.ANY)] * len(outputs),
        out_shape=outputs,
        compiler_params=plt.CompilerParams(num_warps=warps, num_stages=1),
        interpret=interpret,
    )(*arrays)


def _turn(x_ref, left_ref, right_ref, layer_ref, turned_ref, extremes_ref, *, work: Work) -> None:
    """Some columns of one row's ``L^T X R``."""
    row, block = pl.program_id(0), pl.program_id(1)
    (a, b), layer, dtype = work.factors, layer_ref[0], x_ref.dtype
    height = max(16, 1 << (a - 1).bit_length())
    i = jnp.arange(height)[:, None]
    j = block * work.columns + jnp.arange(work.columns)[None]

    def load(ref, *index, mask):
        return plt.load(ref.at[index], mask=mask, other=0)

    short = dtype.itemsize == 2
    pieces, peak, back = [], jnp.float32(0.0), jnp.float32(1.0)
    for start, size in work.parts:
        k = start + jnp.arange(size)
        mask = (i < a) & (k[None] < b)
        place = i * b + k[None]
        part = load(x_ref, row, place, mask=mask).astype(jnp.float32)
        if work.gated:
            up = load(x_ref, row, a * b + work.padding + place, mask=mask)
            part = gated_product(part, up.astype(jnp.float32), dtype)
        if work.activation is not None:
            part = activated(part, work.activation).astype(dtype).astype(jnp.float32)
        pieces.append((k, part))
        peak = jnp.maximum(peak, jnp.abs(part).max(-1).max(-1))
    if short:
        forth, back = into_range(peak)
        pieces = [(k, part * forth) for k, part in pieces]
    turned: Any = None
    for k, part in pieces:
        right = load(right_ref, layer, k[:, None], j, mask=(k[:, None] < b) & (j < b))
        right = operands(right.astype(jnp.float32), short)
        found = product(operands(part, short), right, across=False)
        turned = found if turned is None else turned + found
    k = jnp.arange(height)
    left = load(left_ref, layer, k[:, None], k[None], mask=(k[:, None] < a) & (k[None] < a))
    left = operands(left.astype(jnp.float32), short)
    turned = product(left, operands(turned, short), across=True) * back
    # Places beyond the factors are zeros of the products, and harm neither extreme.
    plt.store(turned_ref.at[row, i * b + j], turned, mask=(i < a) & (j < b))
    extremes_ref[row, 0, block] = turned.max(-1).max(-1)
    extremes_ref[row, 1, block] = turned.min(-1).min(-1)


def _round(turned_ref, extremes_ref, *refs, work: Work) -> None:
    """Codes of a piece of one row."""
    *clip, layer_ref, codes_ref, scale_ref = refs
    row, chunk = pl.program_id(0), pl.program_id(1)
    block = jnp.arange(1 << (work.blocks - 1).bit_length())

    def extreme(which):
        place = extremes_ref.at[row, which, block]
        return plt.load(place, mask=block < work.blocks, other=0.0)

    largest, smallest = extreme(0).max(), extreme(1).min()
    if work.clip:
        layer = layer_ref[0]
        largest = jnp.maximum(largest * clip[0][layer, 0], -smallest * clip[0][layer, 1])
    else:
        largest = jnp.maximum(largest, -smallest)
    limit = 2 ** (work.bits - 1) - 1
    scale = jnp.maximum(largest, TINY) / limit
    real = work.factors[0] * work.factors[1]
    place = chunk * CHUNK + jnp.arange(CHUNK)
    values = plt.load(turned_ref.at[row, place], mask=place < real, other=0.0)
    codes = nearest(jnp.clip(values / scale, -limit - 1, limit)).astype(jnp.int8)
    plt.store(codes_ref.at[row, place], codes, mask=place < real + work.padding)

    @pl.when(chunk == 0)
    def _():
        scale_ref[row] = scale
