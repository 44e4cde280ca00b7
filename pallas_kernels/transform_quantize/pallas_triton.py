"""One launch from a residual stream (or gate and up) to the next matmul's integers, any NVIDIA GPU.

A program owns whole rows: it reads each value once, keeps the row in registers through norm,
transform and the search for the largest value, and writes one byte per value. With a transform the
row is an ``a x b`` matrix (padded to powers of two) and ``L^T X R`` runs on tensor cores. Behind
activations of 16 bits it takes float16, after the row was brought into its range by a power of two:
11 bits of every operand. Float32 operands are split into two bfloat16 parts and the products of the
parts, all but that of the two small ones, are summed in float32: 16 bits. So a code differs from
the reference's by at most 1, next to a rounding boundary.

Pallas' Triton back end is deprecated in jax 0.11; see ``int4_matmul.pallas_triton``. The way out
here is ``impl="xla"``.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Rows of one program, and its warps."""

    rows: int
    warps: int

    @classmethod
    def of(cls, rows: int, inputs: int, transformed: bool) -> Plan:
        """Few rows: all warps on each of them. Many: the factors are read once for several rows."""
        if not transformed:
            return cls(rows=1, warps=4 if inputs <= 4096 and rows > 64 else 8)
        warps = 4 if inputs <= 4096 else 8
        return cls(rows=1 if rows <= 264 else 4, warps=warps)


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What one call does. ``factors``: ``(a, b)``, or ``(1, K)`` without a transform; ``padding``:
    channels behind theirs."""

    total: int
    factors: tuple[int, int]
    padding: int
    bits: int
    eps: float
    gated: bool
    activation: str | None
    added: bool
    norm: bool
    centred: bool
    transform: bool
    right: bool
    clip: bool
    rows: int

    @property
    def tile(self) -> tuple[int, int]:
        """Powers of two that hold a row; tensor cores want 16 at least."""
        least = 16 if self.transform else 1
        a, b = (max(least, 1 << (size - 1).bit_length()) for size in self.factors)
        return a, b


def transform_quantize_triton(
    x: Float[Array, "M width"],
    added: Float[Array, "M K"] | None,
    sites: Sites,
    layer: Int[Array, ""],
    *,
    bits: int,
    eps: float,
    gated: bool = False,
    activation: str | None = None,
    padding: int = 0,
    plan: Plan | None = None,
    interpret: bool = False,
) -> Quantized:
    """See ``pallas_kernels.transform_quantize.transform_quantize``; ``sites`` are whole stacks."""
    total, width = x.shape
    inputs = width // 2 if gated else width
    a = 1 if sites.left is None else sites.left.shape[-1]
    transform = sites.left is not None
    plan = plan or Plan.of(total, inputs, transform)
    work = Work(
        total=total,
        factors=(a, (inputs - padding) // a),
        padding=padding,
        bits=bits,
        eps=eps,
        gated=gated,
        activation=activation,
        added=added is not None,
        norm=sites.norm is not None,
        centred=sites.norm_bias is not None,
        transform=transform,
        right=sites.right is not None,
        clip=sites.clip is not None,
        rows=plan.rows,
    )
    outputs = [
        jax.ShapeDtypeStruct((total, inputs), jnp.int8),
        jax.ShapeDtypeStruct((whole(total),), jnp.float32),
    ]
    if added is not None:
        outputs.append(jax.ShapeDtypeStruct((total, inputs), x.dtype))
    arrays = [x, *(a for a in (added, *sites) if a is not None), layer.reshape(1)]
    call = pl.pallas_call(
        functools.partial(_kernel, work=work),
        grid=(pl.cdiv(total, plan.rows),),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * len(arrays),
        out_specs=[pl.BlockSpec(memory_space=pl.ANY)] * len(outputs),
        out_shape=outputs,
        compiler_params=plt.CompilerParams(num_warps=plan.warps, num_stages=1),
        interpret=interpret,
    )
    codes, scale, *states = call(*arrays)
    return Quantized(codes, scale, states[0] if states else None)


def _everything(reduce: Any, x: Array) -> Array:
    for _ in range(x.ndim):
        x = reduce(x, axis=-1)
    return x


def _kernel(*refs: Any, work: Work) -> None:
    given = iter(refs)
    x_ref = next(given)
    added_ref: Any = next(given) if work.added else None
    norm_ref = next(given) if work.norm else None
    bias_ref = next(given) if work.centred else None
    left_ref = next(given) if work.transform else None
    right_ref = next(given) if work.right else None
    clip_ref: Any = next(given) if work.clip else None
    layer_ref, codes_ref, scale_ref = (next(given) for _ in range(3))
    states_ref: Any = next(given) if work.added else None

    (a, b), tile = work.factors, work.tile
    inputs, layer, dtype = a * b, layer_ref[0], x_ref.dtype
    short = dtype.itemsize == 2
    if work.transform:
        i, j = jnp.arange(tile[0])[:, None], jnp.arange(tile[1])[None]
        place = i * b + j
        inside = None if tile == (a, b) else (i < a) & (j < b)
    else:
        place = jnp.arange(tile[1])
        inside = None if tile[1] == b else place < b

    def load(ref, *index, mask):
        return plt.load(ref.at[index], mask=mask, other=None if mask is None else 0)

    def factor(ref, size, padded):
        """The parts of a square factor."""
        k = jnp.arange(padded)
        mask = None if size == padded else (k[:, None] < size) & (k[None] < size)
        loaded = load(ref, layer, k[:, None], k[None], mask=mask)
        return operands(loaded.astype(jnp.float32), short)

    left = factor(left_ref, a, tile[0]) if work.transform else ()
    right = factor(right_ref, b, tile[1]) if work.right else ()
    weight: Any = None
    if work.norm:
        weight = load(norm_ref, layer, place, mask=inside).astype(jnp.float32)
    bias: Any = None
    if work.centred:
        bias = load(bias_ref, layer, place, mask=inside).astype(jnp.float32)
    limit = 2 ** (work.bits - 1) - 1

    def turned(x):
        """The transform of a row."""
        back: Any = None
        if short:
            forth, back = into_range(_everything(jnp.max, jnp.abs(x)))
            x = x * forth
        if work.right:
            x = product(operands(x, short), right, across=False)
        x = product(left, operands(x, short), across=True)
        return x * back if short else x

    def row_of(row, mask):
        x = load(x_ref, row, place, mask=mask).astype(jnp.float32)
        if work.added:
            x = (x + load(added_ref, row, place, mask=mask).astype(jnp.float32)).astype(dtype)
            plt.store(states_ref.at[row, place], x, mask=mask)
            x = x.astype(jnp.float32)
        if work.gated:
            up = load(x_ref, row, inputs + work.padding + place, mask=mask).astype(jnp.float32)
            x = gated_product(x, up, dtype)
        if work.activation is not None:
            x = activated(x, work.activation).astype(dtype).astype(jnp.float32)
        if work.centred:
            x = x - _everything(jnp.sum, x) / inputs
            if mask is not None:
                # Padding stands at minus the mean now, and must not count as deviation.
                x = jnp.where(mask, x, 0.0)
        if work.norm:
            power = _everything(jnp.sum, x * x) / inputs
            x = x * lax.rsqrt(power + work.eps) * weight
            x = (x + bias if work.centred else x).astype(dtype).astype(jnp.float32)
        if work.transform:
            x = turned(x)
        if work.clip:
            largest = jnp.maximum(
                _everything(jnp.max, x) * clip_ref[layer, 0],
                -_everything(jnp.min, x) * clip_ref[layer, 1],
            )
        else:
            largest = _everything(jnp.max, jnp.abs(x))
        scale = jnp.maximum(largest, TINY) / limit
        x = jnp.clip(x / scale, -limit - 1, limit)
        codes = nearest(x)
        plt.store(codes_ref.at[row, place], codes.astype(jnp.int8), mask=mask)
        if work.padding:
            behind = jnp.arange(pl.next_power_of_2(work.padding))
            zeros = jnp.zeros(behind.shape, jnp.int8)
            place_of = codes_ref.at[row, inputs + behind]
            plt.store(place_of, zeros, mask=behind < work.padding)
        scale_ref[row] = scale

    first = pl.program_id(0) * work.rows
    if work.rows == 1:
        row_of(first, inside)
        return

    def step(index, _):
        # Beyond the end the last row is made once more: the same values to the same places.
        row_of(jnp.minimum(first + index, work.total - 1), inside)
        return 0

    lax.fori_loop(0, work.rows, step, 0)
