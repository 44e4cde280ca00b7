"""A few tokens at a time on any NVIDIA GPU: codes widened and scaled in registers.

Decoding reads every weight once and computes almost nothing, so each packed word is loaded once and
what counts is the number of instructions for each of its 8 codes. A code is written into the low
mantissa bits of a power of two, which takes a shift and one logical operation and makes a float; a
subtraction takes away the power and the zero point, both exactly. Then the scale, rounded as the
dequantized weight is. Where scale and tokens share a 16-bit dtype all of this is done in it: code
minus zero is exact there, so its product with the scale is rounded once, to the same number.

Tokens come as ``[8, M, words]``, one plane for each nibble of a word, so that lanes that hold
neighboring words read neighboring values. Two ways to multiply:
  tensor cores: a product of 16 rows for each nibble of the words.
  lanes: products and sums on the ordinary units, tokens one after the other; for float32.

Where few output rows would leave multiprocessors idle the inputs are split too, and XLA adds the
parts. Pallas' Triton back end is deprecated in jax 0.11; see ``int4_matmul.pallas_triton``. The way
out here is ``impl="xla"``.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int, UInt8

from pallas_kernels.accelerator import find_gpu
from pallas_kernels.packing import as_words, nibble_at
from pallas_kernels.stable import as_stored

SMS = 132
"""Multiprocessors of an H100, where no GPU is there to be asked."""
TILE_ROWS = 16
"""Rows of a tensor-core tile."""
WIDEN: dict[Any, tuple[Any, int, float]] = {
    jnp.dtype(jnp.bfloat16): (jnp.int16, 0x4300, 2.0**7),
    jnp.dtype(jnp.float16): (jnp.int16, 0x6400, 2.0**10),
    jnp.dtype(jnp.float32): (jnp.int32, 0x4B000000, 2.0**23),
}
"""Of each dtype the integer of its size, and the power of two (as bits, as value) whose lowest
mantissa bit counts 1."""
WHOLE_ROW = 1 << 30
"""Words of a group that never ends."""
OFFSET = -0x77777778  # 0x88888888: turns signed nibbles into unsigned ones, 8 more


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Weight rows and words per step of a program, its warps and pipeline stages, parts of the
    inputs, and whether tensor cores multiply."""

    height: int
    width: int
    warps: int
    stages: int
    splits: int
    tensor_cores: bool

    @classmethod
    def of(cls, outputs: int, words: int, dtype: Any, num_sms: int = SMS) -> Plan:
        """Not measured: chosen by the instructions that Triton 3.6 made of them for Hopper.

        Tensor cores even for one token: its 15 rows of nothing cost less than to widen each weight
        to float32, which on the way back from 16 bits takes a slow conversion. float32 stays off
        them, which would round it to 10 bits of mantissa.
        """
        tensor_cores = jnp.dtype(dtype) != jnp.float32
        height, width, programs, steps_ahead = (64, 32, 4, 3) if tensor_cores else (4, 128, 8, 1)
        whole = 1 << (words - 1).bit_length()
        width = min(width, max(whole, 16 if tensor_cores else 1))
        steps = pl.cdiv(words, width)
        # Programs for one round of the multiprocessors; no part shorter than what is loaded ahead.
        splits = programs * num_sms // pl.cdiv(outputs, height)
        splits = max(1, min(splits, steps // (steps_ahead + 1)))
        splits = pl.cdiv(steps, pl.cdiv(steps, splits))
        return cls(
            height=height,
            width=width,
            warps=4,
            stages=steps_ahead,
            splits=splits,
            tensor_cores=tensor_cores,
        )


def w4a16_matmul_triton(
    x: Float[Array, "M K"],
    packed: UInt8[Array, "L N bytes"],
    scale: Float[Array, "L N G"] | None,
    zeros: UInt8[Array, "L N G"] | None,
    layer: Int[Array, ""],
    *,
    group_size: int,
    plan: Plan | None = None,
    interpret: bool = False,
) -> Float[Array, "M N"]:
    """See ``pallas_kernels.w4a16_matmul.w4a16_matmul``; float32, without bias.

    ``M`` is at most 16, ``K`` a multiple of 8, and ``group_size`` 8 times a power of two (or ``G``
    is 1). ``scale`` None: the weights are the signed codes.
    """
    rows, inputs = x.shape
    depth, outputs, _ = packed.shape
    words = inputs // 8
    gpu = find_gpu()
    plan = plan or Plan.of(outputs, words, x.dtype, gpu.num_sms if gpu else SMS)

    def flat(array):
        return array.reshape(depth * outputs, -1)

    tables = [flat(array) for array in (scale, zeros) if array is not None]
    one_group = not group_size or group_size >= inputs
    group_words = WHOLE_ROW if one_group else group_size // 8
    work = _Work(
        rows=rows,
        outputs=outputs,
        words=words,
        group_words=group_words,
        steps=pl.cdiv(pl.cdiv(words, plan.width), plan.splits),
        scaled=scale is not None,
        shifted=zeros is not None,
        pinned=interpret,
    )
    call = pl.pallas_call(
        functools.partial(_tensor_cores if plan.tensor_cores else _lanes, work=work, plan=plan),
        grid=(pl.cdiv(outputs, plan.height), plan.splits),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * (3 + len(tables)),
        out_specs=pl.BlockSpec(memory_space=pl.ANY),
        out_shape=jax.ShapeDtypeStruct((plan.splits, rows, outputs), jnp.float32),
        compiler_params=plt.CompilerParams(num_warps=plan.warps, num_stages=plan.stages),
        interpret=interpret,
    )
    planes = x.reshape(rows, words, 8).transpose(2, 0, 1)
    return call(planes, flat(as_words(packed)), layer.reshape(1), *tables).sum(0)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Work:
    """Sizes of the product, which tables are there, and whether rounding must be pinned: XLA, which
    runs the interpreter, may leave out the rounding to 16 bits between two operations."""

    rows: int
    outputs: int
    words: int
    group_words: int
    steps: int
    scaled: bool
    shifted: bool
    pinned: bool


class _Weights:
    """The weight rows of one program, ``[height, groups, group's words]`` at a time.

    The groups are an axis, so that a group's scale is loaded once and broadcast. Looked up for each
    word, its loads would get a layout of their own, and every weight a way through shared memory.
    """

    def __init__(self, refs: tuple[Any, ...], dtype: Any, *, work: _Work, plan: Plan):
        self.w_ref, layer_ref, *tables = refs
        self.scale_ref = tables.pop(0) if work.scaled else None
        self.zeros_ref = tables.pop(0) if work.shifted else None
        self.work, self.plan, self.dtype = work, plan, dtype
        shared = self.scale_ref is None or self.scale_ref.dtype == dtype
        self.kind = jnp.dtype(dtype if shared else jnp.float32)
        self.place = pl.program_id(0) * plan.height + jnp.arange(plan.height)
        self.inside = self.place < work.outputs
        self.first_step = pl.program_id(1) * work.steps
        self.each = min(work.group_words, plan.width)
        self.groups = plan.width // self.each
        # Rows past the end are read from the last one and not written.
        self.own = layer_ref[0] * work.outputs + jnp.minimum(self.place, work.outputs - 1)

    def words(self, step: Array) -> tuple[Array, Array]:
        """Words ``[groups, each]`` of a step of this program's part, and which of them exist."""
        first = (self.first_step + step) * self.plan.width
        words = first + self.each * jnp.arange(self.groups)[:, None] + jnp.arange(self.each)[None]
        return words, words < self.work.words

    def load(self, step: Array) -> Iterator[Array]:
        """For each nibble the weights ``[height, groups, each]`` in the dtype of the tokens."""
        words, real = self.words(step)
        own = self.own[:, None, None]
        shape = (self.plan.height, *words.shape)

        def table(ref):
            """The entries of the step's groups, ``[height, groups, 1]``."""
            first = (self.first_step + step) * self.plan.width
            group = lax.div(first, jnp.int32(self.work.group_words)) + jnp.arange(self.groups)
            mask = first + self.each * jnp.arange(self.groups) < self.work.words
            mask = jnp.broadcast_to(mask[None], shape[:2])
            found = plt.load(ref.at[self.own[:, None], group[None]], mask=mask, other=0)
            return found[:, :, None]

        integer, bits, power = WIDEN[self.kind]
        mask = jnp.broadcast_to(real[None], shape)
        codes = plt.load(self.w_ref.at[own, words[None]], mask=mask, other=0)
        if self.zeros_ref is None:
            codes = codes ^ OFFSET
            lowest: Any = power + 8.0
        else:
            zeros = table(self.zeros_ref).astype(jnp.int32).astype(jnp.float32)
            lowest = (zeros + power).astype(self.kind)
        scale = None if self.scale_ref is None else table(self.scale_ref).astype(self.kind)

        for nibble in range(8):
            widened = (nibble_at(codes, nibble, 0) | bits).astype(integer)
            widened = lax.bitcast_convert_type(widened, self.kind)
            value = widened - lowest
            if scale is not None:
                value = value * scale
            if self.work.pinned:
                value = as_stored(value, self.dtype)
            yield value.astype(self.dtype)


def _lanes(x_ref, *refs: Any, work: _Work, plan: Plan) -> None:
    """One program: ``height`` weight rows against all tokens, ``width`` words at a time."""
    *tables, out_ref = refs
    tile = _Weights(tuple(tables), x_ref.dtype, work=work, plan=plan)

    def step(index, sums):
        words, real = tile.words(index)
        sums = list(sums)
        for nibble, weights in enumerate(tile.load(index)):
            weights = weights.astype(jnp.float32)
            for row in range(work.rows):
                x = plt.load(x_ref.at[nibble, row, words], mask=real, other=0)
                sums[row] += weights * x.astype(jnp.float32)[None]
        return tuple(sums)

    shape = plan.height, tile.groups, tile.each
    start = tuple(jnp.zeros(shape, jnp.float32) for _ in range(work.rows))
    sums = lax.fori_loop(0, work.steps, step, start)
    for row in range(work.rows):
        place = out_ref.at[pl.program_id(1), row, tile.place]
        plt.store(place, sums[row].sum(2).sum(1), mask=tile.inside)


def _tensor_cores(x_ref, *refs: Any, work: _Work, plan: Plan) -> None:
    """The same with up to 16 tokens as the rows of a tensor-core product."""
    *tables, out_ref = refs
    tile = _Weights(tuple(tables), x_ref.dtype, work=work, plan=plan)
    row = jnp.arange(TILE_ROWS)
    own = row < work.rows

    def step(index, sums):
        words = (tile.first_step + index) * plan.width + jnp.arange(plan.width)
        mask = own[:, None] & (words < work.words)[None]
        for nibble, weights in enumerate(tile.load(index)):
            weights = weights.reshape(plan.height, plan.width)
            x = plt.load(x_ref.at[nibble, row[:, None], words[None]], mask=mask, other=0)
            sums += lax.dot_general(
                x, weights, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
            )
        return sums

    sums = jnp.zeros((TILE_ROWS, plan.height), jnp.float32)
    sums = lax.fori_loop(0, work.steps, step, sums)
    place = out_ref.at[pl.program_id(1), row[:, None], tile.place[None]]
    plt.store(place, sums, mask=own[:, None] & tile.inside[None])
