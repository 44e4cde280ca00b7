"""Random models from a tiny folder's config.json, drawn in numpy: nothing is compiled for it."""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from quota_jax.config import ModelConfig, config_from_hf
from quota_jax.models.params import abstract_params, build_model
from quota_jax.models.vision_language import VisionLanguageModel
from quota_jax.processing import Processor
from quota_jax.quantization import QuantizationConfig


def read_tiny(folder: Path) -> tuple[ModelConfig, Processor]:
    """Configuration and processor of a Hugging Face folder."""
    config = config_from_hf(json.loads((folder / "config.json").read_text()))
    return config, Processor.from_folder(folder, config)


def random_model(
    config: ModelConfig, seed: int, quantization: QuantizationConfig | None = None
) -> VisionLanguageModel:
    """Matrices N(0, 1/fan_in), norm scales 1, biases 0; a quantized model is simulated."""
    rng, params = np.random.default_rng(seed), {}
    for name, spec in abstract_params(config).items():
        leaf = name.rpartition(".")[2]
        value = np.full(spec.shape, float(leaf == "scale"), np.float32)
        if leaf not in ("scale", "bias"):
            width = np.prod(spec.shape[1:]) if "patch_embed" in name else spec.shape[-1]
            value = rng.standard_normal(spec.shape).astype(np.float32) / np.float32(width**0.5)
        params[name] = jnp.asarray(value)
    return build_model(config, quantization, params)
