"""Quantizers of keys by channel, and what gradients of cached keys and values pass through.

Keys before rotation have outliers in fixed channels (KVQuant, Hooper et al., NeurIPS 2024, section
3.1), so one scale for each channel suits them better than one for each token. The ranges are
constants of the model, measured on calibration samples: a stored key then depends on its own token
alone, neither on later ones nor on how long the prompt is, and a new token needs no scale of its
own. KVQuant's sparse outliers and non-uniform levels are not used.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from pallas_kernels.stable import rounded
from quota_jax.quant.quantizers import TINY, kv_codes
from quota_jax.quant.straight_through import round_through


def channel_grid(
    key_range: Float[Array, "2 K H"], bits: int, clip: Float[Array, " 2"] | None = None
) -> tuple[Float[Array, "K H"], Float[Array, "K H"]]:
    """Smallest value and step of each channel: a key is ``low + step * code``.

    Args:
      key_range: largest and smallest value of each channel; 0 need not lie between.
      clip: factors of the upper and of the lower half of each range.
    """
    high, low = key_range[0].astype(jnp.float32), key_range[1].astype(jnp.float32)
    if clip is not None:
        middle, half = (high + low) / 2, (high - low) / 2
        high, low = middle + rounded(half * clip[0]), middle - rounded(half * clip[1])
    return low, jnp.maximum(high - low, TINY) / (2**bits - 1)


def quantize_channels(
    x: Float[Array, "*rows K H"], grid: tuple[Array, Array], bits: int
) -> UInt8[Array, "*rows K H"]:
    """Codes of keys on the grid of ``channel_grid``; values outside it are cut."""
    low, step = grid
    codes = jnp.round((x.astype(jnp.float32) - low) / step)
    return jnp.clip(codes, 0, 2**bits - 1).astype(jnp.uint8)


def dequantize_channels(
    codes: UInt8[Array, "*rows K H"], grid: tuple[Array, Array]
) -> Float[Array, "*rows K H"]:
    """``low + step * code`` in float32; ``grid`` broadcasts against the codes."""
    low, step = grid
    return rounded(codes.astype(jnp.float32) * step) + low


def smooth_channels(
    x: Float[Array, "*rows K H"], grid: tuple[Array, Array], bits: int
) -> Float[Array, "*rows K H"]:
    """Keys read back, for their gradient: rounding counts as the identity."""
    low, step = grid
    codes = round_through((x.astype(jnp.float32) - low) / step)
    return jnp.clip(codes, 0, 2**bits - 1) * step + low


def smooth_tokens(
    x: Float[Array, "*rows H"], bits: int, clip: Float[Array, " 2"] | None
) -> Float[Array, "*rows H"]:
    """Keys or values of ``quantize_kv`` read back, for their gradient: rounding counts as the
    identity; clipping, scale and zero point have their natural gradients (FlatQuant)."""
    codes, scale, zero = kv_codes(x, bits, clip, round_through)
    return (codes - zero[..., None]) * scale.astype(jnp.float32)[..., None]
