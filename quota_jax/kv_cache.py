"""Key/value caches: dense, 8 bit or 4 bit behind one interface.

Layers that saw the same tokens share a group: between two pruning points every layer holds the same
number of tokens, so a group is one stack ``[L, B, K, S, ...]`` with one length per sample.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.accelerator import find_gpu, on_platform
from pallas_kernels.kv4_attention import (
    BLOCK,
    decode_attention,
    dense_decode_attention,
    dequantize,
    kv4_attention,
)
from pallas_kernels.packing import pack_int4, unpack_uint4
from quota_jax.nn.rope import rotate
from quota_jax.quant.cache_quantizers import dequantize_channels
from quota_jax.quant.quantizers import quantize_kv


def round_up(count: int) -> int:
    """The next multiple of the attention block: every cache capacity is one."""
    return -(-count // BLOCK) * BLOCK


class ChannelKeys(NamedTuple):
    """How to read keys that are stored by channel before rotation: smallest value and step of each
    channel of a layer, cosine and sine of each cached token."""

    low: Float[Array, "K H"]
    step: Float[Array, "K H"]
    cos: Float[Array, "B S H/2"]
    sin: Float[Array, "B S H/2"]

    def read(
        self, codes: Array, cos: Float[Array, "B s H/2"], sin: Float[Array, "B s H/2"], bits: int
    ) -> Float[Array, "B K s H"]:
        """Rotated keys of the tokens that ``cos`` and ``sin`` belong to, float32."""
        grid = self.low[:, None], self.step[:, None]
        keys = decode_channels((codes,), grid, bits)
        return rotate(keys.swapaxes(1, 2), cos, sin).swapaxes(1, 2)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("key", "value", "lengths", "shift", "positions"),
    meta_fields=("bits",),
)
@dataclass(frozen=True, kw_only=True)
class CacheGroup:
    """Keys and values of a run of layers.

    ``key`` and ``value`` are tuples of arrays: ``(dense,)`` with ``[L, B, K, S, H]`` for 16 bits,
    else ``(codes, scale, zero)``, codes packed two to a byte at 4 bits. ``lengths[b]`` tokens are
    filled. ``shift[b]`` is subtracted from the position of a new token (not 0 where positions were
    renumbered).

    Keys by channel (KVQuant) are ``(codes,)``: their grid is the model's. They are not rotated yet,
    so ``positions`` holds the rotary position of each token; else it is None.
    """

    key: tuple[Array, ...]
    value: tuple[Array, ...]
    lengths: Int[Array, " B"]
    shift: Int[Array, " B"]
    positions: Int[Array, "B S"] | Int[Array, "B S 3"] | None = None
    bits: int

    @property
    def num_layers(self) -> int:
        return self.key[0].shape[0]

    @property
    def capacity(self) -> int:
        return self.key[0].shape[3]

    @property
    def nbytes(self) -> int:
        """Bytes of the key and value arrays (uint8 codes: two values to a byte at 4 bits)."""
        return sum(array.nbytes for array in (*self.key, *self.value))

    def append(self, layer: Array, key: tuple[Array, ...], value: tuple[Array, ...]) -> CacheGroup:
        """Writes what is stored of one new token per sample, ``[B, K, ...]`` each, at ``lengths``;
        ``lengths`` itself is advanced by ``grow``."""
        samples = jnp.arange(key[0].shape[0])

        def write(arrays, new):
            return tuple(
                array.at[layer, samples, :, self.lengths].set(part)
                for array, part in zip(arrays, new, strict=True)
            )

        return dataclasses.replace(self, key=write(self.key, key), value=write(self.value, value))

    def place(self, positions: Int[Array, " B"] | Int[Array, "B 3"]) -> CacheGroup:
        """Writes the rotary positions of the tokens that ``append`` writes, where they are kept."""
        if self.positions is None:
            return self
        samples = jnp.arange(positions.shape[0])
        placed = self.positions.at[samples, self.lengths].set(positions)
        return dataclasses.replace(self, positions=placed)

    def attend(
        self,
        layer: Array,
        query: Float[Array, "B N H"],
        lengths: Array,
        sm_scale: float,
        channels: ChannelKeys | None = None,
    ) -> Float[Array, "B N H"]:
        """Attention of one query per sample over the first ``lengths`` tokens; float32.

        Keys by channel need ``channels``. No kernel reads them, so plain jnp does, on any device.
        """
        if (channels is None) != (self.positions is None):
            raise ValueError("channels belong to a cache that keeps positions, and only to it")
        if self.bits == 4 and channels is None:
            (key, key_scale, key_zero), (value, value_scale, value_zero) = self.key, self.value
            return kv4_attention(
                query,
                key,
                value,
                key_scale,
                value_scale,
                key_zero,
                value_zero,
                lengths,
                layer,
                sm_scale=sm_scale,
            )

        def blockwise(key, value, query, lengths, layer, channels):
            def cut(arrays, start):
                parts = []
                for array in arrays:
                    sizes = [1, *array.shape[1:3], BLOCK, *array.shape[4:]]
                    begin = [layer, 0, 0, start, 0][: array.ndim]
                    parts.append(jax.lax.dynamic_slice(array, begin, sizes)[0])
                return tuple(parts)

            def keys(start):
                if channels is None:
                    return decode(cut(key, start), self.bits)
                cos, sin = (
                    jax.lax.dynamic_slice_in_dim(angles, start, BLOCK, 1)
                    for angles in (channels.cos, channels.sin)
                )
                return channels.read(cut(key, start)[0], cos, sin, self.bits)

            def values(start):
                return decode(cut(value, start), self.bits)

            return decode_attention(query, keys, values, self.capacity, lengths, sm_scale=sm_scale)

        def at_once(key, value, query, lengths, layer, channels):
            key, value = (
                tuple(jax.lax.dynamic_index_in_dim(a, layer, keepdims=False) for a in arrays)
                for arrays in (key, value)
            )
            values = decode(value, self.bits)
            if channels is None:
                keys = decode(key, self.bits)
            else:
                keys = channels.read(key[0], channels.cos, channels.sin, self.bits)
            dtype = self.key[0].dtype if self.bits == 16 else jnp.float32
            return dense_decode_attention(
                query, keys.astype(dtype), values.astype(dtype), lengths, sm_scale=sm_scale
            )

        arrays = self.key, self.value, query, lengths, jnp.asarray(layer, jnp.int32), channels
        attend = on_platform("cuda", at_once, blockwise) if find_gpu() else blockwise
        return attend(*arrays)


def encode(
    x: Float[Array, "*rows H"], bits: int, dtype, clip: Float[Array, " 2"] | None = None
) -> tuple[tuple[Array, ...], Float[Array, "*rows H"]]:
    """What the cache stores for keys or values, by token, and what attention reads back of it in
    float32; ``clip``: see ``quantize_kv``."""
    if bits == 16:
        stored = x.astype(dtype)
        return (stored,), stored.astype(jnp.float32)
    codes, scale, zero = quantize_kv(x, bits, clip)
    # Read from the codes before they are packed: unpacking them again would be work of its own.
    read = _values(codes, scale, zero)
    return (pack_int4(codes) if bits == 4 else codes, scale, zero), read


def decode(stored: tuple[Array, ...], bits: int) -> Float[Array, "*rows H"]:
    """What attention reads back, float32."""
    if bits == 16:
        return stored[0].astype(jnp.float32)
    codes, scale, zero = stored
    if bits == 4:
        return dequantize(codes, scale, zero)
    return _values(codes, scale, zero)


def _values(codes: Array, scale: Array, zero: Array) -> Array:
    steps = codes.astype(jnp.int32) - zero.astype(jnp.int32)[..., None]
    return steps.astype(jnp.float32) * scale.astype(jnp.float32)[..., None]


def decode_channels(
    stored: tuple[Array, ...], grid: tuple[Array, Array], bits: int
) -> Float[Array, "*rows H"]:
    """Keys by channel before their rotation, float32; ``grid`` broadcasts against the codes."""
    codes = unpack_uint4(stored[0]) if bits == 4 else stored[0]
    return dequantize_channels(codes, grid)


def grow(group: CacheGroup, active: Array) -> CacheGroup:
    """Advances the lengths of the active samples by the token just appended."""
    return dataclasses.replace(group, lengths=group.lengths + active.astype(jnp.int32))


def with_room(stored: tuple[Array, ...], capacity: int) -> tuple[Array, ...]:
    """Prefill arrays ``[L, B, S, K, ...]`` -> cache arrays ``[L, B, K, capacity, ...]``."""

    def place(array):
        array = jnp.swapaxes(array, 2, 3)
        widths = [(0, 0)] * array.ndim
        widths[3] = (0, capacity - array.shape[3])
        return jnp.pad(array, widths)

    return tuple(place(array) for array in stored)
