"""A small visual world with known truth: drawn scenes, questions, and a model trained on them.

Everything the rest of the library needs to be tried without a download: `draw_scenes` and `ask`
give pictures and questions with exact answers, `small_llava_path` a trained checkpoint in Hugging
Face form.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from quota_jax.errors import QuotaError

if TYPE_CHECKING:
    from quota_jax.testbed.questions import TYPES
    from quota_jax.testbed.scenes import (
        Question,
        Scene,
        SceneObject,
        Sign,
        allowed_types,
        ask,
        draw_scenes,
    )

__all__ = [
    "TYPES",
    "Question",
    "Scene",
    "SceneObject",
    "Sign",
    "allowed_types",
    "ask",
    "draw_scenes",
    "small_llava_path",
]

_HOME = {"TYPES": "questions"}


def small_llava_path() -> Path:
    """Folder of the shipped small LLaVA (Hugging Face files); QuotaError if it is missing."""
    folder = Path(__file__).resolve().parent / "models" / "small_llava"
    if not (folder / "config.json").is_file():
        raise QuotaError(f"the small LLaVA is not installed: {folder / 'config.json'} is missing")
    return folder


def __getattr__(name: str) -> Any:
    # Scenes need jax and Pillow; the path of the model does not.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOME.get(name, 'scenes')}"), name)
