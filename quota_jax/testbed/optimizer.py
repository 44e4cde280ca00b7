"""Muon for the matrices and AdamW for everything else, over a flat dictionary of parameters.

Muon (Jordan et al. 2024): momentum, orthogonalised by five Newton-Schulz steps. Query, key and
value rows (of unequal heights with grouped heads) of a fused matrix are orthogonalised separately,
and so are gate and up; stacked layers are a batch axis.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax.numpy as jnp

from quota_jax.config import ModelConfig

Params = dict[str, Any]

_MATRICES = (".attn.qkv.weight", ".attn.o.weight", ".mlp.up.weight", ".mlp.gate_up.weight")
_MATRICES += (".mlp.down.weight", "projector.linear_1.weight", "projector.linear_2.weight")
_DECAYED = ("patch_embed.weight",)
MOMENTUM, BETA1, BETA2, EPS = 0.95, 0.9, 0.95, 1e-8


class OptimizerState(NamedTuple):
    """Float32 first moments of all parameters, second moments of those under AdamW, step count."""

    first: Params
    second: Params
    step: Any


def uses_muon(name: str) -> bool:
    """Whether a parameter of this name is updated by Muon."""
    return name.endswith(_MATRICES)


def init_optimizer(params: Params) -> OptimizerState:
    zeros = {name: jnp.zeros_like(value) for name, value in params.items()}
    second = {name: jnp.zeros_like(v) for name, v in params.items() if not uses_muon(name)}
    return OptimizerState(first=zeros, second=second, step=jnp.zeros((), jnp.int32))


def orthogonalise(matrix: Any, dtype: Any = jnp.bfloat16) -> Any:
    """Approximate U V^T of each [.., m, n] matrix by the quintic Newton-Schulz iteration."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.astype(jnp.float32)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.swapaxes(-1, -2)
    x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-7)
    x = x.astype(dtype)
    for _ in range(5):
        gram = x @ x.swapaxes(-1, -2)
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    if tall:
        x = x.swapaxes(-1, -2)
    return x.astype(jnp.float32)


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
