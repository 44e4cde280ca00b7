"""The nibble layout: the only place that shifts bits.

Byte ``j`` of ``uint8 [..., K/2]`` holds element ``2j`` in its low and ``2j + 1`` in its high
nibble. Signed codes are two's complement in [-8, 7] (the order of a bitcast to ``jnp.int4``),
unsigned ones lie in [0, 15]. compressed-tensors stores signed codes with an offset of 8: XOR 0x88
converts.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, Int32, UInt8


def pack_int4(codes: Int[Array, "*rows K"]) -> UInt8[Array, "*rows K/2"]:
    """Packs codes in [-8, 15]; only the low four bits are kept. Odd ``K`` is refused."""
    if codes.shape[-1] % 2:
        raise ValueError(f"cannot pack an odd number of 4-bit values: K = {codes.shape[-1]}")
    nibbles = codes.astype(jnp.uint8) & 0x0F
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


def unpack_uint4(packed: UInt8[Array, "*rows bytes"]) -> UInt8[Array, "*rows K"]:
    """Unsigned codes in [0, 15]."""
    pair = jnp.stack([packed & 0x0F, packed >> 4], axis=-1)
    return pair.reshape(*packed.shape[:-1], 2 * packed.shape[-1])


def unpack_int4(packed: UInt8[Array, "*rows bytes"]) -> Int[Array, "*rows K"]:
    """Signed codes in [-8, 7] as int8."""
    return ((unpack_uint4(packed) ^ 8).astype(jnp.int8) - 8).astype(jnp.int8)


def as_words(array: Int[Array, "*rows bytes"]) -> Int32[Array, "*rows words"]:
    """Four bytes to an int32, the first one lowest: in packed codes element ``8j + i`` is nibble
    ``i`` of word ``j``, bits ``4i`` to ``4i + 3``. A view (measured: 0 bytes of temporaries)."""
    grouped = array.reshape(*array.shape[:-1], array.shape[-1] // 4, 4)
    return lax.bitcast_convert_type(grouped, jnp.int32)


def nibble_at(words: Int32[Array, "*shape"], nibble: int, place: int) -> Int32[Array, "*shape"]:
    """A nibble of each word moved to bit ``place``, the rest cleared."""
    by = place - 4 * nibble
    count = jnp.full(words.shape, abs(by), jnp.int32)
    moved = lax.shift_left(words, count) if by >= 0 else lax.shift_right_logical(words, count)
    return moved & (15 << place)
