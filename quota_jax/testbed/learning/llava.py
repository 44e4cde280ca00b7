"""Training forward pass of LLaVA-1.5's eyes: CLIP tower and two-layer projector."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from quota_jax.config import LlavaConfig
from quota_jax.testbed.learning.layers import (
    Params,
    attention,
    heads,
    layer_norm,
    linear,
    scan_layers,
)


def vision_features(
    params: Params,
    config: LlavaConfig,
    pixels: Float[Array, "B 3 height width"],
    *,
    dtype: Any,
    backend: str,
) -> Float[Array, "B P D"]:
    """Second-to-last hidden state of the tower without the class token, from normalised pixels."""
    v = config.vision
    side, p = v.image_size // v.patch_size, v.patch_size
    batch = pixels.shape[0]
    patches = pixels.reshape(batch, 3, side, p, side, p).transpose(0, 2, 4, 1, 3, 5)
    patches = patches.reshape(batch, side * side, 3 * p * p).astype(dtype)
    x = linear(patches, params["vision.patch_embed.weight"].reshape(v.hidden_size, -1))
    first = jnp.broadcast_to(params["vision.class_embed"].astype(dtype), (batch, 1, v.hidden_size))
    x = jnp.concatenate([first, x], axis=1) + params["vision.position_embed.weight"].astype(dtype)
    length = x.shape[1]
    # One padding row through all layers where the length is odd; its key is never seen.
    x = jnp.pad(x, ((0, 0), (0, length % 2), (0, 0)))
    valid = np.full(batch, length)
    x = layer_norm(
        x, params["vision.pre_norm.scale"], params["vision.pre_norm.bias"], v.layer_norm_eps
    )

    def block(x: Any, w: Params) -> Any:
        h = layer_norm(x, w["norm1.scale"], w["norm1.bias"], v.layer_norm_eps)
        qkv = linear(h, w["attn.qkv.weight"], w["attn.qkv.bias"])
        q, k, val = heads(qkv, v.head_dim, *[v.num_heads] * 3)
        h = attention(q, k, val, causal=False, backend=backend, valid=valid)
        x = x + linear(h.reshape(x.shape), w["attn.o.weight"], w["attn.o.bias"])
        h = layer_norm(x, w["norm2.scale"], w["norm2.bias"], v.layer_norm_eps)
        h = linear(h, w["mlp.up.weight"], w["mlp.up.bias"])
        h = h * jax.nn.sigmoid(1.702 * h)
        return x + linear(h, w["mlp.down.weight"], w["mlp.down.bias"])

    x = scan_layers(block, x, params, "vision.layers.", range(config.feature_states[0]))
    return x[:, 1:length]


def visual_tokens(params: Params, features: Float[Array, "B P F"]) -> Float[Array, "B P D"]:
    """The projector."""
    h = linear(features, params["projector.linear_1.weight"], params["projector.linear_1.bias"])
    h = jax.nn.gelu(h, approximate=False)
    return linear(h, params["projector.linear_2.weight"], params["projector.linear_2.bias"])
