"""Decode attention over packed 4-bit keys and values in Triton's language, by jax-triton.

The way out of the Pallas-Triton kernels beside it. Two launches: each program takes one key head
and one part of the sequence and walks it in blocks with an online softmax, for all queries of that
head at once on tensor cores; the second launch joins the parts. A byte holds two neighbouring
elements of a head, so products run over even and odd elements apart. ``code - zero`` is an integer,
exact in bfloat16; queries and weights are split into two bfloat16 parts, which keeps 16 bits of
them.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jaxtyping import Array, Float, Int, UInt8

from pallas_kernels.accelerator import find_gpu
from pallas_kernels.jax_triton_calls import call

TOKENS = 64
"""Of one step."""
ROWS = 16
"""Queries of a tensor-core product at least."""
PART = tl.constexpr(tl.bfloat16)
"""Of tensor-core products (float16 in tests: Triton's interpreter has no bfloat16 products)."""


def kv4_attention_jax_triton(
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
) -> Float[Array, "B N H"]:
    """See ``pallas_kernels.kv4_attention.kv4_attention``; ``H`` is even."""
    batch, heads, head_dim = query.shape
    kv_heads, capacity = key.shape[2:4]
    blocks = triton.cdiv(capacity, TOKENS)
    gpu = find_gpu()
    # About four programs for each multiprocessor.
    wanted = 4 * (gpu.num_sms if gpu else 132) // (batch * kv_heads)
    splits = max(1, min(blocks, wanted))
    steps = triton.cdiv(blocks, splits)
    splits = triton.cdiv(blocks, steps)
    half = head_dim // 2
    sizes = {
        "heads": heads,
        "splits": splits,
        "half": half,
        "width": max(16, triton.next_power_of_2(half)),
    }
    parts = batch, heads, splits
    partial = call(
        _part,
        query.astype(jnp.float32) * sm_scale,
        key,
        value,
        key_scale,
        value_scale,
        key_zero,
        value_zero,
        lengths.astype(jnp.int32),
        layer.reshape(1),
        out=[
            jax.ShapeDtypeStruct(parts, jnp.float32),
            jax.ShapeDtypeStruct(parts, jnp.float32),
            jax.ShapeDtypeStruct((*parts, head_dim), jnp.float32),
        ],
        grid=(batch, kv_heads, splits),
        warps=4,
        stages=2,
        kv_heads=kv_heads,
        capacity=capacity,
        group=heads // kv_heads,
        rows=max(ROWS, triton.next_power_of_2(heads // kv_heads)),
        tokens=TOKENS,
        steps=steps,
        **sizes,
    )
    return call(
        _join,
        *partial,
        out=jax.ShapeDtypeStruct(query.shape, out_dtype),
        grid=(batch, heads),
        warps=4,
        stages=1,
        padded=triton.next_power_of_2(splits),
        **sizes,
    )


@triton.jit
def _halves_dot(x, codes, total):
    """``total + x codes`` of float32 ``x`` and bfloat16 ``codes``."""
    high = x.to(PART)
    low = (x - high.to(tl.float32)).to(PART)
    return tl.dot(low, codes, tl.dot(high, codes, total))


@triton.jit
def _codes(ptr, zero, mask):
    """``code - zero`` of the low and the high nibbles, bfloat16."""
    pairs = tl.load(ptr, mask=mask, other=0).to(tl.int32)
    low = ((pairs & 15) - zero[:, None]).to(tl.float32).to(PART)
    high = ((pairs >> 4) - zero[:, None]).to(tl.float32).to(PART)
    return low, high


@triton.jit
def _part(
    q_ptr,
    k_ptr,
    v_ptr,
    k_scale_ptr,
    v_scale_ptr,
    k_zero_ptr,
    v_zero_ptr,
    length_ptr,
    layer_ptr,
    top_ptr,
    total_ptr,
    out_ptr,
    heads: tl.constexpr,
    kv_heads: tl.constexpr,
    capacity: tl.constexpr,
    group: tl.constexpr,
    rows: tl.constexpr,
    tokens: tl.constexpr,
    steps: tl.constexpr,
    splits: tl.constexpr,
    half: tl.constexpr,
    width: tl.constexpr,
):
    """Largest score, sum of weights and weighted values of one part, for one key head's queries."""
    sample, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    layer, length = tl.load(layer_ptr).to(tl.int64), tl.load(length_ptr + sample)
    batch = tl.num_programs(0)
    first = ((layer * batch + sample) * kv_heads + kv_head) * capacity
    row, pair = tl.arange(0, rows), tl.arange(0, width)
    head = (sample * heads + kv_head * group + row).to(tl.int64)
    own, inside = row < group, pair < half
    q_mask = own[:, None] & inside[None, :]
    place = q_ptr + head[:, None] * (2 * half) + 2 * pair[None, :]
    even, odd = tl.load(place, mask=q_mask, other=0.0), tl.load(place + 1, mask=q_mask, other=0.0)

    top = tl.full((rows,), -1e30, tl.float32)
    total = tl.zeros((rows,), tl.float32)
    out_even = tl.zeros((rows, width), tl.float32)
    out_odd = tl.zeros((rows, width), tl.float32)
    start = split * steps * tokens
    for begin in range(start, tl.minimum(start + steps * tokens, length), tokens):
        token = begin + tl.arange(0, tokens)
        real = token < length
        mask = real[:, None] & inside[None, :]
        cached = first + token
        bytes_at = cached[:, None] * half + pair[None, :]
        zero = tl.load(k_zero_ptr + cached, mask=real, other=0).to(tl.int32)
        low, high = _codes(k_ptr + bytes_at, zero, mask)
        score = tl.zeros((rows, tokens), tl.float32)
        score = _halves_dot(even, tl.trans(low), score)
        score = _halves_dot(odd, tl.trans(high), score)
        scale = tl.load(k_scale_ptr + cached, mask=real, other=0.0).to(tl.float32)
        score = tl.where(real[None, :], score * scale[None, :], -1e30)
        new_top = tl.maximum(top, tl.max(score, 1))
        weight = tl.where(real[None, :], tl.exp(score - new_top[:, None]), 0.0)
        decay = tl.exp(top - new_top)
        total = total * decay + tl.sum(weight, 1)
        top = new_top
        zero = tl.load(v_zero_ptr + cached, mask=real, other=0).to(tl.int32)
        low, high = _codes(v_ptr + bytes_at, zero, mask)
        scale = tl.load(v_scale_ptr + cached, mask=real, other=0.0).to(tl.float32)
        weight = weight * scale[None, :]
        out_even = _halves_dot(weight, low, out_even * decay[:, None])
        out_odd = _halves_dot(weight, high, out_odd * decay[:, None])

    at = head * splits + split
    tl.store(top_ptr + at, top, mask=own)
    tl.store(total_ptr + at, total, mask=own)
    place = out_ptr + at[:, None] * (2 * half) + 2 * pair[None, :]
    tl.store(place, out_even, mask=q_mask)
    tl.store(place + 1, out_odd, mask=q_mask)


@triton.jit
def _join(
    top_ptr,
    total_ptr,
    part_ptr,
    out_ptr,
    heads: tl.constexpr,
    splits: tl.constexpr,
    half: tl.constexpr,
    width: tl.constexpr,
    padded: tl.constexpr,
):
    """The parts of one query head together."""
    head = (tl.program_id(0) * heads + tl.program_id(1)).to(tl.int64)
    split, element = tl.arange(0, padded), tl.arange(0, 2 * width)
    real, inside = split < splits, element < 2 * half
    top = tl.load(top_ptr + head * splits + split, mask=real, other=-1e30)
    share = tl.exp(top - tl.max(top, 0))
    total = tl.load(total_ptr + head * splits + split, mask=real, other=0.0)
    place = (head * splits + split)[:, None] * (2 * half) + element[None, :]
    mask = real[:, None] & inside[None, :]
    parts = tl.load(part_ptr + place, mask=mask, other=0.0)
    out = tl.sum(share[:, None] * parts, 0) / tl.maximum(tl.sum(share * total, 0), 1e-30)
    tl.store(out_ptr + head * 2 * half + element, out.to(out_ptr.dtype.element_ty), mask=inside)
