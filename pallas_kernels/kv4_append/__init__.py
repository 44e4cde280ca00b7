"""Rotation of a new token's queries and keys, and its keys and values packed into the cache."""

from pallas_kernels.kv4_append.api import Appended, kv4_append
from pallas_kernels.kv4_append.reference import kv4_append_reference

__all__ = ["Appended", "kv4_append", "kv4_append_reference"]
