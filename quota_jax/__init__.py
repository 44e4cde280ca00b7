"""Vision-language models in JAX at 4 bits with most visual tokens pruned."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from quota_jax.batch import Batch
    from quota_jax.errors import QuotaError
    from quota_jax.generation import Generation, generate, prefill
    from quota_jax.processing import Video
    from quota_jax.quantization import QuantizationConfig
    from quota_jax.recipe import Recipe, Selector, Stage
    from quota_jax.vlm import Vlm, load

# Imported on first use: `import quota_jax` stays cheap.
_WHERE = {
    "Batch": "batch",
    "Generation": "generation",
    "QuantizationConfig": "quantization",
    "QuotaError": "errors",
    "Recipe": "recipe",
    "Selector": "recipe",
    "Stage": "recipe",
    "Video": "processing",
    "Vlm": "vlm",
    "generate": "generation",
    "load": "vlm",
    "prefill": "generation",
}
__all__ = [
    "Batch",
    "Generation",
    "QuantizationConfig",
    "QuotaError",
    "Recipe",
    "Selector",
    "Stage",
    "Video",
    "Vlm",
    "generate",
    "load",
    "prefill",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'quota_jax' has no attribute {name!r}")
    module = importlib.import_module(f"quota_jax.{_WHERE[name]}")
    value = getattr(module, name)
    globals()[name] = value
    return value
