"""Pieces of the training forward passes: what the library's layers compute, in a fast form.

Parameters are a flat dictionary of float32 arrays; activations have the dtype of the input. Norms,
softmax and rotations work in float32. The library's own forward pass serves every other purpose;
tests hold the two together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

Params = dict[str, Any]


def linear(x: Any, weight: Any, bias: Any = None) -> Any:
    """``x W^T + b``; a bias is added in float32."""
    y = x @ weight.astype(x.dtype).T
    return y if bias is None else (y.astype(jnp.float32) + bias).astype(x.dtype)


def layer_norm(x: Any, scale: Any, bias: Any, eps: float) -> Any:
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(-1, keepdims=True)
    unit = centred * lax.rsqrt((centred**2).mean(-1, keepdims=True) + eps)
    return (unit * scale + bias).astype(x.dtype)


def rms_norm(x: Any, scale: Any, eps: float) -> Any:
    wide = x.astype(jnp.float32)
    return (wide * lax.rsqrt((wide**2).mean(-1, keepdims=True) + eps) * scale).astype(x.dtype)


def rotate(x: Float[Array, "B S N H"], angles: np.ndarray) -> Float[Array, "B S N H"]:
    """Rotates pair (i, i + H/2) of every head by ``angles`` [S, H/2]."""
    cos, sin = (jnp.asarray(f(angles), jnp.float32)[:, None] for f in (np.cos, np.sin))
    low, high = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    out = jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)
    return out.astype(x.dtype)


def attention(
    q: Float[Array, "B S N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    causal: bool,
    backend: str,
    valid: np.ndarray | None = None,
) -> Float[Array, "B S N H"]:
    """Attention in which row b sees its first ``valid[b]`` keys (None: all).

    On "cudnn" S must be even with ``valid``: odd lengths have no gradient there. Grouped key heads
    are repeated, which is the plain case that cuDNN knows best.
    """
    group = q.shape[2] // k.shape[2]
    if group > 1:
        k, v = (jnp.repeat(part, group, axis=2) for part in (k, v))
    options: dict[str, Any] = {"is_causal": causal, "implementation": backend}
    if valid is not None and (valid < q.shape[1]).any():
        keys = jnp.asarray(valid, jnp.int32)
        options["key_value_seq_lengths"] = keys
        if backend == "cudnn":
            options["query_seq_lengths"] = jnp.full_like(keys, q.shape[1])
    return jax.nn.dot_product_attention(q, k, v, **options)


def heads(x: Any, head_dim: int, *counts: int) -> list[Any]:
    """[B, S, sum(counts) * H] -> one [B, S, n, H] per count."""
    split = x.reshape(*x.shape[:2], -1, head_dim)
    return jnp.split(split, np.cumsum(counts)[:-1], axis=2)


def scan_layers(
    body: Callable[[Any, Params], Any], x: Any, params: Params, prefix: str, layers: range
) -> Any:
    """``body(x, parameters of a layer)`` over consecutive layers of a stack."""
    stack = {
        name.removeprefix(prefix): value[layers.start : layers.stop]
        for name, value in params.items()
        if name.startswith(prefix)
    }
    return lax.scan(lambda carry, layer: (body(carry, layer), None), x, stack)[0]
