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
from quota_jax.quant.groups import Groups
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
    step: Float[Array, " N"] | None = None,
) -> Float[Array, "M N"]:
    """``x weight^T`` with both quantized on the fly, multiplied as integers; differentiable.

    ``step`` holds the weight's scales where they are learned.
    """
    values, row_scale = quantize_activation(x, activation_bits, clip)
    codes, scale = quantize_weight(weight, weight_bits, step)
    return integer_matmul(values, row_scale, codes, scale)


def _forward(x, weight, clip, weight_bits, activation_bits, step):
    out = simulated_product(x, weight, clip, weight_bits, activation_bits, step)
    return out, (x, weight, clip, step)


def _backward(weight_bits, activation_bits, kept, gradient):
    def smooth(x, weight, clip, step):
        x = x.astype(jnp.float32)
        row_scale = activation_scale(x, activation_bits, clip)
        codes, scale = _smooth_weight(weight, weight_bits, step)
        product = _dot(integers(x, row_scale, activation_bits), codes)
        return product * row_scale[:, None] * scale[None, :]

    return jax.vjp(smooth, *kept)[1](gradient)


simulated_product.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def simulated_weight(
    weight: Float[Array, "N K"], bits: int, step: Float[Array, " N"] | None = None
) -> tuple[Array, Array]:
    """Codes (as float32) and scales of a weight; differentiable. ``step``: learned scales."""
    codes, scale = quantize_weight(weight, bits, step)
    return codes.astype(jnp.float32), scale


def _weight_forward(weight, bits, step):
    return simulated_weight(weight, bits, step), (weight, step)


def _weight_backward(bits, kept, gradient):
    return jax.vjp(lambda weight, step: _smooth_weight(weight, bits, step), *kept)[1](gradient)


simulated_weight.defvjp(_weight_forward, _weight_backward)


def _smooth_weight(weight, bits, step):
    weight = weight.astype(jnp.float32)
    if step is not None:
        return _learned_integers(weight, step, bits), step
    scale = jnp.maximum(jnp.abs(weight).max(-1), TINY) / symmetric_limit(bits)
    return integers(weight, scale, bits), scale


def _learned_integers(weight, step, bits):
    """``integers`` with the gradient of LSQ: cut before rounding, so that it ends where the grid
    does and not half a step later."""
    limit = symmetric_limit(bits)
    return round_through(jnp.clip(weight / step[..., None], -limit - 1, limit))


def simulated_groups(
    weight: Float[Array, "N K"], step: Float[Array, "N G"], groups: Groups
) -> Float[Array, "N K"]:
    """The dequantized weight on a symmetric grid with a learned scale for each group; float32,
    differentiable in both."""
    weight, step = weight.astype(jnp.float32), step.astype(jnp.float32)
    codes, scale, _ = groups.quantize(weight, step)
    cut, stored = groups.cut(weight), pass_through(step, scale.astype(jnp.float32))
    smooth = _learned_integers(cut, stored, groups.bits) * stored[..., None]
    smooth = smooth.reshape(len(weight), -1)[:, : weight.shape[1]]
    return pass_through(smooth, groups.dequantize(codes, scale))


def _dot(x, codes):
    # Default precision: small integers survive the tensor cores' input rounding.
    dimensions = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, codes, dimensions, precision=jax.lax.Precision.DEFAULT)
