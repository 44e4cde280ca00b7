"""Arithmetic inside Triton kernels, of Pallas and of jax-triton."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

ROUND, ROUND_BITS = 12582912.0, 0x4B400000
"""1.5 x 2^23 and its bits: added to a small number, it leaves the nearest integer (ties to even) in
the low bits of the sum."""

DOT = """{
    .reg .b32 low, high, even, odd, t;
    shl.b32 low, $1, 4;
    and.b32 low, low, 0xF0F0F0F0;
    and.b32 high, $1, 0xF0F0F0F0;
    prmt.b32 even, $2, $3, 0x6420;
    prmt.b32 odd, $2, $3, 0x7531;
    dp4a.s32.s32 t, low, even, $4;
    dp4a.s32.s32 $0, high, odd, t;
}"""
"""$0 = $4 + 16 x (8 codes of word $1 times 8 int8 values in $2 and $3)."""


def nearest(x: Float[Array, "*shape"]) -> Int[Array, "*shape"]:
    """The nearest integer (ties to even), int32; of numbers beyond 2^22 only the order is kept."""
    return lax.bitcast_convert_type(x + ROUND, jnp.int32) - ROUND_BITS


def sigmoid(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    return 1.0 / (1.0 + jnp.exp(-x))


def gated_product(
    gate: Float[Array, "*shape"], up: Float[Array, "*shape"], dtype: Any
) -> Float[Array, "*shape"]:
    """``silu(gate) * up`` of float32, every step rounded to ``dtype``: ``stable.gated``."""

    def rounded(x):
        return x.astype(dtype).astype(jnp.float32)

    return rounded(rounded(gate * rounded(sigmoid(gate))) * up)


def activated(x: Float[Array, "*shape"], name: str) -> Float[Array, "*shape"]:
    """``stable.ACTIVATIONS`` but the exact gelu; all of them keep the zeros of padding."""
    if name == "relu":
        return jnp.maximum(x, 0.0)
    if name == "silu":
        return x * sigmoid(x)
    if name == "quick_gelu":
        return x * sigmoid(1.702 * x)
    assert name == "gelu_pytorch_tanh", name
    return x * sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * (x * x * x)))


def halves(x: Float[Array, "*shape"]) -> tuple[Array, ...]:
    """bfloat16 parts whose sum is ``x`` to 16 bits; one where ``x`` is bfloat16."""
    if x.dtype == jnp.bfloat16:
        return (x,)
    high = x.astype(jnp.bfloat16)
    return high, (x - high.astype(jnp.float32)).astype(jnp.bfloat16)


def operands(x: Float[Array, "*shape"], short: bool) -> tuple[Array, ...]:
    """Parts for ``product``: one of float16 (11 bits), more than bfloat16 activations have and
    than a quantization to 8 bits notices, or ``halves``."""
    return (x.astype(jnp.float16),) if short else halves(x)


def into_range(peak: Float[Array, ""]) -> tuple[Array, Array]:
    """Powers of two, inverse to each other: times the first one, what is at most ``peak`` is below
    2^-3, so that float16 holds sums of 256 products of it with factors of up to 2^11."""
    exponent = lax.shift_right_logical(lax.bitcast_convert_type(peak, jnp.int32), 23)
    # Biased by 127 each: 2^(-4 - e) and 2^(4 + e), for e from -126 to 122.
    down = jnp.maximum(250 - exponent, 1)

    def power(biased):
        return lax.bitcast_convert_type(lax.shift_left(biased, 23), jnp.float32)

    return power(down), power(254 - down)


def product(left: tuple[Array, ...], right: tuple[Array, ...], *, across: bool) -> Array:
    """``left right`` (``left^T right`` with ``across``) of operands in parts (``operands``,
    ``halves``), float32.

    All products of parts but that of the two small ones, on tensor cores: every side is a power of
    two, 16 at least.
    """
    total: Any = None
    contracted = 0 if across else 1
    for i, one in enumerate(left):
        for j, other in enumerate(right):
            if i + j < 2:
                part = lax.dot_general(
                    one,
                    other,
                    (((contracted,), (0,)), ((), ())),
                    preferred_element_type=jnp.float32,
                )
                total = part if total is None else total + part
    return total
