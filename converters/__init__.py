"""Hugging Face checkpoints in and out: `convert`, `export_*`, `verify`."""

from converters.convert import convert
from converters.export_hf import export_hf
from converters.export_quantized import export_compressed_tensors, export_native
from converters.verify import Check, VerifyReport, verify

__all__ = [
    "Check",
    "VerifyReport",
    "convert",
    "export_compressed_tensors",
    "export_hf",
    "export_native",
    "verify",
]
