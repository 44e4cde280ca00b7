"""RMSNorm and LayerNorm, computed in float32."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pallas_kernels.stable import as_stored, fixed_order_sum, rounded
from quota_jax.nn.linear import take


def mean(x: Float[Array, "*rows D"]) -> Float[Array, "*rows 1"]:
    """Mean of the last axis in a fixed order."""
    return rounded(fixed_order_sum(x)[..., None] / x.shape[-1])


class Norm(nnx.Module):
    """LayerNorm where a ``bias`` is given, else RMSNorm; parameters ``[D]`` or stacked ``[L,
    D]``."""

    scale: nnx.Param
    bias: nnx.Param

    def __init__(self, params: Mapping[str, Any], *, eps: float):
        for name, value in params.items():
            setattr(self, name, nnx.Param(value))
        self.centred = "bias" in params
        self.eps = eps

    def __call__(self, x: Float[Array, "*rows D"], layer: Array | int | None = None) -> Array:
        y = rounded(x.astype(jnp.float32))
        if self.centred:
            y = rounded(y - mean(y))
        power = mean(rounded(jnp.square(y)))
        y = rounded(y * rounded(jax.lax.rsqrt(power + self.eps)))
        y = rounded(y * take(self.scale, layer).astype(jnp.float32))
        if self.centred:
            y = y + take(self.bias, layer).astype(jnp.float32)
        return as_stored(y, x.dtype).astype(x.dtype)
