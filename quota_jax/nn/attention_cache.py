"""How the keys and values of a stack of layers are stored in the cache and read back.

Two ways of storing keys in few bits:

* by "token": after rotation, each key of a head with a scale and a zero point of its own. With
  FlatQuant's P_k each rotated key is multiplied by ``key_transform`` before, and each rotated query
  by its inverse transpose ``query_transform``, so that their products stay.
* by "channel": before rotation, with constant ranges of each channel (see
  ``quota_jax.quant.cache_quantizers``). A key is rotated when it is read; positions of tokens are
  kept beside them.

Values are stored by token either way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pallas_kernels.packing import pack_int4
from pallas_kernels.stable import matmul, rounded
from quota_jax.errors import QuotaError
from quota_jax.kv_cache import ChannelKeys, decode_channels, encode
from quota_jax.nn.linear import take
from quota_jax.nn.rope import rotate
from quota_jax.quant.cache_quantizers import (
    channel_grid,
    quantize_channels,
    smooth_channels,
    smooth_tokens,
)
from quota_jax.quant.straight_through import pass_through
from quota_jax.quantization import QuantizationConfig

Angles = tuple[Array, Array]
Stored = tuple[tuple[Array, ...], tuple[Array, ...]]


class Cached(NamedTuple):
    """Rotated queries, keys and values as attention reads them, and what the cache stores."""

    query: Array
    key: Array
    value: Array
    stored: Stored


class CacheQuantizer(nnx.Module):
    """Holds, each optional: ``query_transform`` and ``key_transform`` ``[L, H, H]`` (P_k), ``clip``
    ``[L, 2, 2]`` (of keys and of values: factors of the largest and the smallest value) and
    ``key_range`` ``[L, 2, K, H]`` (largest and smallest value of each channel).

    Raises:
      QuotaError: keys are stored by channel and nobody has measured their ranges.
    """

    query_transform: nnx.Param
    key_transform: nnx.Param
    clip: nnx.Param
    key_range: nnx.Param

    def __init__(self, params: Mapping[str, Any], quantization: QuantizationConfig):
        for name, value in params.items():
            setattr(self, name, nnx.Param(value))
        self.names = tuple(params)
        self.bits = quantization.kv_bits
        self.by_channel = quantization.key_quantization == "channel"
        if self.by_channel and "key_range" not in params:
            raise QuotaError(
                "keys by channel need their ranges (decoder.layers.cache.key_range), which "
                "calibration measures"
            )

    def __call__(
        self,
        heads: tuple[Float[Array, "*rows N H"], Float[Array, "*rows K H"], Array],
        angles: Angles,
        layer: Array,
        dtype: Any,
    ) -> Cached:
        """Queries, keys and values before rotation -> what attention reads and the cache stores.

        Args:
          angles: cosine and sine of each row. dtype: of a cache that is not quantized.
        """
        query, key, value = heads
        clips = take(self.clip, layer) if self._clips else (None, None)
        query = self._transformed(rotate(query, *angles), "query_transform", layer)
        values, read = encode(value, self.bits, dtype, clips[1])
        value = value if self.bits == 16 else smooth_tokens(value, self.bits, clips[1])
        if self.by_channel:
            grid = self.grid(layer)
            codes = quantize_channels(key, grid, self.bits)
            keys: tuple[Array, ...] = (pack_int4(codes) if self.bits == 4 else codes,)
            found = decode_channels(keys, grid, self.bits)
            key = rotate(pass_through(smooth_channels(key, grid, self.bits), found), *angles)
        else:
            key = self._transformed(rotate(key, *angles), "key_transform", layer)
            keys, key_read = encode(key, self.bits, dtype, clips[0])
            smooth = key if self.bits == 16 else smooth_tokens(key, self.bits, clips[0])
            key = pass_through(smooth, key_read)
        return Cached(query, key, pass_through(value, read), (keys, values))

    def grid(self, layer: Array) -> tuple[Float[Array, "K H"], Float[Array, "K H"]]:
        """Smallest value and step of each channel of the keys of a layer."""
        clip = take(self.clip, layer)[0] if self._clips else None
        return channel_grid(take(self.key_range, layer), self.bits, clip)

    def reading(self, layer: Array, angles: Angles | None) -> ChannelKeys | None:
        """What a cache needs to read keys by channel: the grid of a layer and the angles of all its
        tokens; None where keys are stored as attention reads them."""
        if angles is None:
            return None
        return ChannelKeys(*self.grid(layer), *angles)

    @property
    def _clips(self) -> bool:
        return "clip" in self.names and self.bits < 16

    def _transformed(self, x: Float[Array, "*rows N H"], name: str, layer: Array) -> Array:
        if name not in self.names:
            return x
        rows = x.astype(jnp.float32).reshape(-1, x.shape[-1])
        out = rounded(matmul(rows, take(getattr(self, name), layer).T))
        return out.reshape(x.shape).astype(x.dtype)
