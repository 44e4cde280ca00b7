"""Queries, keys and values of a prompt's tokens: rotated, packed for the cache, and read back."""

from pallas_kernels.kv4_encode.api import Encoded, kv4_encode
from pallas_kernels.kv4_encode.reference import kv4_encode_reference

__all__ = ["Encoded", "kv4_encode", "kv4_encode_reference"]
