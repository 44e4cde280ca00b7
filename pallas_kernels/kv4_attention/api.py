"""Public entry of decode attention over a 4-bit key/value cache."""

from __future__ import annotations

import jax
from jaxtyping import Array, Float, Int, UInt8

from pallas_kernels.dispatch import choose
from pallas_kernels.kv4_attention.reference import BLOCK, decode_attention, dequantize


def kv4_attention(
    query: Float[Array, "B N H"],
    key: UInt8[Array, "L B K S bytes"],
    value: UInt8[Array, "L B K S bytes"],
    key_scale: Float[Array, "L B K S"],
    value_scale: Float[Array, "L B K S"],
    key_zero: UInt8[Array, "L B K S"],
    value_zero: UInt8[Array, "L B K S"],
    lengths: Int[Array, " B"],
    layer: Array | int,
    *,
    sm_scale: float,
    impl: str = "auto",
) -> Float[Array, "B N H"]:
    """Attention of one query per sample over packed keys and values of one layer of the stack.

    Asymmetric 4-bit per token per head: ``x = scale * (code - zero)``. Rows at or past ``lengths``
    are ignored. Grouped queries: head ``n`` reads key head ``n // (N / K)``. float32 softmax and
    output.
    """
    choose("kv4_attention", ("xla",), impl)

    def reader(packed, scale, zero):
        def block(start):
            def cut(array):
                sizes = list(array.shape)
                sizes[0], sizes[3] = 1, BLOCK
                begin = [layer, 0, 0, start, 0][: array.ndim]
                return jax.lax.dynamic_slice(array, begin, sizes)[0]

            return dequantize(cut(packed), cut(scale), cut(zero))

        return block

    return decode_attention(
        query,
        reader(key, key_scale, key_zero),
        reader(value, value_scale, value_zero),
        key.shape[3],
        lengths,
        sm_scale=sm_scale,
    )
