"""LUQ block by block: one pass in full precision for the entropies, then GPTQ with each decoder
layer's own bits.

A killed run computes the entropies again (the same ones, on the same machine) and goes on with the
blocks that are missing. Vision tower and projector, if quantized, have 4 bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from quota_jax.checkpoint import Checkpoint
from quota_jax.errors import QuotaError
from quota_jax.quant.calibrate_flatquant import BlockReport
from quota_jax.quant.calibrate_gptq import rounder
from quota_jax.quant.calibration_data import CalibrationData
from quota_jax.quant.luq import LuqOptions, allocate, entropy
from quota_jax.quant.streaming import Transform, outputs
from quota_jax.quantization import QuantizationConfig


def layer_entropies(
    checkpoint: Checkpoint,
    data: CalibrationData,
    options: LuqOptions,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[float]:
    """Entropy in bits of each decoder layer's output over the samples' real tokens."""
    found: list[float] = []
    total = len(checkpoint.block_names)
    for place, (name, block, states) in enumerate(outputs(checkpoint, data.batches), start=1):
        if block is not None and block.kind == "decoder":
            real = [
                states_of_batch[np.asarray(mask)]
                for states_of_batch, mask in zip(states, data.masks(block), strict=True)
            ]
            try:
                found.append(entropy(real, options.bins))
            except QuotaError as error:
                raise QuotaError(f"block {name!r}: {error}") from None
        if progress:
            progress(f"entropy {name}", place, total)
    return found


def with_layer_bits(
    quantization: QuantizationConfig, entropies: list[float], options: LuqOptions
) -> QuantizationConfig:
    """The configuration that LUQ writes: it holds the bits of each decoder layer."""
    bits = allocate(entropies, options.mean_bits, options.low_bits)
    return dataclasses.replace(quantization, layer_bits=bits)


def layer_rounder(
    data: CalibrationData,
    quantization: QuantizationConfig,
    options: LuqOptions,
    report: Callable[[BlockReport], None] | None = None,
) -> Transform:
    """What ``write_blocks`` does to each block: GPTQ on the block's own grid."""

    def transform(name, block, stored, inputs, outputs):
        one = rounder(data, quantization.at(name), options.gptq, report)
        return one(name, block, stored, inputs, outputs)

    return transform
