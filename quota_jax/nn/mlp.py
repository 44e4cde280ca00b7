"""Activation functions and the two feed-forward blocks."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pallas_kernels.stable import gated, rounded
from quota_jax.nn.linear import Linear


def activation(name: str) -> Callable[[Array], Array]:
    """The activation of a Hugging Face ``hidden_act``."""
    return {
        "gelu": lambda x: jax.nn.gelu(x, approximate=False),
        "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
        "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
        "relu": jax.nn.relu,
        "silu": jax.nn.silu,
    }[name]


class Mlp(nnx.Module):
    """``down(act(up(x)))``, or the gated ``down(act(gate) * up)`` where ``gate_up`` is one
    linear."""

    gate_up: Linear
    up: Linear

    def __init__(self, expand: Linear, down: Linear, *, hidden_act: str, gated: bool):
        setattr(self, "gate_up" if gated else "up", expand)
        self.down = down
        self.hidden_act = hidden_act
        self.gated = gated

    def __call__(self, x: Float[Array, "*rows D"], layer: Array | int | None = None) -> Array:
        act = activation(self.hidden_act)
        if self.gated:
            gate, up = jnp.split(self.gate_up(x, layer), 2, axis=-1)
            if self.hidden_act == "silu":
                return self.down(gated(gate, up), layer)
            return self.down(rounded(act(gate)) * up, layer)
        return self.down(rounded(act(self.up(x, layer))), layer)
