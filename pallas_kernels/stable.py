"""Float32 pieces whose bits depend neither on shapes nor on how XLA fuses them (on CPU; see
``rounded`` for what that rests on)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rounded(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """``x`` rounded to float32 at this point, as far as HLO goes.

    The identity; it marks where a product must not be taken into a following sum (one rounding
    less). It is no wall for LLVM, which on a CPU contracts ``x + rounded(y * z)`` all the same (jax
    0.10.2 and 0.11.2). So equal bits rest on programs being compiled alike, and are what tests find
    (``tests/test_invariance.py``), not what these marks ensure: with jax 0.10.2 the tests of
    invariance, scores, selectors and fused towers pass without them too.
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


def activated(x: Float[Array, "*shape"], name: str) -> Float[Array, "*shape"]:
    """One of ``ACTIVATIONS`` in the dtype of ``x``: computed in float32 and really rounded once.

    Raises:
      KeyError: there is none of this name.
    """
    return as_stored(ACTIVATIONS[name](x.astype(jnp.float32)), x.dtype).astype(x.dtype)


def _sigmoid_gated(x: Array, argument: Array) -> Array:
    return rounded(x * rounded(jax.nn.sigmoid(argument)))


def _gelu(x: Array) -> Array:
    return rounded(0.5 * x * jax.lax.erfc(rounded(-x * math.sqrt(0.5))))


def _gelu_tanh(x: Array) -> Array:
    # (1 + tanh(z)) / 2 is the sigmoid of 2 z. XLA's tanh on CPU is not the same in all shapes.
    cube = rounded(rounded(jnp.square(x)) * x)
    inner = rounded(x + rounded(0.044715 * cube))
    return _sigmoid_gated(x, rounded(2 * math.sqrt(2 / math.pi) * inner))


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": _gelu,
    "gelu_pytorch_tanh": _gelu_tanh,
    "quick_gelu": lambda x: _sigmoid_gated(x, rounded(1.702 * x)),
    "relu": jax.nn.relu,
    "silu": lambda x: _sigmoid_gated(x, x),
}
"""Of float32, by their names in Hugging Face configurations. Products are rounded before a sum or a
polynomial could take them in."""


def normed(
    x: Float[Array, "*rows D"],
    weight: Float[Array, " D"],
    bias: Float[Array, " D"] | None,
    eps: float,
) -> Float[Array, "*rows D"]:
    """RMSNorm of the last axis, LayerNorm where there is a ``bias``, in the dtype of ``x``.

    Computed in float32; the variance is the mean square of what is left without the mean.
    """
    y = rounded(x.astype(jnp.float32))
    if bias is not None:
        y = rounded(y - mean(y))
    power = mean(rounded(jnp.square(y)))
    y = rounded(y * rounded(jax.lax.rsqrt(power + eps)))
    y = rounded(y * weight.astype(jnp.float32))
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    return as_stored(y, x.dtype).astype(x.dtype)


def mean(x: Float[Array, "*rows D"]) -> Float[Array, "*rows 1"]:
    """Mean of the last axis in a fixed order."""
    return rounded(fixed_order_sum(x)[..., None] / x.shape[-1])


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
