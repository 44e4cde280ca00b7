"""A decode step through packed 4-bit decoder layers in four kinds of kernel.

    states ─ transform_quantize ─ int4_matmul (qkv) ─ kv4_append ─ kv4_attention
           ─ transform_quantize ─ int4_matmul (o)
           ─ transform_quantize ─ int4_matmul (gate, up)
           ─ transform_quantize ─ int4_matmul (down)

One token per sample is so little work that starting a kernel takes longer than most of them run.
So whatever stands between two matmuls (residual sum, norm, gate, transform, quantization) is one
launch, and so are rotation and the append to the cache. A sublayer's output is added to the
residual stream by the launch that reads it next.

It computes what the modules of the layers compute one by one, with the same roundings in the same
order: on a CPU bit by bit, with any kernel as near as the kernel is to its reference.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.int4_matmul import int4_matmul
from pallas_kernels.kv4_append import kv4_append
from pallas_kernels.kv4_attention import kv4_attention
from pallas_kernels.transform_quantize import Quantized, transform_quantize
from quota_jax.kv_cache import CacheGroup
from quota_jax.nn.attention_cache import Angles, CacheQuantizer
from quota_jax.nn.linear import Linear, take
from quota_jax.nn.norm import Norm

CacheArrays = tuple[tuple[Array, ...], tuple[Array, ...]]


def obstacle(layers: Any) -> str | None:
    """Why a stack of decoder layers cannot run here; None if it can.

    It needs packed 4-bit weights with one scale for each output channel, 4- or 8-bit activations,
    RMSNorm, a SiLU gate, and a 4-bit cache with keys by token.
    """
    if layers.cache.bits != 4:
        return f"the cache has {layers.cache.bits} bits"
    if layers.cache.by_channel:
        return "keys are stored by channel"
    if layers.norm1.centred or layers.norm2.centred:
        return "the norms are no RMSNorm"
    if not layers.mlp.gated or layers.mlp.hidden_act != "silu":
        return "the feed-forward block is not gated by SiLU"
    for linear in (layers.attn.qkv, layers.attn.o, layers.mlp.gate_up, layers.mlp.down):
        if "packed" not in linear.names:
            return "weights are not packed"
        if linear.activation_bits == 16:
            return "activations are not quantized"
        if linear.groups is not None:
            return "weights have group scales"
        if "input_scale" in linear.names:
            return "inputs are multiplied by a scale of each channel"
    return None


def run_layers(
    layers: Any,
    x: Float[Array, "B D"],
    group: CacheGroup,
    angles: Angles,
    first: int,
    *,
    sm_scale: float,
) -> tuple[Float[Array, "B D"], CacheArrays]:
    """The layers of one cache group, from number ``first`` of the stack on: the new states, and the
    cache's keys and values with the new token.

    Args:
      layers: a stack for which ``obstacle`` found nothing.
      angles: cosine and sine of the new tokens, ``[B, H/2]``.
    """
    attn, mlp = layers.attn, layers.mlp
    sites = _stacks(layers.cache, "query_transform", "key_transform", "clip")
    sites |= _stacks(attn.qkv, "bias")
    reach = group.lengths + 1

    def layer(carry: Any, index: Array) -> tuple[Any, None]:
        states, added, key, value = carry
        at = first + index
        rows = _quantize(attn.qkv, states, at, added=added, norm=layers.norm1)
        states: Any = rows.states
        query, key, value = kv4_append(
            _multiply(attn.qkv, rows, at, x.dtype),
            *angles,
            key,
            value,
            group.lengths,
            index,
            site_layer=at,
            dtype=x.dtype,
            **sites,
        )
        (codes, scale, zero), (v_codes, v_scale, v_zero) = key, value
        heads = kv4_attention(
            query,
            codes,
            v_codes,
            scale,
            v_scale,
            zero,
            v_zero,
            reach,
            index,
            sm_scale=sm_scale,
            out_dtype=x.dtype,
        )
        rows = _quantize(attn.o, heads.reshape(x.shape[0], -1), at)
        added = _project(attn.o, rows, at, x.dtype)
        rows = _quantize(mlp.gate_up, states, at, added=added, norm=layers.norm2)
        states = rows.states
        hidden = _project(mlp.gate_up, rows, at, x.dtype)
        rows = _quantize(mlp.down, hidden, at, gated=True)
        added = _project(mlp.down, rows, at, x.dtype)
        return (states, added, key, value), None

    start = (x, jnp.zeros_like(x), group.key, group.value)
    (states, added, key, value), _ = jax.lax.scan(
        layer, start, jnp.arange(group.num_layers, dtype=jnp.int32)
    )
    return states + added, (key, value)


def _stacks(module: Linear | CacheQuantizer, *names: str) -> dict[str, Any]:
    """Those of the parameters ``[L, ...]`` that the module has."""
    return {name: getattr(module, name)[...] for name in names if name in module.names}


def _quantize(
    linear: Linear,
    x: Array,
    layer: Array,
    *,
    added: Array | None = None,
    norm: Norm | None = None,
    gated: bool = False,
) -> Quantized:
    """The integers that ``linear`` multiplies, for its input after sum and norm, or gate."""
    sites = _stacks(linear, "left", "right", "clip")
    if norm is not None:
        sites["norm"] = norm.scale[...]
    return transform_quantize(
        x,
        layer,
        bits=linear.activation_bits,
        added=added,
        eps=0.0 if norm is None else norm.eps,
        gated=gated,
        **sites,
    )


def _multiply(linear: Linear, rows: Quantized, layer: Array, dtype: Any) -> Array:
    """``linear`` without its bias: in ``dtype``, or float32 where a bias follows."""
    wide = jnp.float32 if "bias" in linear.names else dtype
    return int4_matmul(
        rows.codes, rows.scale, linear.packed[...], linear.scale[...], layer, out_dtype=wide
    )


def _project(linear: Linear, rows: Quantized, layer: Array, dtype: Any) -> Array:
    out = _multiply(linear, rows, layer, dtype)
    if "bias" in linear.names:
        out = out + take(linear.bias, layer).astype(jnp.float32)
    return out.astype(dtype)
