"""Decode attention, with keys and values dense or packed to 4 bits."""

from pallas_kernels.attention.reference import BLOCK
from pallas_kernels.kv4_attention.api import kv4_attention
from pallas_kernels.kv4_attention.reference import (
    decode_attention,
    dense_decode_attention,
    dequantize,
)

__all__ = ["BLOCK", "decode_attention", "dense_decode_attention", "dequantize", "kv4_attention"]
