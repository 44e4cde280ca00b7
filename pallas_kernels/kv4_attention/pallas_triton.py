"""Decode attention on packed 4-bit keys and values, split over the sequence (any NVIDIA GPU).

Two launches. The first gives each query head and each BLOCK of tokens a program: it reads the
packed words once, widens each nibble with an integer-to-float trick (the code in the low mantissa
bits of 2^23), and keeps scale and zero out of the inner products:

    q . k = scale * (sum q code - zero * sum q),    sum p v = sum p scale code - sum p scale zero

It leaves the maximum, the sum and the weighted values of its tokens; the second launch combines
them. Grouped queries read their key head again, from the L2 cache: one program for a whole group
makes too few programs for the GPU.

Pallas' Triton back end is deprecated in jax 0.11; see ``int4_matmul.pallas_triton``.
"""

from __future__ import annotations

import functools

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int, UInt8

from pallas_kernels.attention.reference import BLOCK, NEGATIVE
from pallas_kernels.packing import as_words

MAGIC = 0x4B000000  # bits of the float32 2^23: OR-ing a small integer in adds it


def kv4_attention_split(
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
    interpret: bool = False,
) -> Float[Array, "B N H"]:
    """See ``pallas_kernels.kv4_attention.kv4_attention``; ``H`` is a multiple of 8."""
    batch, heads, head_dim = query.shape
    _, _, kv_heads, capacity, _ = key.shape
    splits, words = capacity // BLOCK, head_dim // 8

    def call(kernel, grid, outputs, count):
        return pl.pallas_call(
            kernel,
            grid=grid,
            in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * count,
            out_specs=[pl.BlockSpec(memory_space=pl.ANY)] * len(outputs),
            out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in outputs],
            compiler_params=plt.CompilerParams(num_warps=2, num_stages=1),
            interpret=interpret,
        )

    parts = (batch, heads, splits)
    partial = call(
        functools.partial(_one_block, group=heads // kv_heads, words=words),
        parts,
        [parts, parts, (*parts, head_dim)],
        count=9,
    )(
        query.astype(jnp.float32) * sm_scale,
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
        functools.partial(_combine, splits=splits, head_dim=head_dim),
        (batch, heads),
        [(batch, heads, head_dim)],
        count=3,
    )
    return combine(*partial)[0]


def _one_block(
    q_ref,
    k_ref,
    v_ref,
    k_scale_ref,
    v_scale_ref,
    k_zero_ref,
    v_zero_ref,
    length_ref,
    layer_ref,
    top_ref,
    total_ref,
    out_ref,
    *,
    group,
    words,
):
    """Maximum, sum [B, N, splits] and weighted values [B, N, splits, H] of BLOCK tokens."""
    sample, head, split = (pl.program_id(axis) for axis in range(3))
    layer, length, kv_head = layer_ref[0], length_ref[sample], head // group
    token = split * BLOCK + jnp.arange(BLOCK)
    real = token < length
    width = 1 << (words - 1).bit_length()
    word = jnp.arange(width)
    inside = word < words
    mask = real[:, None] & inside[None]

    def numbers(ref):
        """Scales or zeros of the tokens, float32."""
        loaded = plt.load(ref.at[layer, sample, kv_head, token], mask=real, other=0)
        if jnp.issubdtype(loaded.dtype, jnp.integer):
            loaded = loaded.astype(jnp.int32)
        return loaded.astype(jnp.float32)

    def packed(ref):
        place = ref.at[layer, sample, kv_head, token[:, None], word[None]]
        return plt.load(place, mask=mask, other=0)

    def codes(array, nibble):
        bits = lax.shift_right_logical(array, jnp.full(array.shape, 4 * nibble, jnp.int32)) & 15
        return lax.bitcast_convert_type(bits | MAGIC, jnp.float32) - 8388608.0

    keys = packed(k_ref)
    products, sums = jnp.zeros((BLOCK, width), jnp.float32), jnp.zeros((width,), jnp.float32)
    for nibble in range(8):
        place = q_ref.at[sample, head, 8 * word + nibble]
        query = plt.load(place, mask=inside, other=0.0)
        products += codes(keys, nibble) * query[None]
        sums += query
    score = numbers(k_scale_ref) * (products.sum(1) - numbers(k_zero_ref) * sums.sum())
    score = jnp.where(real, score, NEGATIVE)
    top = score.max()
    weight = jnp.where(real, jnp.exp(score - top), 0.0)
    top_ref[sample, head, split] = top
    total_ref[sample, head, split] = weight.sum()
    weight *= numbers(v_scale_ref)
    offset = (weight * numbers(v_zero_ref)).sum()
    values = packed(v_ref)
    for nibble in range(8):
        part = (weight[:, None] * codes(values, nibble)).sum(0) - offset
        plt.store(out_ref.at[sample, head, split, 8 * word + nibble], part, mask=inside)


def _combine(top_ref, total_ref, part_ref, out_ref, *, splits, head_dim):
    """Joins the blocks of one query head."""
    sample, head = pl.program_id(0), pl.program_id(1)
    split = jnp.arange(1 << (splits - 1).bit_length())
    dim = jnp.arange(1 << (head_dim - 1).bit_length())
    real, inside = split < splits, dim < head_dim
    top = plt.load(top_ref.at[sample, head, split], mask=real, other=NEGATIVE)
    share = jnp.exp(top - top.max())
    total = plt.load(total_ref.at[sample, head, split], mask=real, other=0.0)
    parts = plt.load(
        part_ref.at[sample, head, split[:, None], dim[None]],
        mask=real[:, None] & inside[None],
        other=0.0,
    )
    out = (share[:, None] * parts).sum(0) / jnp.maximum((share * total).sum(), 1e-30)
    plt.store(out_ref.at[sample, head, dim], out, mask=inside)
