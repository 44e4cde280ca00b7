"""Rows that several tables share: full precision, FlatQuant, and the named variants."""

from __future__ import annotations

from quota_jax.config import ModelConfig
from quota_jax.errors import QuotaError
from quota_jax.pipeline import VARIANTS, PipelineOptions, equal_recipe, selector
from quota_jax.quantization import QuantizationConfig
from quota_jax.recipe import Recipe
from quota_jax.reproduce.study import Derived, Row
from quota_jax.reproduce.weights import Weights

FULL = Row(label="full precision")
LOW_BIT = ("W4A4KV4", "W4A8KV4")
KEEP = 0.3
"""The paper's final keep ratio."""


def flatquant(bits: str, seed: int = 0, **more) -> Weights:
    return Weights(method="flatquant", bits=bits, seed=seed, **more)


def equal(config: ModelConfig, keep: float, bits: str | None = None) -> Recipe:
    """Equal drops, scored without the residual: what stage-wise variants do."""
    chosen = selector(
        QuantizationConfig.parse(bits) if bits else QuantizationConfig.none, residual=False
    )
    return equal_recipe(config, PipelineOptions(keep=keep), chosen)


def variant_row(
    name: str, config: ModelConfig, bits: str, *, keep: float = KEEP, seed: int = 0
) -> Row:
    """A variant of `pipeline` by name, calibrated with FlatQuant where it quantizes; ``bits`` and
    ``keep`` do not matter to variants that do not quantize or prune.

    Raises:
      QuotaError: unknown variant.
    """
    if name not in VARIANTS:
        raise QuotaError(f"no variant {name!r}; known: {', '.join(VARIANTS)}")
    variant, plain = VARIANTS[name], flatquant(bits, seed)
    if name == "full-precision":
        return FULL
    parts = [bits] * variant.quantized + [name] + [f"{100 * keep:g} %"] * variant.pruned
    label = " ".join(parts)
    if not variant.quantized:
        return Row(label=label, recipe=equal(config, keep))
    if not variant.pruned:
        return Row(label=label, weights=plain)
    if variant.graph != "whole":  # the recipe stands in the checkpoint
        return Row(label=label, weights=flatquant(bits, seed, variant=name, keep=keep))
    recipe = Derived(keep=keep) if variant.residual else equal(config, keep, bits)
    return Row(label=label, weights=plain, recipe=recipe)
