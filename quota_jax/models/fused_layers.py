"""Packed 4-bit layers in few launches: what prefill, decoding and vision towers share.

Whatever stands between two matmuls (residual sum, norm, gate or activation, transform,
quantization) is one launch, ``transform_quantize``. A sublayer's output is added to the residual
stream by the launch that reads it next, so states travel as a pair: ``states`` and what is still to
be ``added``.

It computes what the modules of the layers compute one by one, with the same roundings in the same
order: on a CPU bit by bit, with any kernel as near as the kernel is to its reference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.transform_quantize import Quantized
from quota_jax.nn.attention_cache import CacheQuantizer
from quota_jax.nn.linear import Linear
from quota_jax.nn.norm import Norm

Carry = TypeVar("Carry")


def obstacle(layers: Any) -> str | None:
    """Why a stack of layers cannot run here; None if it can.

    It needs packed 4-bit weights with one scale for each output channel and 4- or 8-bit
    activations; a gate, if there is one, must be SiLU's. Norms may be of either kind.
    """
    if layers.mlp.gated and layers.mlp.hidden_act != "silu":
        return "the feed-forward block is not gated by SiLU"
    for linear in (layers.attn.qkv, layers.attn.o, layers.mlp.expand, layers.mlp.down):
        if (reason := linear.obstacle) is not None:
            return reason
        if "input_scale" in linear.names:
            return "inputs are multiplied by a scale of each channel"
    return None


def over_layers(
    layer: Callable[[Carry, Array, Array], Carry], carry: Carry, count: int, first: int = 0
) -> Carry:
    """``carry`` after ``layer(carry, index, at)`` with ``index`` from 0 and ``at`` from ``first``.

    The loop's own counters are the indices that kernels take. A scan over an array of them would
    slice each one out of it on the device: a launch more for every layer, and one that all others
    wait for. Not differentiable, as packed layers are not.
    """

    def step(state: Any) -> Any:
        counters, carry = state
        done = layer(carry, counters[0], counters[-1])
        return tuple(counter + 1 for counter in counters), done

    counters = (jnp.int32(0), *([jnp.int32(first)] if first else []))
    return jax.lax.while_loop(lambda state: state[0][0] < count, step, (counters, carry))[1]


def attention_input(
    layers: Any, states: Float[Array, "M D"], added: Float[Array, "M D"], at: Array
) -> tuple[Array, Quantized]:
    """The states with what was to be added, and the integers of the q/k/v projection."""
    rows = _normed(layers.attn.qkv, layers.norm1, states, added, at)
    return rows.states, rows


def attention_output(layers: Any, heads: Float[Array, "M K"], at: Array) -> Float[Array, "M D"]:
    """What attention adds to the states."""
    out = layers.attn.o
    return out.multiply(out.quantize(heads, at), at, heads.dtype)


def feed_forward(
    layers: Any, states: Float[Array, "M D"], added: Float[Array, "M D"], at: Array
) -> tuple[Array, Array]:
    """The states with what attention added, and what the feed-forward block adds to them."""
    expand, down = layers.mlp.expand, layers.mlp.down
    act = {"gated": True} if layers.mlp.gated else {"activation": layers.mlp.hidden_act}
    rows = _normed(expand, layers.norm2, states, added, at)
    hidden = expand.multiply(rows, at, states.dtype)
    rows_down = down.quantize(hidden, at, **act)
    return rows.states, down.multiply(rows_down, at, states.dtype)


def stacks(module: Linear | CacheQuantizer, *names: str) -> dict[str, Any]:
    """Those of the parameters ``[L, ...]`` that the module has."""
    return {name: getattr(module, name)[...] for name in names if name in module.names}


def _normed(linear: Linear, norm: Norm, states: Array, added: Array, at: Array) -> Any:
    bias = norm.bias[...] if norm.centred else None
    return linear.quantize(
        states, at, added=added, norm=norm.scale[...], norm_bias=bias, eps=norm.eps
    )
