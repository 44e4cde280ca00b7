"""Model configurations: frozen, hashable, static under ``jit``.

``config_from_hf`` reads a Hugging Face ``config.json`` (old or new spelling); ``to_hf`` writes the
new one. Fields that mirror a Hugging Face field keep its meaning.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quota_jax.config.fields import build
from quota_jax.config.llava import LLAVA_PRESETS, LlavaConfig, VisionConfig
from quota_jax.config.qwen2_5_vl import QWEN_PRESETS, QwenVisionConfig, QwenVlConfig
from quota_jax.config.text import RopeScaling, TextConfig
from quota_jax.errors import QuotaError

__all__ = [
    "PRESETS",
    "LlavaConfig",
    "ModelConfig",
    "QwenVisionConfig",
    "QwenVlConfig",
    "RopeScaling",
    "TextConfig",
    "VisionConfig",
    "build",
    "config_from_hf",
    "config_from_json",
]

ModelConfig = LlavaConfig | QwenVlConfig
FAMILIES: dict[str, type[LlavaConfig] | type[QwenVlConfig]] = {
    "llava": LlavaConfig,
    "qwen2_5_vl": QwenVlConfig,
}
PRESETS: dict[str, ModelConfig] = {**LLAVA_PRESETS, **QWEN_PRESETS}


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """The configuration of a Hugging Face checkpoint; an unsupported ``model_type`` is named."""
    return _family(hf).from_hf(hf)


def config_from_json(data: Mapping[str, Any]) -> ModelConfig:
    """The inverse of ``to_json``."""
    return _family(data).from_json(data)


def _family(data: Mapping[str, Any]) -> type[LlavaConfig] | type[QwenVlConfig]:
    kind = data.get("model_type")
    if kind not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise QuotaError(f"model_type {kind!r} is not supported; supported: {known}")
    return FAMILIES[kind]
