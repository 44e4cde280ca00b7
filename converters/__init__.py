"""Hugging Face checkpoints in and out: `convert`, `export_hf`, `verify`."""

from converters.convert import convert
from converters.export_hf import export_hf
from converters.verify import Check, VerifyReport, verify

__all__ = ["Check", "VerifyReport", "convert", "export_hf", "verify"]
