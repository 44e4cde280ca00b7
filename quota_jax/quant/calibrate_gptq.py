"""GPTQ block by block, on the weights as they are or as FlatQuant has transformed them.

A block reads the full-precision model's states, or with ``feed`` "quantized" (the authors' way)
those of the quantized blocks before it. Inside it linears follow each other as in the
authors' "true sequential" order: the second moments of a linear's inputs are taken with all linears
before it already quantized, activations and KV cache included where the configuration quantizes
them. A killed run goes on with the blocks that are missing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np

from quota_jax.errors import QuotaError
from quota_jax.quant.blocks import Block, forward
from quota_jax.quant.calibrate_flatquant import BlockReport, masked_error
from quota_jax.quant.calibration_data import CalibrationData
from quota_jax.quant.folding import find_sites
from quota_jax.quant.gptq import GptqOptions, gptq
from quota_jax.quant.moments import moments
from quota_jax.quant.rtn import quantize_params, stored_codes
from quota_jax.quant.streaming import Transform
from quota_jax.quantization import QuantizationConfig


def rounder(
    data: CalibrationData,
    quantization: QuantizationConfig,
    options: GptqOptions,
    report: Callable[[BlockReport], None] | None = None,
) -> Transform:
    """What ``write_blocks`` does to each block. The report compares with round-to-nearest."""

    def transform(name, block, stored, inputs, outputs):
        if not inputs:
            return stored
        masks = data.masks(block)
        params = dict(stored)
        for site in find_sites(stored, quantization):
            key = f"{site.linear}.weight"
            try:
                second = moments(
                    block, params, inputs, data.batches, masks, (site.linear,), quantization
                )[site.linear].second
                found = gptq(jnp.asarray(params.pop(key)), second, quantization.grid, options)
            except QuotaError as error:
                raise QuotaError(f"block {name!r}: {site.linear}: {error}") from None
            codes, scale, zeros = found
            if quantization.groups is None:
                scale = scale[:, 0]
            params |= stored_codes(site.linear, quantization.weight_bits, codes, scale, zeros)
        if report:
            first, last = (
                block_error(block, tried, inputs, outputs, data, quantization)
                for tried in (quantize_params(stored, quantization), params)
            )
            report(BlockReport(name=name, first_loss=first, last_loss=last))
        return params

    return transform


def block_error(
    block: Block,
    params: Mapping[str, np.ndarray],
    inputs: list[np.ndarray],
    outputs: list[np.ndarray],
    data: CalibrationData,
    quantization: QuantizationConfig,
) -> float:
    """Mean squared error of a quantized block's output on these inputs, over real rows."""
    errors = [
        masked_error(
            forward(params, x, batch, block=block, quantization=quantization), jnp.asarray(y), mask
        )
        for x, y, batch, mask in zip(inputs, outputs, data.batches, data.masks(block), strict=True)
    ]
    return float(np.mean(errors))


def after(first: Transform, second: Transform) -> Transform:
    """Two transforms of a block in turn, both on its full-precision inputs and outputs."""

    def transform(name, block, stored, inputs, outputs):
        return second(name, block, first(name, block, stored, inputs, outputs), inputs, outputs)

    return transform
