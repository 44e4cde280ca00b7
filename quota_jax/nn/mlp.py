"""The two feed-forward blocks."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pallas_kernels.stable import activated, gated
from quota_jax.nn.linear import Linear


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

    @property
    def expand(self) -> Linear:
        """The linear before the activation."""
        return self.gate_up if self.gated else self.up

    def __call__(self, x: Float[Array, "*rows D"], layer: Array | int | None = None) -> Array:
        if self.gated:
            gate, up = jnp.split(self.gate_up(x, layer), 2, axis=-1)
            if self.hidden_act == "silu":
                return self.down(gated(gate, up), layer)
            return self.down(activated(gate, self.hidden_act) * up, layer)
        return self.down(activated(self.up(x, layer), self.hidden_act), layer)
