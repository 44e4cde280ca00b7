"""A small visual world with known truth, benchmarks on it, and two models trained on it.

Everything the rest of the library needs to be tried without a download: `draw_samples` gives
pictures with questions and exact answers, `small_model_path` a trained checkpoint in Hugging Face
form. `world` draws and asks, `benchmarks` writes the official file formats, `learning` trains.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from quota_jax.errors import QuotaError

if TYPE_CHECKING:
    from quota_jax.testbed.samples import draw_samples
    from quota_jax.testbed.scenes import draw_scenes

__all__ = [
    "SMALL_MODELS",
    "draw_samples",
    "draw_scenes",
    "small_llava_path",
    "small_model_path",
    "small_qwen_path",
]

_HOME = {"draw_samples": "samples", "draw_scenes": "scenes"}

SMALL_MODELS = {"llava": "small_llava", "qwen2_5_vl": "small_qwen2_5_vl"}
"""Folder of the shipped model by family, as config.json names families."""


def small_model_path(family: str) -> Path:
    """Folder of the shipped model of a family (Hugging Face files).

    Raises:
        QuotaError: no such family, or the folder is missing.
    """
    if family not in SMALL_MODELS:
        raise QuotaError(f"no small model {family!r}; known: {', '.join(SMALL_MODELS)}")
    folder = Path(__file__).resolve().parent / "models" / SMALL_MODELS[family]
    if not (folder / "config.json").is_file():
        raise QuotaError(f"the small model is not installed: {folder / 'config.json'} is missing")
    return folder


def small_llava_path() -> Path:
    """Folder of the shipped small LLaVA."""
    return small_model_path("llava")


def small_qwen_path() -> Path:
    """Folder of the shipped small Qwen2.5-VL."""
    return small_model_path("qwen2_5_vl")


def __getattr__(name: str) -> Any:
    # Scenes need jax and Pillow; the path of a model does not.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
