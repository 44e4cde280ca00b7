"""One pre-norm layer of a vision tower: module by module, or in few launches.

Either way states travel as a pair, ``states`` and what is still to be ``added`` to them: see
``fused_layers``. What attention does between the two projections is the tower's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.stable import summed
from quota_jax.models import fused_layers

Carry = tuple[Float[Array, "P V D"], Float[Array, "P V D"]]
Attend = Callable[[Array, Array, Array], Float[Array, "P V N H"]]
"""Queries, keys and values ``[P, V, N, H]`` -> what each head found."""


def plain_layer(layers: Any, carry: Carry, at: Array, attend: Attend) -> Carry:
    """Layer ``at`` of a stack of any kind."""
    x = summed(*carry)
    heads = attend(*layers.attn.project(layers.norm1(x, at), at))
    x = summed(x, layers.attn.output(heads.astype(x.dtype), at))
    return x, layers.mlp(layers.norm2(x, at), at)


def fused_layer(layers: Any, carry: Carry, at: Array, attend: Attend) -> Carry:
    """``plain_layer`` of a stack for which ``fused_layers.obstacle`` found nothing."""
    shape, dtype = carry[0].shape, carry[0].dtype
    states, added = (array.reshape(-1, shape[-1]) for array in carry)
    states, rows = fused_layers.attention_input(layers, states, added, at)
    joined = layers.attn.qkv.multiply(rows, at, dtype)
    heads = attend(*layers.attn.heads(joined.reshape(*shape[:-1], -1)))
    heads = heads.astype(dtype).reshape(states.shape[0], -1)
    added = fused_layers.attention_output(layers, heads, at)
    states, added = fused_layers.feed_forward(layers, states, added, at)
    return states.reshape(shape), added.reshape(shape)


def run_layers(layers: Any, carry: Carry, start: int, stop: int, attend: Attend) -> Carry:
    """Layers ``start`` to ``stop``, by ``fused_layer`` where the stack can run so."""
    if fused_layers.obstacle(layers) is None:
        return fused_layers.over_layers(
            lambda carry, _, at: fused_layer(layers, carry, at, attend), carry, stop - start, start
        )
    return jax.lax.scan(
        lambda carry, at: (plain_layer(layers, carry, at, attend), None),
        carry,
        jnp.arange(start, stop, dtype=jnp.int32),
    )[0]
