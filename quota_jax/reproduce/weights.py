"""Quantized weights of a study: what a row names, and how its checkpoint is made."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quota_jax.co_calibration import FirstRound
from quota_jax.errors import QuotaError
from quota_jax.pipeline import PipelineOptions, build_variant
from quota_jax.quant.calibrate import DATA_METHODS, calibrate
from quota_jax.quant.calibration_data import Sample
from quota_jax.quant.grace import GraceOptions, finetune
from quota_jax.quantization import MODULES, QuantizationConfig

GRACE = GraceOptions(learning_rate=1e-4)
"""A small model learns with more than the 1e-5 of 7B models."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """Quantized weights: how they are calibrated, and on which execution.

    variant: None calibrates on all tokens; else a variant of `pipeline` whose calibration sees a
    pruned model with ``keep`` of the visual tokens. seed: of the rotations, and of the draw of the
    samples. outliers: factor of the channels that are planted in the source first
    (`testbed.outliers`), or None.
    """

    method: str
    bits: str
    modules: tuple[str, ...] = MODULES
    seed: int = 0
    variant: str | None = None
    keep: float | None = None
    outliers: float | None = None

    @property
    def name(self) -> str:
        parts = [self.method.replace("+", "-"), self.bits]
        if self.modules != MODULES:
            parts.append("-".join(self.modules))
        if self.variant:
            parts.append(f"{self.variant}-{self.keep:g}")
        if self.outliers is not None:
            parts.append(f"outliers-{self.outliers:g}")
        return "_".join([*parts, f"seed{self.seed}"])

    @property
    def begins_from(self) -> Weights | None:
        """The weights that are calibrated first on the way to these, on all tokens."""
        if self.variant != "co-calibrated":
            return None
        return dataclasses.replace(self, variant=None, keep=None)

    @property
    def quantization(self) -> QuantizationConfig:
        return QuantizationConfig.parse(
            self.bits,
            method=self.method,
            modules=self.modules,
            symmetric=self.method != "luq",  # as in ``quota-jax calibrate``
        )


def make_weights(
    weights: Weights,
    source: Path,
    out: Path,
    *,
    samples: Sequence[Sample],
    pool: Sequence[Sample],
    steps: int | None = None,
    first: FirstRound | None = None,
) -> None:
    """Writes the checkpoint ``out`` from the full-precision checkpoint ``source``.

    samples: what calibration sees. pool: what GRACE trains on. steps: of FlatQuant per block, None
    takes the default. first: of co-calibrated weights.

    Raises:
      QuotaError: anything that calibration refuses.
    """
    method, quantization = weights.method, weights.quantization
    if method == "grace":
        if weights.variant is not None:
            raise QuotaError(f"variant {weights.variant!r} calibrates; method 'grace' trains")
        options = dataclasses.replace(GRACE, seed=weights.seed)
        finetune(source, out, quantization, pool, options=options)
        return
    learning: Any = DATA_METHODS[method]() if method in DATA_METHODS else None
    if method == "flatquant":
        changes = {} if steps is None else {"steps": steps}
        learning = dataclasses.replace(learning, seed=weights.seed, **changes)
    if weights.variant is not None:
        assert weights.keep is not None
        plan = PipelineOptions(keep=weights.keep, quantization=quantization, options=learning)
        build_variant(weights.variant, source, out, plan, samples=samples, first=first)
        return
    calibrate(
        source,
        out,
        quantization,
        samples=samples if method in DATA_METHODS else (),
        options=learning,
    )
