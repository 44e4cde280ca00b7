"""Float32 pieces whose bits depend neither on shapes nor on how XLA fuses them (on CPU)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rounded(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """``x`` rounded to float32 at this point.

    The identity, but one that the compiler may not look through: without it XLA on CPU contracts a
    product into a following sum (one rounding less) in some shapes and not in others, so that a
    token's bits would depend on padding and batch neighbours.
    """
    return jax.lax.reduce_precision(x, 8, 23)


def as_stored(x: Float[Array, "*shape"], dtype: Any) -> Float[Array, "*shape"]:
    """What of ``x`` is left once ``dtype`` holds it, as float32.

    Not ``x.astype(dtype).astype(float32)``: XLA may leave out such a pair (it allows excess
    precision by default). Codes would then be made with one scale and read with another.
    """
    info = jnp.finfo(dtype)
    return jax.lax.reduce_precision(x.astype(jnp.float32), info.nexp, info.nmant)


def summed(x: Float[Array, "*shape"], y: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """``x + y`` in the dtype of ``x``, and really rounded to it: see ``as_stored``."""
    total = x.astype(jnp.float32) + y.astype(jnp.float32)
    return as_stored(total, x.dtype).astype(x.dtype)


def gated(gate: Float[Array, "*shape"], up: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """``silu(gate) * up`` in their dtype, sigmoid and both products really rounded to it."""

    def product(x, y):
        return as_stored(rounded(x.astype(jnp.float32) * y), up.dtype)

    sigmoid = as_stored(jax.nn.sigmoid(gate.astype(jnp.float32)), up.dtype)
    return product(up, product(gate, sigmoid)).astype(up.dtype)


def matmul(x: Float[Array, "M K"], weight: Float[Array, "N K"]) -> Float[Array, "M N"]:
    """``x weight^T`` accumulated in float32 (float32 inputs: highest precision), in float32.

    A single row is computed as two: XLA's matrix-vector code sums in another order on CPU, and a
    token's result must not depend on how many rows stand beside it.
    """
    rows = x.shape[0]
    if rows == 1:
        x = jnp.concatenate([x, x])
    out = jax.lax.dot_general(
        x,
        weight,
        (((1,), (1,)), ((), ())),
        precision="highest" if x.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
    return out[:rows]


def exp_difference(x: Array, reference: Array) -> Array:
    """``exp(x - reference)`` without the subtraction being contracted into the polynomial of
    ``exp``."""
    return jnp.exp(rounded(x - reference))


def fixed_order_sum(x: Float[Array, "*rows n"]) -> Float[Array, "*rows"]:
    """Sums the last axis by halving (zero-padded to a power of two): one order for every shape.

    XLA's own reduction on CPU changes its order with the number of rows. On a GPU it does not
    inside one program, and the halving would put a whole row on one thread.
    """
    return jax.lax.platform_dependent(x, cuda=lambda x: x.sum(-1), default=_halving_sum)


def _halving_sum(x: Float[Array, "*rows n"]) -> Float[Array, "*rows"]:
    width = 1 << max(0, x.shape[-1] - 1).bit_length()
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width - x.shape[-1])])
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    return x[..., 0]
