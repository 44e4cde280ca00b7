"""Quantizers: weights per output channel, activations per token, keys and values per token per
head.

Scales are rounded to their storage dtype before anything is divided by them, so that codes made
here and codes made from a stored scale are the same.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from pallas_kernels.stable import as_stored

KV_SCALE_DTYPE = jnp.bfloat16
TINY = 1e-8


def symmetric_limit(bits: int) -> int:
    """The largest positive code: 7 for 4 bits, 127 for 8."""
    return 2 ** (bits - 1) - 1


def quantize_weight(
    weight: Float[Array, "*stack N K"], bits: int, scale: Float[Array, "*stack N"] | None = None
) -> tuple[Int[Array, "*stack N K"], Float[Array, "*stack N"]]:
    """Symmetric round-to-nearest (ties to even) per output channel; int8 codes, float32 scales.

    ``scale`` None: the largest absolute value over the largest code.
    """
    weight = weight.astype(jnp.float32)
    limit = symmetric_limit(bits)
    if scale is None:
        scale = jnp.maximum(jnp.abs(weight).max(-1), TINY) / limit
    codes = jnp.clip(jnp.round(weight / scale[..., None]), -limit - 1, limit)
    return codes.astype(jnp.int8), scale


def activation_scale(
    x: Float[Array, "*rows K"], bits: int, clip: Float[Array, " 2"] | None = None
) -> Float[Array, "*rows"]:
    """Step of each token: its largest absolute value over the largest code.

    ``clip`` holds factors of the largest and of the smallest value (FlatQuant's learned clipping).
    A row of zeros gets TINY/limit.
    """
    if clip is None:
        largest = jnp.abs(x).max(-1)
    else:
        largest = jnp.maximum(x.max(-1) * clip[0], -x.min(-1) * clip[1])
    return jnp.maximum(largest, TINY) / symmetric_limit(bits)


def quantize_activation(
    x: Float[Array, "*rows K"], bits: int, clip: Float[Array, " 2"] | None = None
) -> tuple[Int[Array, "*rows K"], Float[Array, "*rows"]]:
    """Dynamic symmetric per token; int8 codes, float32 scales."""
    x = x.astype(jnp.float32)
    limit = symmetric_limit(bits)
    scale = activation_scale(x, bits, clip)
    codes = jnp.clip(jnp.round(x / scale[..., None]), -limit - 1, limit)
    return codes.astype(jnp.int8), scale


def quantize_kv(
    x: Float[Array, "*rows H"], bits: int, clip: Float[Array, " 2"] | None = None
) -> tuple[UInt8[Array, "*rows H"], Float[Array, "*rows"], UInt8[Array, "*rows"]]:
    """Asymmetric over the head: ``x ~ scale * (code - zero)``; the range always contains 0.

    ``clip`` holds factors of the largest and of the smallest value (FlatQuant's learned clipping).
    Returns unsigned codes, bfloat16 scales and integer zero points.
    """
    codes, scale, zero = kv_codes(x, bits, clip, jnp.round)
    return codes.astype(jnp.uint8), scale, zero.astype(jnp.uint8)


def kv_codes(
    x: Float[Array, "*rows H"],
    bits: int,
    clip: Float[Array, " 2"] | None,
    nearest: Callable[[Array], Array],
) -> tuple[Float[Array, "*rows H"], Float[Array, "*rows"], Float[Array, "*rows"]]:
    """``quantize_kv`` with codes and zeros in float32, rounded by ``nearest``."""
    x = x.astype(jnp.float32)
    levels = 2**bits - 1
    low, high = jnp.minimum(x.min(-1), 0.0), jnp.maximum(x.max(-1), 0.0)
    if clip is not None:
        low, high = low * clip[1], high * clip[0]
    step = as_stored(jnp.maximum(high - low, TINY) / levels, KV_SCALE_DTYPE)
    zero = jnp.clip(nearest(-low / step), 0, levels)
    codes = jnp.clip(nearest(x / step[..., None]) + zero[..., None], 0, levels)
    return codes, step.astype(KV_SCALE_DTYPE), zero
