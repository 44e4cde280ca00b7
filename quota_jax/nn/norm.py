"""RMSNorm and LayerNorm, computed in float32."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from pallas_kernels.stable import normed
from quota_jax.nn.linear import take


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
        bias = take(self.bias, layer) if self.centred else None
        return normed(x, take(self.scale, layer), bias, self.eps)
