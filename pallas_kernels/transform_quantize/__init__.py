"""What stands between two matmuls of 4-bit layers: norm or gate, transform, quantization."""

from pallas_kernels.transform_quantize.api import Quantized, transform_quantize
from pallas_kernels.transform_quantize.reference import transform_quantize_reference

__all__ = ["Quantized", "transform_quantize", "transform_quantize_reference"]
