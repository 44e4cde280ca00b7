"""The prefill of packed 4-bit decoder layers in few launches.

    states ─ transform_quantize ─ int4_matmul (qkv) ─ kv4_encode ─ sequence_attention
           ─ transform_quantize ─ int4_matmul (o)
           ─ transform_quantize ─ int4_matmul (gate, up)
           ─ transform_quantize ─ int4_matmul (down)

With another cache than one of 4-bit codes by token its modules stand in place of ``kv4_encode``.

Sequences are padded to whole groups of ``ROWS`` tokens for the time of the layers: ``int4_matmul``
would pad before and cut behind each product.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.attention import operand_dtype, sequence_attention
from pallas_kernels.kv4_encode import kv4_encode
from quota_jax.models import fused_layers
from quota_jax.nn.attention_cache import Angles, Stored
from quota_jax.prune.select import Sequence
from quota_jax.quant.quantizers import KV_SCALE_DTYPE

ROWS = 8
"""Rows of a whole group, all samples of a batch together."""


def run_layers(
    layers: Any,
    x: Float[Array, "B S D"],
    sequence: Sequence,
    angles: Angles,
    first: int,
    count: int,
    *,
    sm_scale: float,
) -> tuple[tuple[Array, Array], Stored]:
    """``count`` layers of the stack from number ``first`` on, all on the same tokens.

    Args:
      layers: a stack for which ``fused_layers.obstacle`` found nothing.
      angles: cosine and sine of the tokens, ``[B, S, H/2]``.

    Returns:
      The last layer's states, what it still adds to them (both ``[B, S, D]``), and what the layers'
      caches store, ``[count, B, S, K, ...]``.
    """
    tokens, (attn, cache) = x.shape[1], (layers.attn, layers.cache)
    # What is added stands behind a sample's length, where no token looks.
    x, cos, sin = (_whole_rows(array) for array in (x, *angles))
    shape, angles = x.shape[:2], (cos, sin)
    sites = fused_layers.stacks(cache, "query_transform", "key_transform", "clip")
    flat_cos, flat_sin = (a.reshape(-1, a.shape[-1]) for a in angles)
    read_dtype = operand_dtype(x.dtype, attn.head_dim)

    def layer(carry: Any, index: Array, at: Array) -> tuple[Any, Any]:
        (states, added), packed = carry
        stored = None
        states, rows = fused_layers.attention_input(layers, states, added, at)
        joined = attn.qkv.multiply(rows, at, states.dtype)
        if packed is None:
            heads = attn.heads(joined.reshape(*shape, -1))
            query, key, value, stored = cache(heads, angles, at, states.dtype)
        else:
            *heads, packed = kv4_encode(
                joined,
                flat_cos,
                flat_sin,
                *packed,
                layer=index,
                site_layer=at,
                read_dtype=read_dtype,
                **sites,
            )
            query, key, value = (a.reshape(*shape, *a.shape[1:]) for a in heads)
        found = sequence_attention(query, key, value, sequence.lengths, sm_scale=sm_scale)
        found = found.astype(states.dtype).reshape(states.shape[0], -1)
        added = fused_layers.attention_output(layers, found, at)
        return (fused_layers.feed_forward(layers, states, added, at), packed), stored

    states = x.reshape(-1, x.shape[-1])
    # Written in place through the loop: collecting each layer's codes would be copies.
    packed: Any = _room(count, states.shape[0], attn) if cache.packs else None
    start = (states, jnp.zeros_like(states)), packed
    if packed is not None:
        pair, packed = fused_layers.over_layers(
            lambda carry, index, at: layer(carry, index, at)[0], start, count, first
        )
        stored = jax.tree.map(lambda a: a.reshape(count, *shape, *a.shape[2:]), packed)
    else:
        (pair, _), stored = jax.lax.scan(
            lambda carry, index: layer(carry, index, first + index),
            start,
            jnp.arange(count, dtype=jnp.int32),
        )
    states, added = (a.reshape(x.shape)[:, :tokens] for a in pair)
    return (states, added), jax.tree.map(lambda a: a[:, :, :tokens], stored)


def _whole_rows(array: Float[Array, "B S width"]) -> Array:
    """With as many more tokens for each sample as make the rows a multiple of ``ROWS``."""
    unit = ROWS // math.gcd(ROWS, array.shape[0])
    return jnp.pad(array, ((0, 0), (0, -array.shape[1] % unit), (0, 0)))


def _room(count: int, rows: int, attn: Any) -> Stored:
    """Empty stacks of packed keys and values of ``rows`` tokens, as ``kv4_encode`` takes them."""
    heads = count, rows, attn.num_kv_heads

    def stack():
        codes = jnp.zeros((*heads, attn.head_dim // 2), jnp.uint8)
        return codes, jnp.zeros(heads, KV_SCALE_DTYPE), jnp.zeros(heads, jnp.uint8)

    return stack(), stack()
