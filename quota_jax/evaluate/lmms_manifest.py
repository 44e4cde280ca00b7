"""What lmms-eval reads to find the model ``quota_jax`` (entry point group ``lmms_eval.models``)."""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """The model's id and where its class is; importing this needs neither jax nor torch."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="quota_jax", chat_class_path="quota_jax.evaluate.lmms_plugin.QuotaJax"
    )
