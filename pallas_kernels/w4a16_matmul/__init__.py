"""Float activations times packed 4-bit weights with scales (W4A16)."""

from pallas_kernels.w4a16_matmul.api import w4a16_matmul
from pallas_kernels.w4a16_matmul.reference import dequantize_groups, w4a16_matmul_reference

__all__ = ["dequantize_groups", "w4a16_matmul", "w4a16_matmul_reference"]
