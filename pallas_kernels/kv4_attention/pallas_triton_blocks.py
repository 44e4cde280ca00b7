"""Decode attention on packed 4-bit keys and values: free block sizes, grouped queries read once.

Like ``pallas_triton``, two launches: programs over blocks of tokens, then a combination. Here a
code becomes ``1 + code / 16`` by writing its bits into a float's mantissa, which takes a shift and
one logical operation; the 1 cancels against the zero point, since with ``v = 1 + code / 16``

    scale * sum q (code - zero) = 16 scale * (sum q v - (1 + zero / 16) * sum q).

Two ways to multiply:
  lanes: a program per query head, float32 on the ordinary units.
  group: a program per key head, all queries of its group at once on tensor cores. ``v`` is exact in
    bfloat16; queries and weights are split into two bfloat16 parts where one does not hold them.

Partial results are kept nibble by nibble (``[8, words]``), as they are computed; the combination
puts the elements in order. Pallas' Triton back end is deprecated in jax 0.11; see
``int4_matmul.pallas_triton``. The way out here is ``impl="xla"``.
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
from jaxtyping import Array, Float, Int, UInt8

from pallas_kernels.attention.reference import NEGATIVE
from pallas_kernels.packing import as_words, nibble_at
from pallas_kernels.triton_arithmetic import halves

GROUP = 16
"""Rows of a tensor-core tile: queries of one key head, padded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Tokens of a program, its warps, and whether it takes a whole group of queries."""

    tokens: int
    warps: int
    grouped: bool

    @classmethod
    def of(cls, group: int) -> Plan:
        """Tensor cores only where several queries share a key head; best of those measured."""
        return cls(tokens=64, warps=2, grouped=group > 1)


def kv4_attention_blocks(
    query: Float[Array, "B N H"],
    key: UInt8[Array, "L B K S bytes"],
    value: UInt8[Array, "L B K S bytes"],
    key_scale: Float[Array, "L B K S"],
    value_scale: Float[Array, "L B K S"],
    key_zero: UInt8[Array, "L B K S"],
    value_zero: UInt8[Array, "L B K S"],
    lengths: Int[Array, " B"],
    layer: Int[Array, ""],
    *,
    sm_scale: float,
    out_dtype: Any = jnp.float32,
    plan: Plan | None = None,
    interpret: bool = False,
) -> Float[Array, "B N H"]:
    """See ``pallas_kernels.kv4_attention.kv4_attention``; ``H`` is a multiple of 8, a group has at
    most 16 queries."""
    batch, heads, head_dim = query.shape
    _, _, kv_heads, capacity, _ = key.shape
    group, words = heads // kv_heads, head_dim // 8
    plan = plan or Plan.of(group)
    splits = pl.cdiv(capacity, plan.tokens)
    least = 16 if plan.grouped else 1
    width = max(least, 1 << (words - 1).bit_length())

    def call(kernel, grid, outputs, count, warps):
        return pl.pallas_call(
            kernel,
            grid=grid,
            in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * count,
            out_specs=[pl.BlockSpec(memory_space=pl.ANY)] * len(outputs),
            out_shape=[jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in outputs],
            compiler_params=plt.CompilerParams(num_warps=warps, num_stages=1),
            interpret=interpret,
        )

    parts = (batch, heads, splits)
    kernel = _grouped if plan.grouped else _single
    options = {"tokens": plan.tokens, "words": words, "width": width, "sm_scale": sm_scale}
    grid = (batch, kv_heads if plan.grouped else heads, splits)
    partial = call(
        functools.partial(kernel, group=group, **options),
        grid,
        [(parts, jnp.float32), (parts, jnp.float32), ((*parts, 8 * width), jnp.float32)],
        9,
        plan.warps,
    )(
        query,
        as_words(key),
        as_words(value),
        key_scale,
        value_scale,
        key_zero,
        value_zero,
        lengths,
        layer.reshape(1),
    )
    combine = call(
        functools.partial(_combine, splits=splits, words=words, width=width),
        (batch, heads),
        [((batch, heads, head_dim), out_dtype)],
        3,
        1 if splits <= 8 else 4,
    )
    return combine(*partial)[0]


class _Block:
    """The keys and values of one program: what both kernels load in the same way."""

    def __init__(self, refs, sample, kv_head, split, *, tokens: int, words: int, width: int):
        self.k_ref, self.v_ref, self.ks, self.vs, self.kz, self.vz, length_ref, layer_ref = refs
        self.index = layer_ref[0], sample, kv_head
        self.token = split * tokens + jnp.arange(tokens)
        self.real = self.token < length_ref[sample]
        self.word = jnp.arange(width)
        self.inside = self.word < words

    def packed(self, ref):
        place = ref.at[*self.index, self.token[:, None], self.word[None]]
        return plt.load(place, mask=self.real[:, None] & self.inside[None], other=0)

    def numbers(self, ref):
        """Scales or zeros of the tokens, float32."""
        loaded = plt.load(ref.at[*self.index, self.token], mask=self.real, other=0)
        if jnp.issubdtype(loaded.dtype, jnp.integer):
            loaded = loaded.astype(jnp.int32)
        return loaded.astype(jnp.float32)


def _single(q_ref, *refs, group: int, tokens: int, words: int, width: int, sm_scale: float) -> None:
    """Maximum, sum and weighted values of one query head over one block of tokens."""
    *refs, top_ref, total_ref, out_ref = refs
    sample, head, split = (pl.program_id(axis) for axis in range(3))
    block = _Block(refs, sample, head // group, split, tokens=tokens, words=words, width=width)

    def widened(packed, nibble):
        """``1 + code / 16``, float32."""
        return lax.bitcast_convert_type(nibble_at(packed, nibble, 19) | 0x3F800000, jnp.float32)

    keys = block.packed(block.k_ref)
    products = jnp.zeros((tokens, width), jnp.float32)
    sums = jnp.zeros((width,), jnp.float32)
    for nibble in range(8):
        place = q_ref.at[sample, head, 8 * block.word + nibble]
        query = plt.load(place, mask=block.inside, other=0).astype(jnp.float32)
        products += widened(keys, nibble) * query[None]
        sums += query
    offset = (1.0 + block.numbers(block.kz) / 16.0) * sums.sum()
    score = (16.0 * sm_scale) * block.numbers(block.ks) * (products.sum(1) - offset)
    score = jnp.where(block.real, score, NEGATIVE)
    top = score.max()
    weight = jnp.where(block.real, jnp.exp(score - top), 0.0)
    top_ref[sample, head, split] = top
    total_ref[sample, head, split] = weight.sum()
    weight *= 16.0 * block.numbers(block.vs)
    offset = (weight * (1.0 + block.numbers(block.vz) / 16.0)).sum()
    values = block.packed(block.v_ref)
    for nibble in range(8):
        part = (weight[:, None] * widened(values, nibble)).sum(0) - offset
        plt.store(out_ref.at[sample, head, split, nibble * width + block.word], part)


def _grouped(
    q_ref, *refs, group: int, tokens: int, words: int, width: int, sm_scale: float
) -> None:
    """The same for all queries of one key head, ``GROUP`` rows on tensor cores."""
    *refs, top_ref, total_ref, out_ref = refs
    sample, kv_head, split = (pl.program_id(axis) for axis in range(3))
    block = _Block(refs, sample, kv_head, split, tokens=tokens, words=words, width=width)
    row = jnp.arange(GROUP)
    own = row < group
    head = kv_head * group + row

    def widened(packed, nibble):
        """``1 + code / 16``, bfloat16."""
        bits = (nibble_at(packed, nibble, 3) | 0x3F80).astype(jnp.int16)
        return lax.bitcast_convert_type(bits, jnp.bfloat16)

    def dot(left, right, contracted):
        return lax.dot_general(
            left, right, (((1,), (contracted,)), ((), ())), preferred_element_type=jnp.float32
        )

    keys = block.packed(block.k_ref)
    products = jnp.zeros((GROUP, tokens), jnp.float32)
    sums = jnp.zeros((GROUP,), jnp.float32)
    for nibble in range(8):
        place = q_ref.at[sample, head[:, None], (8 * block.word + nibble)[None]]
        query = plt.load(place, mask=own[:, None] & block.inside[None], other=0)
        codes = widened(keys, nibble)
        for part in halves(query):
            products += dot(part, codes, 1)
            sums += part.astype(jnp.float32).sum(1)
    offset = sums[:, None] * (1.0 + block.numbers(block.kz) / 16.0)[None]
    score = ((16.0 * sm_scale) * block.numbers(block.ks))[None] * (products - offset)
    score = jnp.where(block.real[None], score, NEGATIVE)
    top = score.max(1)
    weight = jnp.where(block.real[None], jnp.exp(score - top[:, None]), 0.0)
    plt.store(top_ref.at[sample, head, split], top, mask=own)
    plt.store(total_ref.at[sample, head, split], weight.sum(1), mask=own)
    weights = halves(weight * (16.0 * block.numbers(block.vs))[None])
    # Of the weights as they are multiplied, or the 1 in every code would not cancel.
    whole: Any = sum(part.astype(jnp.float32) for part in weights)
    offset = (whole * (1.0 + block.numbers(block.vz) / 16.0)[None]).sum(1)
    values = block.packed(block.v_ref)
    for nibble in range(8):
        codes = widened(values, nibble)
        out: Any = sum(dot(part, codes, 0) for part in weights)
        place = out_ref.at[sample, head[:, None], split, (nibble * width + block.word)[None]]
        plt.store(place, out - offset[:, None], mask=jnp.broadcast_to(own[:, None], out.shape))


def _combine(top_ref, total_ref, part_ref, out_ref, *, splits: int, words: int, width: int) -> None:
    """Joins the blocks of one query head and puts its elements in order."""
    sample, head = pl.program_id(0), pl.program_id(1)
    split = jnp.arange(1 << (splits - 1).bit_length())
    place = jnp.arange(8 * width)
    nibble, word = place // width, place % width
    real = split < splits
    top = plt.load(top_ref.at[sample, head, split], mask=real, other=NEGATIVE)
    share = jnp.exp(top - top.max())
    total = plt.load(total_ref.at[sample, head, split], mask=real, other=0.0)
    parts = plt.load(
        part_ref.at[sample, head, split[:, None], place[None]],
        mask=jnp.broadcast_to(real[:, None], (split.shape[0], place.shape[0])),
        other=0.0,
    )
    out = (share[:, None] * parts).sum(0) / jnp.maximum((share * total).sum(), 1e-30)
    plt.store(
        out_ref.at[sample, head, 8 * word + nibble], out.astype(out_ref.dtype), mask=word < words
    )
