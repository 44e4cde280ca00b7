"""A decode step through packed 4-bit decoder layers in four kinds of kernel.

    states ─ transform_quantize ─ int4_matmul (qkv) ─ kv4_append ─ kv4_attention
           ─ transform_quantize ─ int4_matmul (o)
           ─ transform_quantize ─ int4_matmul (gate, up)
           ─ transform_quantize ─ int4_matmul (down)

One token per sample is so little work that starting a kernel takes longer than most of them run.
So rotation and the append to the cache are one launch too, beside those of ``fused_layers``.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.kv4_append import kv4_append
from pallas_kernels.kv4_attention import kv4_attention
from pallas_kernels.stable import summed
from quota_jax.kv_cache import CacheGroup
from quota_jax.models import fused_layers
from quota_jax.nn.attention_cache import Angles

CacheArrays = tuple[tuple[Array, ...], tuple[Array, ...]]


def obstacle(layers: Any) -> str | None:
    """Why a stack of decoder layers cannot run here; None if it can.

    Besides what ``fused_layers.obstacle`` asks for it needs a 4-bit cache with keys by token.
    """
    if layers.cache.bits != 4:
        return f"the cache has {layers.cache.bits} bits"
    if layers.cache.by_channel:
        return "keys are stored by channel"
    return fused_layers.obstacle(layers)


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
    qkv = layers.attn.qkv
    sites = fused_layers.stacks(layers.cache, "query_transform", "key_transform", "clip")
    sites |= fused_layers.stacks(qkv, "bias")
    reach = group.lengths + 1

    def layer(carry: Any, index: Array, at: Array) -> Any:
        states, added, key, value = carry
        states, rows = fused_layers.attention_input(layers, states, added, at)
        query, key, value = kv4_append(
            qkv.multiply(rows, at, x.dtype, biased=False),
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
        added = fused_layers.attention_output(layers, heads.reshape(x.shape[0], -1), at)
        states, added = fused_layers.feed_forward(layers, states, added, at)
        return states, added, key, value

    start = (x, jnp.zeros_like(x), group.key, group.value)
    states, added, key, value = fused_layers.over_layers(layer, start, group.num_layers, first)
    return summed(states, added), (key, value)
