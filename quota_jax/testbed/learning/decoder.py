"""Training forward pass of the decoder that both families share (LLaMA, Qwen2.5)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from quota_jax.config import TextConfig
from quota_jax.nn.rope import inverse_frequencies
from quota_jax.testbed.learning.layers import (
    Params,
    attention,
    heads,
    linear,
    rms_norm,
    rotate,
    scan_layers,
)


def text_angles(config: TextConfig, positions: np.ndarray) -> np.ndarray:
    """Angles [S, H/2] of positions [S], or of three streams [S, 3] with multimodal rotation."""
    if config.mrope_section is None:
        streams = positions[:, None]
    else:
        streams = positions[:, np.repeat(np.arange(3), config.mrope_section)]
    return streams * inverse_frequencies(config).astype(np.float64)


def text_logits(
    params: Params,
    config: TextConfig,
    visual: Float[Array, "B V D"],
    before: tuple[int, ...],
    tokens: Int[Array, "B T"],
    positions: np.ndarray,
    *,
    backend: str,
) -> Float[Array, "B T vocab"]:
    """Float32 logits at the text positions of sequences: ``before``, the picture, ``tokens``.

    The first row predicts the second text token. Words are looked up by one-hot products: the
    gradient of a gather would scatter.
    """
    dtype, batch = visual.dtype, tokens.shape[0]
    prefix = jnp.broadcast_to(jnp.array(before, tokens.dtype), (batch, len(before)))
    table = params["decoder.embed.weight"].astype(dtype)
    words = jnp.concatenate([prefix, tokens], axis=1)
    words = jax.nn.one_hot(words, config.vocab_size, dtype=dtype) @ table
    first = len(before)
    x = jnp.concatenate([words[:, :first], visual, words[:, first:]], axis=1)
    angles = text_angles(config, positions)
    counts = config.num_heads, config.num_kv_heads, config.num_kv_heads

    def block(x: Any, w: Params) -> Any:
        h = rms_norm(x, w["norm1.scale"], config.rms_norm_eps)
        qkv = linear(h, w["attn.qkv.weight"], w.get("attn.qkv.bias"))
        q, k, v = heads(qkv, config.head_dim, *counts)
        q, k = rotate(q, angles), rotate(k, angles)
        h = attention(q, k, v, causal=True, backend=backend)
        x = x + linear(h.reshape(*x.shape[:2], -1), w["attn.o.weight"], w.get("attn.o.bias"))
        h = rms_norm(x, w["norm2.scale"], config.rms_norm_eps)
        h = linear(h, w["mlp.gate_up.weight"], w.get("mlp.gate_up.bias"))
        gate, up = jnp.split(h, 2, axis=-1)
        return x + linear(jax.nn.silu(gate) * up, w["mlp.down.weight"], w.get("mlp.down.bias"))

    x = scan_layers(block, x, params, "decoder.layers.", range(config.num_layers))
    x = x[:, x.shape[1] - tokens.shape[1] :]
    x = rms_norm(x, params["decoder.norm.scale"], config.rms_norm_eps)
    head = "decoder.embed.weight" if config.tie_word_embeddings else "decoder.head.weight"
    return linear(x, params[head]).astype(jnp.float32)
