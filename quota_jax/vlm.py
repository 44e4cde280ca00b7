"""A loaded checkpoint: model, processor, recipe."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quota_jax.checkpoint import open_checkpoint
from quota_jax.config import ModelConfig
from quota_jax.models.vision_language import VisionLanguageModel
from quota_jax.processing import Processor
from quota_jax.quantization import QuantizationConfig
from quota_jax.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Vlm:
    """Everything needed to answer questions about pictures."""

    config: ModelConfig
    quantization: QuantizationConfig
    recipe: Recipe
    model: VisionLanguageModel
    processor: Processor


def load(path: str | Path, dtype: Any = None) -> Vlm:
    """Loads a quota_jax checkpoint. ``dtype`` None keeps the stored dtype. Errors are
    ``QuotaError``."""
    checkpoint = open_checkpoint(path)
    return Vlm(
        config=checkpoint.config,
        quantization=checkpoint.quantization,
        recipe=checkpoint.recipe,
        model=checkpoint.load_model(dtype),
        processor=Processor.from_folder(checkpoint.assets_dir, checkpoint.config),
    )
