"""One launch, one warp per head: rotates, quantizes and writes in place (any NVIDIA GPU).

A lane holds the pairs of neighbouring elements that share a byte, so a head's range is one warp
reduction and its codes are packed in registers. The caches are aliased to the outputs: nothing but
the new token is written.

Pallas' Triton back end is deprecated in jax 0.11; see ``int4_matmul.pallas_triton``. The way out
here is ``impl="xla"``.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int

from pallas_kernels.kv4_append.reference import Appended, Packed, Sites
from pallas_kernels.kv4_encode.pallas_triton import quantized

ROWS = 16
"""Rows of a transform's matrix that are in registers at a time."""


def kv4_append_triton(
    qkv: Float[Array, "B rows"],
    cos: Float[Array, "B half"],
    sin: Float[Array, "B half"],
    key: Packed,
    value: Packed,
    lengths: Int[Array, " B"],
    layer: Int[Array, ""],
    site_layer: Int[Array, ""],
    sites: Sites,
    *,
    dtype: Any,
    interpret: bool = False,
) -> Appended:
    """See ``pallas_kernels.kv4_append.kv4_append``."""
    batch, half = cos.shape
    kv_heads = key[0].shape[2]
    heads = qkv.shape[1] // (2 * half)
    num_heads = heads - 2 * kv_heads
    caches = (*key, *value)
    extra = [a for a in sites if a is not None]
    first = 6 + len(extra)  # the caches follow these, and one output
    call = pl.pallas_call(
        functools.partial(
            _kernel,
            num_heads=num_heads,
            kv_heads=kv_heads,
            half=half,
            capacity=key[0].shape[3],
            given=tuple(a is not None for a in sites),
            dtype=dtype,
        ),
        grid=(batch, heads),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * (first + len(caches)),
        out_specs=[pl.BlockSpec(memory_space=pl.ANY)] * (1 + len(caches)),
        out_shape=[
            jax.ShapeDtypeStruct((batch, num_heads, 2 * half), dtype),
            *(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in caches),
        ],
        input_output_aliases={first + i: 1 + i for i in range(len(caches))},
        compiler_params=plt.CompilerParams(num_warps=1 if sites.key is None else 4, num_stages=1),
        interpret=interpret,
    )
    query, *new = call(
        qkv,
        cos.astype(jnp.float32),
        sin.astype(jnp.float32),
        lengths.astype(jnp.int32),
        layer.reshape(1),
        site_layer.reshape(1),
        *extra,
        *caches,
    )
    return Appended(query, tuple(new[:3]), tuple(new[3:]))


def _kernel(
    qkv_ref,
    cos_ref,
    sin_ref,
    length_ref,
    layer_ref,
    site_ref,
    *refs: Any,
    num_heads: int,
    kv_heads: int,
    half: int,
    capacity: int,
    given: tuple[bool, ...],
    dtype: Any,
) -> None:
    rest = list(refs)
    query_p_ref, key_p_ref, clip_ref, bias_ref = (rest.pop(0) if there else None for there in given)
    query_ref, *cache_refs = rest[6:]  # the first six are the caches as inputs
    sample, head = pl.program_id(0), pl.program_id(1)
    layer, length = layer_ref[0], length_ref[sample]
    byte = jnp.arange(1 << (half - 1).bit_length())
    inside = byte < half

    def element(place):
        """Elements ``place`` of the head, queries and keys rotated; float32 of ``dtype``."""
        low = place < half
        angle = jnp.where(low, place, place - half)
        other = jnp.where(low, place + half, place - half)
        real = place < 2 * half

        def load(ref, row, index):
            return plt.load(ref.at[row, index], mask=real, other=0).astype(jnp.float32)

        def projected(index):
            index = head * 2 * half + index
            x = load(qkv_ref, sample, index)
            if bias_ref is not None:
                x = x + load(bias_ref, site_ref[0], index)
            return x.astype(dtype).astype(jnp.float32)

        x = projected(place)
        across = projected(other) * load(sin_ref, sample, angle)
        turned = x * load(cos_ref, sample, angle) + jnp.where(low, -across, across)
        x = jnp.where(head < num_heads + kv_heads, turned, x)
        return x.astype(dtype).astype(jnp.float32)

    def transformed(matrix_ref):
        """Even and odd elements, multiplied by a matrix where there is one."""
        if matrix_ref is None:
            return [element(2 * byte + odd) for odd in range(2)]

        def step(index, parts):
            k = index * ROWS + jnp.arange(ROWS)
            row = element(k)
            mask = (k < 2 * half)[:, None] & inside[None]
            out = []
            for odd, part in enumerate(parts):
                place = matrix_ref.at[site_ref[0], k[:, None], (2 * byte + odd)[None]]
                tile = plt.load(place, mask=mask, other=0).astype(jnp.float32)
                out.append(part + (row[:, None] * tile).sum(0))
            return tuple(out)

        start = (jnp.zeros(byte.shape, jnp.float32),) * 2
        parts = lax.fori_loop(0, -(-2 * half // ROWS), step, start)
        return [part.astype(dtype).astype(jnp.float32) for part in parts]

    def write(refs, kv_head, parts, which):
        """Quantizes the head over its range and stores codes, scale and zero."""
        codes_ref, scale_ref, zero_ref = refs
        clip = None
        if clip_ref is not None:
            clip = clip_ref[site_ref[0], which, 0], clip_ref[site_ref[0], which, 1]
        codes, scale, zero = quantized(parts, clip, scale_ref.dtype)
        packed = (codes[0] | (codes[1] << 4)).astype(jnp.uint8)
        plt.store(codes_ref.at[layer, sample, kv_head, length, byte], packed, mask=inside)
        scale_ref[layer, sample, kv_head, length] = scale
        zero_ref[layer, sample, kv_head, length] = zero.astype(jnp.uint8)

    @pl.when(head < num_heads)
    def _():
        for odd, part in enumerate(transformed(query_p_ref)):
            place = query_ref.at[sample, head, 2 * byte + odd]
            plt.store(place, part.astype(query_ref.dtype), mask=inside)

    @pl.when((head >= num_heads) & (head < num_heads + kv_heads) & (length < capacity))
    def _():
        write(cache_refs[:3], head - num_heads, transformed(key_p_ref), 0)

    @pl.when((head >= num_heads + kv_heads) & (length < capacity))
    def _():
        write(cache_refs[3:], head - num_heads - kv_heads, transformed(None), 1)
