"""A Hugging Face folder's weights from parameters in memory, such as a training run holds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from converters.families import rules_of
from converters.hf_writer import HfWriter, TensorSpec
from converters.rules import assign
from quota_jax.config import ModelConfig
from quota_jax.errors import QuotaError
from quota_jax.models.params import blocks


def write_params(
    folder: Path,
    params: Mapping[str, Any],
    config: ModelConfig,
    *,
    dtype: str = "bfloat16",
    max_shard_size: float = 5e9,
    text_fields: Mapping[str, Any] | None = None,
) -> None:
    """Writes config.json and safetensors shards (with an index if several) into ``folder``.

    Args:
        params: the stacked parameters of a full-precision model, all of them and no others.
        max_shard_size: bytes per shard; a larger tensor gets a shard of its own.
        text_fields: more for the config's text section, such as the ids of special tokens: without
            them transformers assumes those of the large models.
    """
    import ml_dtypes

    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    table = rules_of(config)
    plan = assign(table, config, blocks(config), table.layout("saved"))
    planned = {a.param for assignments in plan.blocks.values() for a in assignments}
    if planned != set(params):
        wrong = sorted(planned ^ set(params))
        raise QuotaError(f"parameters do not fit the model: {', '.join(wrong[:3])}")
    specs = {
        piece.name: TensorSpec(shape=piece.shape, dtype=kind)
        for assignments in plan.blocks.values()
        for assignment in assignments
        for piece in assignment.pieces
    }
    writer = HfWriter(folder, specs, max_shard_size)
    for block, assignments in plan.blocks.items():
        _, stacked, number = block.rpartition("_layer_")
        for assignment in assignments:
            array = np.asarray(params[assignment.param])
            array = array[int(number)] if stacked else array
            for name, rows in assignment.split(array):
                writer.write(name, rows.astype(kind))
    writer.finish()
    content = config.to_hf() | {"dtype": kind.name}
    content["text_config"] |= dict(text_fields or {})
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n")
