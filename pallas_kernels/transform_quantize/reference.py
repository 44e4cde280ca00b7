"""What stands between two matmuls, in plain jnp: residual sum, norm, gate or activation, Kronecker
transform, quantization by token.

The same operations in the same order as the layers of a model that run them one by one.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.stable import activated, normed, rounded, summed
from pallas_kernels.stable import gated as silu_gated

TINY = 1e-8
WHOLE = 256
"""Scales have space for whole tiles of rows, the largest of ``int4_matmul.mosaic_gpu``: making room
for them there would be a launch of its own before each product."""


def whole(rows: int) -> int:
    """Scales that ``rows`` rows have."""
    return -(-rows // WHOLE) * WHOLE


class Quantized(NamedTuple):
    """Integer values (int8) and the scale of each row (float32): ``x ~ codes * scale``.

    scale: of ``whole(M)`` rows; what stands beyond the M real ones is undefined and not used.
    states: the residual sum, where there was something to add.
    """

    codes: Int[Array, "M K"]
    scale: Float[Array, " P"]
    states: Float[Array, "M K"] | None


class Sites(NamedTuple):
    """Parameters of one layer; each may be absent. See ``transform_quantize``."""

    norm: Float[Array, " K"] | None = None
    norm_bias: Float[Array, " K"] | None = None
    left: Float[Array, "a a"] | None = None
    right: Float[Array, "b b"] | None = None
    clip: Float[Array, " 2"] | None = None


def transform_quantize_reference(
    x: Float[Array, "M width"],
    added: Float[Array, "M K"] | None,
    sites: Sites,
    *,
    bits: int,
    eps: float,
    gated: bool = False,
    activation: str | None = None,
    padding: int = 0,
) -> Quantized:
    """See ``pallas_kernels.transform_quantize.transform_quantize``; ``sites`` of one layer."""
    states = None if added is None else summed(x, added)
    x = x if states is None else states
    if gated:
        x = silu_gated(*jnp.split(x, 2, axis=-1))
    if activation is not None:
        x = activated(x, activation)
    if sites.norm is not None:
        x = normed(x, sites.norm, sites.norm_bias, eps)
    if sites.left is not None:
        x = _kronecker(x[:, : x.shape[1] - padding], sites.left, sites.right)
    x = x.astype(jnp.float32)
    limit = 2 ** (bits - 1) - 1
    if sites.clip is None:
        largest = jnp.abs(x).max(-1)
    else:
        largest = jnp.maximum(x.max(-1) * sites.clip[0], -x.min(-1) * sites.clip[1])
    scale = jnp.maximum(largest, TINY) / limit
    codes = jnp.clip(jnp.round(x / scale[:, None]), -limit - 1, limit)
    codes = jnp.pad(codes, ((0, 0), (0, padding)))
    scale = jnp.pad(scale, (0, whole(scale.shape[0]) - scale.shape[0]))
    return Quantized(codes.astype(jnp.int8), scale, states)


def _kronecker(x: Float[Array, "M K"], left: Array, right: Array | None) -> Float[Array, "M K"]:
    """``x (left kron right)``, float32: one factor after the other; ``right`` None: identity."""
    rows, a = x.shape[0], left.shape[0]
    b = x.shape[1] // a
    x = x.astype(jnp.float32).reshape(rows, a, b)
    if right is not None:
        x = _product(x.reshape(-1, b), right).reshape(rows, a, b)
    x = _product(x.swapaxes(1, 2).reshape(-1, a), left).reshape(rows, b, a)
    return x.swapaxes(1, 2).reshape(rows, -1)


def _product(x: Array, factor: Array) -> Array:
    out = jax.lax.dot_general(
        x,
        factor.T.astype(jnp.float32),
        (((1,), (1,)), ((), ())),
        precision="highest",
        preferred_element_type=jnp.float32,
    )
    return rounded(out)
