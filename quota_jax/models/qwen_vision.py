"""Vision transformer of Qwen2.5-VL: RMSNorm, axial rotary positions, window attention, SwiGLU.

Pictures are rows of a batch, each padded to the same number of patches; see ``batch.Patches`` for
their order. So a picture's features depend neither on the padding nor on the pictures beside it.
"""

from __future__ import annotations

from itertools import groupby

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pallas_kernels.attention import sequence_attention
from pallas_kernels.stable import matmul
from quota_jax.batch import Patches
from quota_jax.config import QwenVisionConfig
from quota_jax.models.build import attention, linear, mlp, norm, tree
from quota_jax.nn.rope import axial_angles, rotate


class QwenVisionTower(nnx.Module):
    """Pre-norm transformer over patches; layers stacked ``[L, ...]``."""

    def __init__(self, params: dict, config: QwenVisionConfig, bits: dict):
        layers, eps = params["layers"], config.norm_eps
        self.config = config
        self.patch_embed = linear(params["patch_embed"], {})
        self.layers = tree(
            norm1=norm(layers["norm1"], eps),
            norm2=norm(layers["norm2"], eps),
            attn=attention(
                layers["attn"], bits, config.num_heads, config.num_heads, config.head_dim
            ),
            mlp=mlp(layers["mlp"], bits, config.hidden_act),
        )

    def embed(self, values: Float[Array, "P N values"]) -> Float[Array, "P N D"]:
        """The 3-D convolution over disjoint patches, as the matrix product that it is."""
        weight = self.patch_embed.weight[...]
        weight = weight.reshape(weight.shape[0], -1)
        rows = values.reshape(-1, values.shape[-1]).astype(weight.dtype)
        return matmul(rows, weight).astype(weight.dtype).reshape(*values.shape[:2], -1)

    def layer(
        self, x: Float[Array, "P N D"], index: Array, patches: Patches, angles, *, full: bool
    ) -> Float[Array, "P N D"]:
        layers = self.layers
        q, k, v = layers.attn.project(layers.norm1(x, index), index)
        q, k = rotate(q, *angles), rotate(k, *angles)
        scale = self.config.head_dim**-0.5
        if full:
            heads = sequence_attention(q, k, v, patches.lengths, sm_scale=scale, causal=False)
        else:
            heads = self._window_attention(q, k, v, patches, scale)
        x = x + layers.attn.output(heads.astype(x.dtype), index)
        return x + layers.mlp(layers.norm2(x, index), index)

    def _window_attention(self, q, k, v, patches: Patches, scale: float):
        """Attention among the patches of each window: windows are rows of a batch."""
        slots, count, heads, dim = q.shape
        width = self.config.window_patches
        places = patches.window_starts[..., None] + jnp.arange(width)
        places = jnp.minimum(places, count - 1).reshape(slots, -1, 1, 1)

        def cut(array):
            array = jnp.take_along_axis(array, places, axis=1)
            return array.reshape(-1, width, heads, dim)

        out = sequence_attention(
            cut(q),
            cut(k),
            cut(v),
            patches.window_lengths.reshape(-1),
            sm_scale=scale,
            causal=False,
        )
        out = out.reshape(slots, -1, heads, dim)
        return jnp.take_along_axis(out, patches.window_slots[..., None, None], axis=1)

    def __call__(self, patches: Patches) -> Float[Array, "P N D"]:
        """States after the last layer; those of padding are meaningless."""
        config = self.config
        x = self.embed(patches.values)
        angles = axial_angles(config.head_dim, config.rope_theta, patches.coordinates)
        is_full = [i in config.full_attention_layers for i in range(config.num_layers)]
        for full, run in groupby(range(config.num_layers), key=is_full.__getitem__):

            def body(x, index, full=full):
                return self.layer(x, index, patches, angles, full=full), None

            x, _ = jax.lax.scan(body, x, jnp.asarray(list(run), jnp.int32))
        return x
