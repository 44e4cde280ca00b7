"""Muon for the matrices and AdamW for everything else, with grouped key heads.

Joined matrices are orthogonalised part by part: query, key and value rows (of unequal heights with
grouped heads), and gate and up rows. Stacked layers are a batch axis.
"""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp

from quota_jax.config import ModelConfig
from quota_jax.testbed.optimizer import (
    BETA1,
    BETA2,
    EPS,
    MOMENTUM,
    OptimizerState,
    orthogonalise,
    uses_muon,
)

Params = dict[str, Any]
_DECAYED = ("patch_embed.weight",)


def row_parts(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Where the rows of joined matrices are cut, by parameter name."""
    vision, text = config.vision, config.text
    d, queries = vision.hidden_size, text.num_heads * text.head_dim
    return {
        "vision.layers.attn.qkv.weight": (d, 2 * d),
        "vision.layers.mlp.gate_up.weight": (vision.intermediate_size,),
        "decoder.layers.attn.qkv.weight": (queries, queries + text.num_kv_heads * text.head_dim),
        "decoder.layers.mlp.gate_up.weight": (text.intermediate_size,),
    }


def update(
    config: ModelConfig,
    params: Params,
    grads: Params,
    state: OptimizerState,
    *,
    learning_rate: Any,
    weight_decay: float = 0.05,
    clip: float = 1.0,
) -> tuple[Params, OptimizerState, Any]:
    """One step: new parameters, new state and the gradient's global norm before clipping."""
    cuts = row_parts(config)
    norm = jnp.sqrt(sum(jnp.sum(g.astype(jnp.float32) ** 2) for g in grads.values()))
    factor = jnp.minimum(1.0, clip / (norm + 1e-6))
    step = state.step + 1
    corrected1 = 1 - BETA1 ** step.astype(jnp.float32)
    corrected2 = 1 - BETA2 ** step.astype(jnp.float32)
    new, first, second = {}, {}, {}
    for name, value in params.items():
        grad = grads[name].astype(jnp.float32) * factor
        if uses_muon(name):
            first[name] = MOMENTUM * state.first[name] + grad
            direction = grad + MOMENTUM * first[name]
            moved = [
                orthogonalise(part) * (0.2 * math.sqrt(max(part.shape[-2:])))
                for part in jnp.split(direction, cuts.get(name, ()), axis=-2)
            ]
            moved = jnp.concatenate(moved, axis=-2) + weight_decay * value
        else:
            first[name] = BETA1 * state.first[name] + (1 - BETA1) * grad
            second[name] = BETA2 * state.second[name] + (1 - BETA2) * grad**2
            moved = first[name] / corrected1 / (jnp.sqrt(second[name] / corrected2) + EPS)
            if name.endswith(_DECAYED):
                moved = moved + weight_decay * value
        new[name] = value - learning_rate * moved
    return new, OptimizerState(first, second, step), norm
