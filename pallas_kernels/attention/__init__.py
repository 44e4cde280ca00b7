"""Attention of whole sequences: prefill and vision towers."""

from pallas_kernels.attention.api import operand_dtype, sequence_attention
from pallas_kernels.attention.reference import BLOCK, causal_attention

__all__ = ["BLOCK", "causal_attention", "operand_dtype", "sequence_attention"]
