"""SmoothQuant (Xiao et al., ICML 2023, arXiv 2211.10438): diagonals only, behind the norms.

Each input channel of q/k/v, of gate/up and of Qwen's merger is divided by ``s = max|x|^alpha /
max|w|^(1 - alpha)``, which the norm before absorbs, and the weight's column multiplied by it. The
model then runs as after round-to-nearest. Kept as the control that fails at four bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp

from quota_jax.errors import QuotaError
from quota_jax.quant.blocks import largest_inputs
from quota_jax.quant.calibration_data import CalibrationData
from quota_jax.quant.folding import diagonal_of, find_sites, fold_exactly
from quota_jax.quant.streaming import Transform
from quota_jax.quantization import QuantizationConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class SmoothQuantOptions:
    """alpha: 0 leaves all outliers to the weights' scales, 1 moves them into the weights."""

    alpha: float = 0.5
    batch_size: int = 4

    def __post_init__(self):
        if not 0 <= self.alpha <= 1:
            raise QuotaError(f"alpha must lie in [0, 1], got {self.alpha}")
        if self.batch_size < 1:
            raise QuotaError(f"batch_size must be at least 1, got {self.batch_size}")


def smoother(
    data: CalibrationData, quantization: QuantizationConfig, options: SmoothQuantOptions
) -> Transform:
    """What ``write_blocks`` does to each block."""

    def transform(name, block, stored, inputs, outputs):
        sites = tuple(site for site in find_sites(stored, quantization) if site.norm)
        params = {key: jnp.asarray(value, jnp.float32) for key, value in stored.items()}
        linears = tuple(site.linear for site in sites)
        largest = largest_inputs(block, params, inputs, data.batches, data.masks(block), linears)
        learned = {
            site.linear: {
                "diagonal": diagonal_of(
                    stored[f"{site.linear}.weight"],
                    largest[site.linear],
                    stored[f"{site.norm}.scale"].shape[0],
                    options.alpha,
                )
            }
            for site in sites
            if site.linear in largest
        }
        return fold_exactly(stored, tuple(s for s in sites if s.linear in learned), learned)

    return transform
