"""Decode attention on packed 4-bit keys and values on a TPU: online softmax over blocks of tokens.

A program of the grid (sample, key head, block of tokens) serves all query heads of its key head at
once. As in the int4 matmul, even and odd elements of a head are kept apart: a byte's two nibbles
are one of each. Scale and zero stay out of the products:

    q . k = scale * (sum q code - zero * sum q),    sum p v = sum p scale code - sum p scale zero
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, UInt8

from pallas_kernels.attention.reference import NEGATIVE

BLOCK = 512
"""Tokens of a step. The last one may read past the capacity: nothing beyond the lengths counts."""


def kv4_attention_tpu(
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
    interpret: Any = False,
) -> Float[Array, "B N H"]:
    """See ``pallas_kernels.kv4_attention.kv4_attention``.

    interpret: ``pltpu.InterpretParams()`` runs the kernel on the host.
    """
    batch, heads, head_dim = query.shape
    _, _, kv_heads, capacity, width = key.shape
    group = heads // kv_heads
    tokens = min(BLOCK, capacity)
    blocks = pl.cdiv(capacity, tokens)
    query = (query.astype(jnp.float32) * sm_scale).reshape(batch, kv_heads, group, head_dim)

    def per_head():
        return pl.BlockSpec((None, None, group, width), lambda b, k, s, *_: (b, k, 0, 0))

    def codes():
        return pl.BlockSpec(
            (None, None, None, tokens, width), lambda b, k, s, layer, _: (layer[0], b, k, s, 0)
        )

    def numbers():
        # An axis of size 1 before the tokens: a block of one key head is no whole tile otherwise.
        return pl.BlockSpec(
            (None, None, None, 1, tokens), lambda b, k, s, layer, _: (layer[0], b, k, 0, s)
        )

    half = jax.ShapeDtypeStruct((batch, kv_heads, group, width), jnp.float32)
    call = pl.pallas_call(
        functools.partial(_kernel, tokens=tokens, blocks=blocks),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, kv_heads, blocks),
            in_specs=[*[per_head()] * 2, *[codes()] * 2, *[numbers()] * 4],
            out_specs=[per_head()] * 2,
            scratch_shapes=[
                pltpu.VMEM((group, size), jnp.float32) for size in (1, 1, *[width] * 2)
            ],
        ),
        out_shape=[half, half],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=interpret,
    )
    even, odd = call(
        layer.reshape(1),
        lengths,
        query[..., 0::2],
        query[..., 1::2],
        key,
        value,
        *(array[..., None, :] for array in (key_scale, value_scale, key_zero, value_zero)),
    )
    return jnp.stack([even, odd], axis=-1).reshape(batch, heads, head_dim)


def _nibbles(packed):
    """The two unsigned codes of each byte, float32."""
    word = packed.astype(jnp.int32)
    return (word & 15).astype(jnp.float32), (word >> 4).astype(jnp.float32)


def _float(ref):
    array = ref[...]
    if jnp.issubdtype(array.dtype, jnp.integer):
        array = array.astype(jnp.int32)
    return array.astype(jnp.float32)


def _kernel(
    layer_ref,
    length_ref,
    q_even_ref,
    q_odd_ref,
    k_ref,
    v_ref,
    k_scale_ref,
    v_scale_ref,
    k_zero_ref,
    v_zero_ref,
    even_ref,
    odd_ref,
    top_ref,
    total_ref,
    sum_even_ref,
    sum_odd_ref,
    *,
    tokens,
    blocks,
):
    """One block of tokens of one key head; group x tokens scores."""
    del layer_ref  # read by the block specs
    block = pl.program_id(2)
    length = length_ref[pl.program_id(0)]
    dot = functools.partial(
        jax.lax.dot_general,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )

    @pl.when(block == 0)
    def _():
        top_ref[...] = jnp.full_like(top_ref, NEGATIVE)
        for ref in (total_ref, sum_even_ref, sum_odd_ref):
            ref[...] = jnp.zeros_like(ref)

    @pl.when(block * tokens < length)
    def _():
        q_even, q_odd = q_even_ref[...], q_odd_ref[...]
        across = (((1,), (1,)), ((), ()))
        low, high = _nibbles(k_ref[...])
        products = dot(q_even, low, across) + dot(q_odd, high, across)
        q_sum = q_even.sum(1, keepdims=True) + q_odd.sum(1, keepdims=True)
        scores = _float(k_scale_ref) * (products - _float(k_zero_ref) * q_sum)
        place = block * tokens + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        valid = place < length
        scores = jnp.where(valid, scores, NEGATIVE)
        top = jnp.maximum(top_ref[...], scores.max(1, keepdims=True))
        weights = jnp.where(valid, jnp.exp(scores - top), 0.0)
        decay = jnp.exp(top_ref[...] - top)
        top_ref[...] = top
        total_ref[...] = total_ref[...] * decay + weights.sum(1, keepdims=True)
        # Rows past the length may hold anything, a scale that is no number too.
        weights = jnp.where(valid, weights * _float(v_scale_ref), 0.0)
        offset = jnp.where(valid, weights * _float(v_zero_ref), 0.0).sum(1, keepdims=True)
        low, high = _nibbles(v_ref[...])
        along = (((1,), (0,)), ((), ()))
        for ref, part in ((sum_even_ref, low), (sum_odd_ref, high)):
            ref[...] = ref[...] * decay + dot(weights, part, along) - offset

    @pl.when(block == blocks - 1)
    def _():
        total = jnp.maximum(total_ref[...], 1e-30)
        even_ref[...] = sum_even_ref[...] / total
        odd_ref[...] = sum_odd_ref[...] / total
