"""Projections of self-attention; the attention itself is ``pallas_kernels.kv4_attention``."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from quota_jax.nn.linear import Linear


class Attention(nnx.Module):
    """Fused q/k/v projection (rows q, then k, then v) and the output projection."""

    def __init__(self, qkv: Linear, o: Linear, *, num_heads: int, num_kv_heads: int, head_dim: int):
        self.qkv = qkv
        self.o = o
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim

    def project(
        self, x: Float[Array, "*rows D"], layer: Array | int | None
    ) -> tuple[Float[Array, "*rows N H"], Float[Array, "*rows K H"], Float[Array, "*rows K H"]]:
        """Queries, keys and values by head, before rotation."""
        return self.heads(self.qkv(x, layer))

    def heads(
        self, joined: Float[Array, "*rows W"]
    ) -> tuple[Float[Array, "*rows N H"], Float[Array, "*rows K H"], Float[Array, "*rows K H"]]:
        """The parts of the joined projection by head."""
        rows = joined.shape[:-1]
        q_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        q, k, v = jnp.split(joined, (q_size, q_size + kv_size), axis=-1)
        return (
            q.reshape(*rows, self.num_heads, self.head_dim),
            k.reshape(*rows, self.num_kv_heads, self.head_dim),
            v.reshape(*rows, self.num_kv_heads, self.head_dim),
        )

    def output(
        self, heads: Float[Array, "*rows N H"], layer: Array | int | None
    ) -> Float[Array, "*rows D"]:
        rows, width = heads.shape[:-2], self.num_heads * self.head_dim
        return self.o(heads.reshape(*rows, width), layer)
