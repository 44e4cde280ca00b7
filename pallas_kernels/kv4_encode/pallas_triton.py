"""One launch from the q/k/v projection of a prompt to its attention and its cache, any NVIDIA GPU.

A program owns one head of a tile of tokens, as two arrays ``[tokens, H/2]``: rotation turns one
half by the other, and neighbouring elements, which share a byte, stand in the same half. So every
value is read once, in runs of ``H/2``, and a head's range, codes and what is read back never leave
the registers. A transform multiplies the halves by the four quarters of its matrix on tensor cores,
with operands split as in ``transform_quantize.pallas_triton``.

The stacks are aliased to the outputs: of them nothing but the one layer is written.

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
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int

from pallas_kernels.kv4_encode.reference import LEVELS, TINY, Encoded, Packed, Sites
from pallas_kernels.triton_arithmetic import halves, nearest, product


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Tokens of one program, and its warps."""

    tokens: int
    warps: int

    @classmethod
    def of(cls, transformed: bool) -> Plan:
        """A matrix is read once for all tokens of a program."""
        return cls(tokens=64, warps=8) if transformed else cls(tokens=16, warps=4)


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What one call does. ``half``: of a head; ``lanes``: the power of two that holds it, 16 at
    least for tensor cores; ``given``: which of the sites are there."""

    total: int
    num_heads: int
    kv_heads: int
    half: int
    given: tuple[bool, ...]
    tokens: int

    @property
    def lanes(self) -> int:
        return max(16, 1 << (self.half - 1).bit_length())


def kv4_encode_triton(
    qkv: Float[Array, "M rows"],
    cos: Float[Array, "M half"],
    sin: Float[Array, "M half"],
    key: Packed,
    value: Packed,
    layer: Int[Array, ""],
    site_layer: Int[Array, ""],
    sites: Sites,
    *,
    read_dtype: Any,
    plan: Plan | None = None,
    interpret: bool = False,
) -> Encoded:
    """See ``pallas_kernels.kv4_encode.kv4_encode``."""
    total, half = cos.shape
    kv_heads = key[0].shape[2]
    heads = qkv.shape[1] // (2 * half)
    plan = plan or Plan.of(sites.query is not None or sites.key is not None)
    work = Work(
        total=total,
        num_heads=heads - 2 * kv_heads,
        kv_heads=kv_heads,
        half=half,
        given=tuple(a is not None for a in sites),
        tokens=plan.tokens,
    )
    stacks = (*key, *value)
    extra = [a for a in sites if a is not None]
    first = 5 + len(extra)  # the stacks follow these, and three outputs
    read = jax.ShapeDtypeStruct((total, kv_heads, 2 * half), read_dtype)
    call = pl.pallas_call(
        functools.partial(_kernel, work=work),
        # Heads first: programs that run together read and write neighbouring memory.
        grid=(heads, pl.cdiv(total, plan.tokens)),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * (first + len(stacks)),
        out_specs=[pl.BlockSpec(memory_space=pl.ANY)] * (3 + len(stacks)),
        out_shape=[
            jax.ShapeDtypeStruct((total, work.num_heads, 2 * half), qkv.dtype),
            read,
            read,
            *(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in stacks),
        ],
        input_output_aliases={first + i: 3 + i for i in range(len(stacks))},
        compiler_params=plt.CompilerParams(num_warps=plan.warps, num_stages=1),
        interpret=interpret,
    )
    query, keys, values, *new = call(
        qkv,
        cos.astype(jnp.float32),
        sin.astype(jnp.float32),
        layer.reshape(1),
        site_layer.reshape(1),
        *extra,
        *stacks,
    )
    return Encoded(query, keys, values, (tuple(new[:3]), tuple(new[3:])))


def quantized(
    parts: list[Array], clip: tuple[Array, Array] | None, scale_dtype: Any
) -> tuple[list[Array], Array, Array]:
    """Codes of heads whose elements stand in two ``parts`` ``[..., n]`` (float32), int32 too, scale
    in its stored dtype and zero (int32) ``[...]``; ``clip``: factors of the largest and of the
    smallest value. Elements of 0 are as none."""
    low = jnp.minimum(jnp.minimum(*parts).min(-1), 0.0)
    high = jnp.maximum(jnp.maximum(*parts).max(-1), 0.0)
    if clip is not None:
        high, low = high * clip[0], low * clip[1]
    scale = (jnp.maximum(high - low, TINY) / LEVELS).astype(scale_dtype)
    step = scale.astype(jnp.float32)
    zero = nearest(jnp.clip(-low / step, 0, LEVELS))
    # Of a single head they are scalars and stay so: with arrays of one the interpreter rounds exact
    # ties of the quotient otherwise.
    over, origin = (step[..., None], zero[..., None]) if step.ndim else (step, zero)
    codes = [jnp.clip(nearest(part / over) + origin, 0, LEVELS) for part in parts]
    return codes, scale, zero


def _kernel(qkv_ref, cos_ref, sin_ref, layer_ref, site_ref, *refs: Any, work: Work) -> None:
    rest = list(refs)
    query_p_ref, key_p_ref, clip_ref = (rest.pop(0) if there else None for there in work.given)
    # The first six are the stacks as inputs.
    query_ref, key_ref, value_ref, *stack_refs = rest[6:]
    head, tile = pl.program_id(0), pl.program_id(1)
    layer, site, half, dtype = layer_ref[0], site_ref[0], work.half, qkv_ref.dtype
    token = tile * work.tokens + jnp.arange(work.tokens)
    lane, byte = jnp.arange(work.lanes), jnp.arange(work.lanes // 2)
    there = token < work.total
    inside = there[:, None] & (lane < half)[None]

    def load(ref, start):
        """``H/2`` columns from ``start`` on, float32."""
        place = ref.at[token[:, None], (start + lane)[None]]
        return plt.load(place, mask=inside, other=0).astype(jnp.float32)

    def store(ref, kv_head, parts):
        for which, part in enumerate(parts):
            place = ref.at[token[:, None], kv_head, (which * half + lane)[None]]
            plt.store(place, part.astype(ref.dtype), mask=inside)

    projected = [load(qkv_ref, (2 * head + which) * half) for which in range(2)]

    def turned(matrix_ref):
        """Rotated, and multiplied by a matrix where there is one; in the model's dtype."""
        (first, second), cos, sin = projected, load(cos_ref, 0), load(sin_ref, 0)
        parts = first * cos - second * sin, second * cos + first * sin
        parts = [part.astype(dtype) for part in parts]
        if matrix_ref is None:
            return parts
        real = (lane < half)[:, None] & (lane < half)[None]
        out = []
        for column in range(2):
            total: Any = 0.0
            for row, part in enumerate(parts):
                place = matrix_ref.at[
                    site, (row * half + lane)[:, None], (column * half + lane)[None]
                ]
                quarter = plt.load(place, mask=real, other=0).astype(jnp.float32)
                total = total + product(halves(part), halves(quarter), across=False)
            out.append(total.astype(dtype))
        return out

    def write(refs, read_ref, kv_head, parts, which):
        """Quantizes the head over its range and stores codes, scale, zero and their product."""
        codes_ref, scale_ref, zero_ref = refs
        clip = None
        if clip_ref is not None:
            clip = clip_ref[site, which, 0], clip_ref[site, which, 1]
        parts = [part.astype(jnp.float32) for part in parts]
        codes, scale, zero = quantized(parts, clip, scale_ref.dtype)
        step = scale.astype(jnp.float32)[:, None]
        store(read_ref, kv_head, [(c - zero[:, None]).astype(jnp.float32) * step for c in codes])
        bytes_inside = there[:, None] & (byte < half // 2)[None]
        for side, code in enumerate(codes):
            # Neighbours are in one thread's registers: the sum is no exchange between threads.
            pairs = code.reshape(work.tokens, work.lanes // 2, 2) << (4 * jnp.arange(2))[None, None]
            index = (side * (half // 2) + byte)[None]
            place = codes_ref.at[layer, token[:, None], kv_head, index]
            plt.store(place, pairs.sum(-1).astype(jnp.uint8), mask=bytes_inside)
        plt.store(scale_ref.at[layer, token, kv_head], scale, mask=there)
        plt.store(zero_ref.at[layer, token, kv_head], zero.astype(jnp.uint8), mask=there)

    num_heads, kv_heads = work.num_heads, work.kv_heads

    @pl.when(head < num_heads)
    def _():
        store(query_ref, head, turned(query_p_ref))

    @pl.when((head >= num_heads) & (head < num_heads + kv_heads))
    def _():
        write(stack_refs[:3], key_ref, head - num_heads, turned(key_p_ref), 0)

    @pl.when(head >= num_heads + kv_heads)
    def _():
        write(stack_refs[3:], value_ref, head - num_heads - kv_heads, projected, 1)
