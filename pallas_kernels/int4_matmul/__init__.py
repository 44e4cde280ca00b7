"""Packed int4 weights times int8-stored activations."""

from pallas_kernels.int4_matmul.api import int4_matmul
from pallas_kernels.int4_matmul.reference import int4_matmul_reference, integer_matmul

__all__ = ["int4_matmul", "int4_matmul_reference", "integer_matmul"]
