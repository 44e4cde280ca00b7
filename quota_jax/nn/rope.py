"""Rotary position embeddings (half-split convention of LLaMA): 1-D, multimodal, axial."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.stable import rounded
from quota_jax.config import TextConfig


def inverse_frequencies(config: TextConfig) -> np.ndarray:
    """Angular step per position of each of the ``head_dim / 2`` pairs, with the config's
    scaling."""
    half = np.arange(0, config.head_dim, 2, dtype=np.float32) / config.head_dim
    frequency = (1.0 / config.rope_theta**half).astype(np.float32)
    scaling = config.rope_scaling
    if scaling is None:
        return frequency
    if scaling.rope_type == "linear":
        return frequency / np.float32(scaling.factor)
    # llama3: long wavelengths are stretched, short ones kept, the band between interpolated.
    context = scaling.original_max_position_embeddings
    wavelength = 2 * math.pi / frequency
    smooth = (context / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    smooth = np.clip(smooth, 0.0, 1.0)
    return ((1 - smooth) * frequency / scaling.factor + smooth * frequency).astype(np.float32)


def rotary_angles(
    config: TextConfig, positions: Int[Array, "*rows"]
) -> tuple[Float[Array, "*rows H/2"], Float[Array, "*rows H/2"]]:
    """Cosine and sine for each position, float32.

    With ``config.mrope_section`` positions are ``[*rows, 3]``, and each rotary pair turns by the
    stream of its section: for sections (1, 2, 1) the pairs follow frame, row, row, column.
    """
    angles = positions.astype(jnp.float32)[..., None]
    if config.mrope_section is not None:
        stream = np.repeat(np.arange(3), config.mrope_section)
        angles = positions.astype(jnp.float32)[..., stream]
    return _cos_sin(angles * inverse_frequencies(config))


def token_positions(config: TextConfig, position: Int[Array, " B"]) -> Array:
    """Positions of text tokens as ``rotary_angles`` takes them: the same in every stream."""
    if config.mrope_section is None:
        return position
    return jnp.broadcast_to(position[..., None], (*position.shape, 3))


def axial_angles(
    head_dim: int, theta: float, coordinates: Int[Array, "*rows 2"]
) -> tuple[Float[Array, "*rows H/2"], Float[Array, "*rows H/2"]]:
    """Cosine and sine for patches: the first half of the pairs turns by the row, the other by the
    column."""
    half = np.arange(0, head_dim // 2, 2, dtype=np.float32) / (head_dim // 2)
    frequency = (1.0 / theta**half).astype(np.float32)
    angles = coordinates.astype(jnp.float32)[..., None] * frequency
    return _cos_sin(angles.reshape(*coordinates.shape[:-1], -1))


def _cos_sin(angles: Array) -> tuple[Array, Array]:
    angles = rounded(angles)
    return rounded(jnp.cos(angles)), rounded(jnp.sin(angles))


def rotate(x: Float[Array, "*rows N H"], cos: Array, sin: Array) -> Float[Array, "*rows N H"]:
    """Rotates pair ``(i, i + H/2)`` of each head; float32 inside."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    real = rounded(first * cos) - rounded(second * sin)
    imaginary = rounded(second * cos) + rounded(first * sin)
    out = jnp.concatenate([real, imaginary], axis=-1)
    return out.astype(x.dtype)
