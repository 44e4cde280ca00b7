"""Gradients through the integer simulation: rounding counts as the identity (straight through).

The value of a simulated product is always the integer one, bit for bit what packed weights give;
only its derivative comes from the float form below.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.int4_matmul import integer_matmul
from quota_jax.quant.quantizers import (
    TINY,
    activation_scale,
    quantize_activation,
    quantize_weight,
    symmetric_limit,
)


@jax.custom_jvp
def round_through(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Rounds to nearest, ties to even; the derivative is 1."""
    return jnp.round(x)


@round_through.defjvp
def _(primals, tangents):
    return jnp.round(primals[0]), tangents[0]


@jax.custom_vjp
def pass_through(x: Float[Array, "*shape"], quantized: Array) -> Array:
    """``quantized``, differentiated as if it were ``x``."""
    return quantized


def _pass_forward(x, quantized):
    return quantized, (jnp.zeros((), x.dtype), jnp.zeros_like(quantized))


def _pass_backward(kept, gradient):
    like, zeros = kept
    return gradient.astype(like.dtype), zeros


pass_through.defvjp(_pass_forward, _pass_backward)


def integers(x: Float[Array, "*rows K"], scale: Float[Array, "*rows"], bits: int) -> Array:
    """``clip(round(x / scale))`` as floats; the gradient of clipping is its natural one."""
    limit = symmetric_limit(bits)
    return jnp.clip(round_through(x / scale[..., None]), -limit - 1, limit)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def simulated_product(
    x: Float[Array, "M K"],
    weight: Float[Array, "N K"],
    clip: Float[Array, " 2"] | None,
    weight_bits: int,
    activation_bits: int,
) -> Float[Array, "M N"]:
    """``x weight^T`` with both quantized on the fly, multiplied as integers; differentiable."""
    values, row_scale = quantize_activation(x, activation_bits, clip)
    codes, scale = quantize_weight(weight, weight_bits)
    return integer_matmul(values, row_scale, codes, scale)


def _forward(x, weight, clip, weight_bits, activation_bits):
    out = simulated_product(x, weight, clip, weight_bits, activation_bits)
    return out, (x, weight, clip)


def _backward(weight_bits, activation_bits, kept, gradient):
    def smooth(x, weight, clip):
        x = x.astype(jnp.float32)
        row_scale = activation_scale(x, activation_bits, clip)
        codes, scale = _smooth_weight(weight, weight_bits)
        product = _dot(integers(x, row_scale, activation_bits), codes)
        return product * row_scale[:, None] * scale[None, :]

    return jax.vjp(smooth, *kept)[1](gradient)


simulated_product.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def simulated_weight(weight: Float[Array, "N K"], bits: int) -> tuple[Array, Array]:
    """Codes (as float32) and scales of a weight; differentiable."""
    codes, scale = quantize_weight(weight, bits)
    return codes.astype(jnp.float32), scale


def _weight_forward(weight, bits):
    return simulated_weight(weight, bits), weight


def _weight_backward(bits, weight, gradient):
    return jax.vjp(lambda weight: _smooth_weight(weight, bits), weight)[1](gradient)


simulated_weight.defvjp(_weight_forward, _weight_backward)


def _smooth_weight(weight, bits):
    weight = weight.astype(jnp.float32)
    scale = jnp.maximum(jnp.abs(weight).max(-1), TINY) / symmetric_limit(bits)
    return integers(weight, scale, bits), scale


def _dot(x, codes):
    # Default precision: small integers survive the tensor cores' input rounding.
    dimensions = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, codes, dimensions, precision=jax.lax.Precision.DEFAULT)
