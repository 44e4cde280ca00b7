"""Constructs layer modules from nested parameter dictionaries: the single path by which models are
made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flax import nnx

from quota_jax.nn.attention import Attention
from quota_jax.nn.linear import Linear
from quota_jax.nn.mlp import Mlp
from quota_jax.nn.norm import Norm
from quota_jax.quantization import QuantizationConfig


class Tree(nnx.Module):
    """A named group of modules."""


def tree(**modules: Any) -> Any:
    group = Tree()
    for name, module in modules.items():
        setattr(group, name, module)
    return group


def module_bits(quantization: QuantizationConfig, module: str) -> dict[str, int]:
    """Bits of the linears of "vision", "projector" or "decoder"; empty for full precision."""
    if not quantization.quantizes(module):
        return {}
    return {
        "weight_bits": quantization.weight_bits,
        "activation_bits": quantization.activation_bits,
    }


def linear(params: Mapping[str, Any], bits: Mapping[str, int]) -> Any:
    return Linear(params, **bits)


def norm(params: Mapping[str, Any], eps: float) -> Any:
    return Norm(params, eps=eps)


def attention(
    params: Mapping[str, Any], bits: Mapping[str, int], num_heads: int, num_kv_heads: int, dim: int
) -> Any:
    return Attention(
        linear(params["qkv"], bits),
        linear(params["o"], bits),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=dim,
    )


def mlp(params: Mapping[str, Any], bits: Mapping[str, int], hidden_act: str) -> Any:
    gated = "gate_up" in params
    return Mlp(
        linear(params["gate_up" if gated else "up"], bits),
        linear(params["down"], bits),
        hidden_act=hidden_act,
        gated=gated,
    )


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """``{"a.b.c": x}`` -> ``{"a": {"b": {"c": x}}}``."""
    root: dict[str, Any] = {}
    for name, value in flat.items():
        *parents, leaf = name.split(".")
        node = root
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return root
