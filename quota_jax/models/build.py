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


def module_bits(quantization: QuantizationConfig, module: str) -> dict[str, Any]:
    """Bits and groups of the linears of "vision", "projector" or "decoder"; empty where they are in
    full precision."""
    if not quantization.quantizes(module):
        return {}
    return {
        "weight_bits": quantization.weight_bits,
        "activation_bits": quantization.activation_bits,
        "groups": quantization.groups,
    }


def linear(params: Mapping[str, Any], bits: Mapping[str, Any], parts: tuple[int, ...] = ()) -> Any:
    """``parts``: heights of the matrices that are joined along the rows."""
    return Linear(params, **bits, parts=parts)


def norm(params: Mapping[str, Any], eps: float) -> Any:
    return Norm(params, eps=eps)


def attention(
    params: Mapping[str, Any], bits: Mapping[str, Any], num_heads: int, num_kv_heads: int, dim: int
) -> Any:
    heights = (num_heads * dim, num_kv_heads * dim, num_kv_heads * dim)
    return Attention(
        linear(params["qkv"], bits, heights),
        linear(params["o"], bits),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=dim,
    )


def mlp(params: Mapping[str, Any], bits: Mapping[str, Any], hidden_act: str) -> Any:
    gated = "gate_up" in params
    expand = params["gate_up" if gated else "up"]
    # Rows of the weight or, once quantized, of what takes its place.
    rows = next(expand[k].shape[-2] for k in ("weight", "packed", "codes") if k in expand)
    return Mlp(
        linear(expand, bits, (rows // 2,) * 2 if gated else ()),
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
