"""Training that starts from a model that was trained before."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from quota_jax.checkpoint import open_checkpoint
from quota_jax.checkpoint.stacking import stack_blocks
from quota_jax.config import ModelConfig
from quota_jax.errors import QuotaError
from quota_jax.models.shapes import parameter_shapes
from quota_jax.testbed.learning.card import TRAINING
from quota_jax.testbed.learning.models import Params, init_params, model_params


class Start(NamedTuple):
    """Float32 parameters (auxiliary heads at zero), the checksum of their files, and the reports of
    the runs that made them, oldest first."""

    params: Params
    checksum: str
    reports: list[dict[str, Any]]


def read_start(folder: Path, converted: Path, config: ModelConfig) -> Start:
    """A finished run as parameters for the next one.

    Args:
        folder: the Hugging Face folder of the run, with its training report.
        converted: the checkpoint that `converters.convert` made of it.

    Raises:
        QuotaError: it cannot be read, or holds a model of other sizes.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(path.read_bytes())
    checkpoint = open_checkpoint(converted)
    if checkpoint.config != config:
        raise QuotaError(f"{folder}: a model of other sizes than the one to train")
    specs = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32)
        for name, shape in parameter_shapes(config).items()
    }
    params = stack_blocks(map(checkpoint.read_block, checkpoint.block_names), specs)
    fresh = init_params(config, 0)
    heads = {name: value for name, value in fresh.items() if name not in model_params(fresh)}
    merged = {name: np.asarray(params.get(name, heads.get(name))) for name in fresh}
    return Start(merged, digest.hexdigest(), _reports(folder / TRAINING))


def _reports(path: Path) -> list[dict[str, Any]]:
    """What a folder's training report says, its own earlier runs before it."""
    if not path.is_file():
        return []
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        return [*report.pop("earlier", []), report]
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise QuotaError(f"{path}: not a training report: {error}") from None
