"""Key/value caches: dense, 8 bit or 4 bit behind one interface.

Layers that saw the same tokens share a group: between two pruning points every layer holds the same
number of tokens, so a group is one stack ``[L, B, K, S, ...]`` with one length per sample.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

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
from pallas_kernels.packing import pack_int4
from quota_jax.quant.quantizers import quantize_kv


def round_up(count: int) -> int:
    """The next multiple of the attention block: every cache capacity is one."""
    return -(-count // BLOCK) * BLOCK


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("key", "value", "lengths", "shift"),
    meta_fields=("bits",),
)
@dataclass(frozen=True, kw_only=True)
class CacheGroup:
    """Keys and values of a run of layers.

    ``key`` and ``value`` are tuples of arrays: ``(dense,)`` with ``[L, B, K, S, H]`` for 16 bits,
    else ``(codes, scale, zero)``, codes packed two to a byte at 4 bits. ``lengths[b]`` tokens are
    filled. ``shift[b]`` is subtracted from the position of a new token (not 0 where positions were
    renumbered).
    """

    key: tuple[Array, ...]
    value: tuple[Array, ...]
    lengths: Int[Array, " B"]
    shift: Int[Array, " B"]
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

    def append(
        self, layer: Array, key: Float[Array, "B K H"], value: Float[Array, "B K H"]
    ) -> CacheGroup:
        """Writes one new token per sample at ``lengths``; ``lengths`` itself is advanced by
        ``grow``."""
        samples = jnp.arange(key.shape[0])

        def write(arrays, new):
            encoded = encode(new, self.bits, self.key[0].dtype)
            return tuple(
                array.at[layer, samples, :, self.lengths].set(part)
                for array, part in zip(arrays, encoded, strict=True)
            )

        return dataclasses.replace(self, key=write(self.key, key), value=write(self.value, value))

    def attend(
        self, layer: Array, query: Float[Array, "B N H"], lengths: Array, sm_scale: float
    ) -> Float[Array, "B N H"]:
        """Attention of one query per sample over the first ``lengths`` tokens; float32."""
        if self.bits == 4:
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

        def blockwise(key, value, query, lengths, layer):
            def reader(arrays):
                def block(start):
                    parts = []
                    for array in arrays:
                        sizes = [1, *array.shape[1:3], BLOCK, *array.shape[4:]]
                        begin = [layer, 0, 0, start, 0][: array.ndim]
                        parts.append(jax.lax.dynamic_slice(array, begin, sizes)[0])
                    return decode(tuple(parts), self.bits)

                return block

            return decode_attention(
                query, reader(key), reader(value), self.capacity, lengths, sm_scale=sm_scale
            )

        def at_once(key, value, query, lengths, layer):
            keys, values = (
                decode(
                    tuple(jax.lax.dynamic_index_in_dim(a, layer, keepdims=False) for a in arrays),
                    self.bits,
                )
                for arrays in (key, value)
            )
            dtype = self.key[0].dtype if self.bits == 16 else jnp.float32
            return dense_decode_attention(
                query, keys.astype(dtype), values.astype(dtype), lengths, sm_scale=sm_scale
            )

        arrays = self.key, self.value, query, lengths, jnp.asarray(layer, jnp.int32)
        attend = on_platform("cuda", at_once, blockwise) if find_gpu() else blockwise
        return attend(*arrays)


def encode(x: Float[Array, "*rows H"], bits: int, dtype) -> tuple[Array, ...]:
    """What the cache stores for keys or values."""
    if bits == 16:
        return (x.astype(dtype),)
    codes, scale, zero = quantize_kv(x, bits)
    return (pack_int4(codes) if bits == 4 else codes, scale, zero)


def decode(stored: tuple[Array, ...], bits: int) -> Float[Array, "*rows H"]:
    """What attention reads back, float32."""
    if bits == 16:
        return stored[0].astype(jnp.float32)
    codes, scale, zero = stored
    if bits == 4:
        return dequantize(codes, scale, zero)
    steps = codes.astype(jnp.int32) - zero.astype(jnp.int32)[..., None]
    return steps.astype(jnp.float32) * scale.astype(jnp.float32)[..., None]


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
