"""LLaVA-1.5: pictures through CLIP and the projector, merged into the decoder's input
embeddings."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from quota_jax.batch import Batch
from quota_jax.config import LlavaConfig
from quota_jax.models.build import linear, module_bits, tree
from quota_jax.models.clip import VisionTower
from quota_jax.models.decoder import Decoder
from quota_jax.nn.mlp import activation
from quota_jax.prune.select import Sequence
from quota_jax.quantization import QuantizationConfig


class Llava(nnx.Module):
    """The whole model as one pytree; ``config`` and ``quantization`` are static."""

    def __init__(self, params: dict, config: LlavaConfig, quantization: QuantizationConfig):
        self.config = config
        self.quantization = quantization
        self.vision = VisionTower(
            params["vision"], config.vision, module_bits(quantization, "vision")
        )
        bits = module_bits(quantization, "projector")
        projector = params["projector"]
        self.projector = tree(
            linear_1=linear(projector["linear_1"], bits),
            linear_2=linear(projector["linear_2"], bits),
        )
        self.decoder = Decoder(params["decoder"], config.text, quantization)

    @property
    def dtype(self):
        """The dtype of the residual stream: that of the token embeddings."""
        return self.decoder.embed.weight[...].dtype

    def visual_features(self, pixels: Float[Array, "P 3 height width"]) -> Float[Array, "R D"]:
        """Projected visual tokens of all picture slots, flattened: ``[P * tokens_per_image,
        D]``."""
        config = self.config
        if pixels.shape[0] == 0:
            return jnp.zeros((0, config.text.hidden_size), self.dtype)
        states = self.vision(pixels, config.feature_states)
        if config.vision_feature_select_strategy == "default":
            states = states[:, 1:]
        hidden = self.projector.linear_1(states.astype(self.dtype))
        hidden = activation(config.projector_hidden_act)(hidden)
        hidden = self.projector.linear_2(hidden)
        return hidden.reshape(-1, hidden.shape[-1])

    def embed(self, batch: Batch, features: Float[Array, "R D"]) -> Float[Array, "B S D"]:
        """Token embeddings with visual features in the places of the image tokens."""
        vocabulary = self.config.text.vocab_size
        x = self.decoder.embed.weight[...][jnp.clip(batch.tokens, 0, vocabulary - 1)]
        if features.shape[0] == 0:
            return x
        visual = features[jnp.maximum(batch.visual_index, 0)]
        return jnp.where(batch.is_visual[..., None], visual.astype(x.dtype), x)


def sequence_of(batch: Batch) -> Sequence:
    """The decoder's bookkeeping for an unpruned batch."""
    places = jnp.broadcast_to(jnp.arange(batch.tokens.shape[1]), batch.tokens.shape)
    return Sequence(
        lengths=batch.lengths.astype(jnp.int32),
        positions=batch.positions,
        is_visual=batch.is_visual,
        visual_count=batch.is_visual.sum(1).astype(jnp.int32),
        source=places,
        text_bucket=batch.text_bucket,
        visual_bucket=batch.visual_bucket,
        original_bucket=batch.visual_bucket,
    )
