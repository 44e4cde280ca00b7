"""Token embeddings and output head: one row for each entry of the vocabulary, float or int8.

In int8 a row has one symmetric scale, in the dtype of the weights that it replaces. An embedding
lookup gathers rows of codes and then scales them. The head is weight-only (W8A16): codes up to 128
are exact in bfloat16 and float16, so the states are multiplied by the codes in their own dtype,
accumulated in float32 and scaled per entry; nothing but the weights is rounded. The scaled table is
never made. The conversion of the codes is left to XLA, which on GPU can fuse it into the product.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from pallas_kernels.stable import matmul, rounded
from quota_jax.quant.quantizers import symmetric_limit
from quota_jax.quant.straight_through import pass_through

_LIMIT = symmetric_limit(8)
_ROWS = 8192


class VocabularyTable(nnx.Module):
    """``[V, D]``: holds ``weight`` (float), or ``codes`` (int8) and ``scale`` ``[V]``.

    With ``weight`` and ``bits`` 8 it simulates: rows are rounded on the fly to the same codes and
    scales, with straight-through gradients.
    """

    weight: nnx.Param
    codes: nnx.Param
    scale: nnx.Param

    def __init__(self, params: Mapping[str, Any], *, bits: int = 16):
        for name, value in params.items():
            setattr(self, name, nnx.Param(value))
        self.stored = "codes" in params
        self.bits = bits

    @property
    def dtype(self) -> Any:
        """The dtype of the rows."""
        return (self.scale if self.stored else self.weight)[...].dtype

    def rows(self, tokens: Int[Array, "*shape"]) -> Float[Array, "*shape D"]:
        """The entries of these tokens; those outside the vocabulary get the nearest one."""
        if self.stored:
            codes, scale = self.codes[...], self.scale[...]
            tokens = jnp.clip(tokens, 0, codes.shape[0] - 1)
            return _scaled(codes[tokens], scale[tokens])
        weight = self.weight[...]
        found = weight[jnp.clip(tokens, 0, weight.shape[0] - 1)]
        if self.bits == 16:
            return found
        return pass_through(found, _scaled(*quantize_rows(found)))

    def products(self, x: Float[Array, "M D"]) -> Float[Array, "M V"]:
        """``x W^T`` in float32."""
        if not self.stored and self.bits == 16:
            return matmul(x, self.weight[...].astype(x.dtype))
        if self.stored:
            codes, scale = self.codes[...].astype(x.dtype), self.scale[...].astype(jnp.float32)
        else:
            whole, scale = quantize_rows(jax.lax.stop_gradient(self.weight[...]))
            scale = scale.astype(jnp.float32)
            # The gradient of a row's codes is that of the row over its scale.
            smooth = self.weight[...].astype(jnp.float32) / scale[:, None]
            codes = pass_through(smooth, whole.astype(jnp.float32)).astype(x.dtype)
        return rounded(matmul(x, codes)) * scale


def quantize_rows(
    weight: Float[Array, "*shape D"],
) -> tuple[Int[Array, "*shape D"], Float[Array, "*shape"]]:
    """int8 codes, the nearest ones, and a scale for each row in the weight's dtype.

    The scale is rounded to its dtype first, and never to zero: float16 ends early.
    """
    kind = jnp.finfo(weight.dtype)
    wide = weight.astype(jnp.float32)
    least = max(float(kind.smallest_subnormal), float(jnp.finfo(jnp.float32).smallest_normal))
    scale = jnp.maximum(jnp.abs(wide).max(-1) / _LIMIT, least).astype(weight.dtype)
    # Of short floats many quotients lie halfway between two codes. XLA divides by a row's scale in
    # some programs and multiplies by its inverse in others; this fixes which code they get.
    inverse = rounded(1 / scale.astype(jnp.float32))
    codes = jnp.round(wide * inverse[..., None])
    return jnp.clip(codes, -_LIMIT - 1, _LIMIT).astype(jnp.int8), scale


def quantize_table(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 codes ``[V, D]`` and scales ``[V]`` in the weight's dtype, a part of the rows at a
    time."""
    codes, scale = np.empty(weight.shape, np.int8), np.empty(len(weight), weight.dtype)
    for start in range(0, len(weight), _ROWS):
        part = slice(start, start + _ROWS)
        codes[part], scale[part] = map(np.asarray, quantize_rows(jnp.asarray(weight[part])))
    return codes, scale


def _scaled(codes: Int[Array, "*shape D"], scale: Float[Array, "*shape"]) -> Array:
    values = codes.astype(jnp.float32) * scale.astype(jnp.float32)[..., None]
    return values.astype(scale.dtype)
