"""CLIP vision transformer up to the feature layers that the projector reads.

Packed layers run in few launches (``vision_layers``).
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pallas_kernels.attention import sequence_attention
from pallas_kernels.stable import exp_difference, fixed_order_sum, matmul, rounded, summed
from quota_jax.config import VisionConfig
from quota_jax.models.build import attention, linear, mlp, norm, tree
from quota_jax.models.vision_layers import Attend, plain_layer, run_layers


class VisionTower(nnx.Module):
    """Pre-norm transformer over patches and a class token; layers stacked ``[L, ...]``."""

    def __init__(self, params: dict, config: VisionConfig, bits: dict):
        eps = config.layer_norm_eps
        layers = params["layers"]
        self.config = config
        self.class_embed = nnx.Param(params["class_embed"])
        self.patch_embed = linear(params["patch_embed"], {})
        self.position_embed = linear(params["position_embed"], {})
        self.pre_norm = norm(params["pre_norm"], eps)
        self.post_norm = norm(params["post_norm"], eps)
        self.layers = tree(
            norm1=norm(layers["norm1"], eps),
            norm2=norm(layers["norm2"], eps),
            attn=attention(
                layers["attn"], bits, config.num_heads, config.num_heads, config.head_dim
            ),
            mlp=mlp(layers["mlp"], bits, config.hidden_act),
        )

    def embed(self, pixels: Float[Array, "P C height width"]) -> Float[Array, "P V D"]:
        """Patch and position embeddings behind the class token, then the pre-norm."""
        config = self.config
        side, patch = config.image_size // config.patch_size, config.patch_size
        weight = self.patch_embed.weight[...]
        pixels = pixels[:, :, : side * patch, : side * patch].astype(weight.dtype)
        count, channels = pixels.shape[:2]
        cut = pixels.reshape(count, channels, side, patch, side, patch)
        cut = cut.transpose(0, 2, 4, 1, 3, 5).reshape(-1, channels * patch * patch)
        patches = matmul(cut, weight.reshape(weight.shape[0], -1))
        patches = patches.astype(weight.dtype).reshape(count, side * side, weight.shape[0])
        first = jnp.broadcast_to(
            self.class_embed[...].astype(weight.dtype), (count, 1, patches.shape[-1])
        )
        x = jnp.concatenate([first, patches], axis=1)
        return self.pre_norm(x + self.position_embed.weight[...].astype(x.dtype))

    def class_attention(
        self, x: Float[Array, "P V D"], index: Array
    ) -> tuple[Float[Array, "P V"], Float[Array, "P V H"]]:
        """In the layer that reads ``x``: the attention of the class token, summed over heads, and
        the keys, mean over heads; float32."""
        q, k, _ = self.layers.attn.project(self.layers.norm1(x, index), index)
        query, key = q[:, 0].astype(jnp.float32), k.astype(jnp.float32)
        products = rounded(rounded(query * self.config.head_dim**-0.5)[:, None] * key)
        scores = fixed_order_sum(products)
        weights = exp_difference(scores, scores.max(1, keepdims=True))
        weights = rounded(weights / fixed_order_sum(weights.swapaxes(1, 2))[:, None])
        heads = fixed_order_sum(k.astype(jnp.float32).transpose(0, 1, 3, 2))
        return fixed_order_sum(weights), rounded(heads / k.shape[2])

    def layer(self, x: Float[Array, "P V D"], index: Array) -> Float[Array, "P V D"]:
        """One layer, module by module, as calibration has to see it."""
        attend = self._attention(*x.shape[:2])
        return summed(*plain_layer(self.layers, (x, jnp.zeros_like(x)), index, attend))

    def _attention(self, pictures: int, tokens: int) -> Attend:
        """Among the first ``tokens`` rows of each picture."""
        return functools.partial(
            sequence_attention,
            lengths=jnp.full((pictures,), tokens, jnp.int32),
            sm_scale=self.config.head_dim**-0.5,
            causal=False,
        )

    def __call__(
        self, pixels: Float[Array, "P C height width"], states: tuple[int, ...]
    ) -> Float[Array, "P V D"]:
        """Hidden states ``states`` (0 is the embedding), concatenated along the features."""
        x = self.embed(pixels)
        found = {0: x}
        tokens, done = x.shape[1], 0
        if self.layers.attn.qkv.obstacle is None:
            # Matmul kernels take rows by eight: made so once, not before each of them.
            x = jnp.pad(x, [(0, 0), (0, -tokens % 8), (0, 0)])

        attend = self._attention(x.shape[0], tokens)
        carry = x, jnp.zeros_like(x)
        for state in sorted(set(states) - {0}):
            carry = run_layers(self.layers, carry, done, state, attend)
            found[state], done = summed(*carry)[:, :tokens], state
        return jnp.concatenate([found[state] for state in states], axis=-1)
