"""Vision transformer of Qwen2.5-VL: RMSNorm, axial rotary positions, window attention, SwiGLU.

Pictures are rows of a batch, each padded to the same number of patches; see ``batch.Patches`` for
their order. So a picture's features depend neither on the padding nor on the pictures beside it.
"""

from __future__ import annotations

from itertools import groupby

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pallas_kernels.attention import sequence_attention
from pallas_kernels.stable import matmul, summed
from quota_jax.batch import Patches
from quota_jax.config import QwenVisionConfig
from quota_jax.models.build import attention, linear, mlp, norm, tree
from quota_jax.models.vision_layers import Attend, plain_layer, run_layers
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
        """One layer, module by module, as calibration has to see it."""
        attend = self._attention(patches, angles, full)
        return summed(*plain_layer(self.layers, (x, jnp.zeros_like(x)), index, attend))

    def _attention(self, patches: Patches, angles, full: bool) -> Attend:
        """Among the patches of each picture, or of each window."""
        scale = self.config.head_dim**-0.5

        def attend(q, k, v):
            q, k = rotate(q, *angles), rotate(k, *angles)
            if full:
                return sequence_attention(q, k, v, patches.lengths, sm_scale=scale, causal=False)
            return self._window_attention(q, k, v, patches, scale)

        return attend

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
        carry = x, jnp.zeros_like(x)
        for full, indices in groupby(range(config.num_layers), key=is_full.__getitem__):
            numbers = list(indices)
            attend = self._attention(patches, angles, full)
            carry = run_layers(self.layers, carry, numbers[0], numbers[-1] + 1, attend)
        return summed(*carry)
