"""What all models share: visual features merged into the decoder's input embeddings."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from quota_jax.batch import Batch
from quota_jax.models.decoder import Decoder
from quota_jax.prune.select import Sequence
from quota_jax.quantization import QuantizationConfig


class VisionLanguageModel(nnx.Module):
    """A vision tower with a projector, and a decoder; ``config`` and ``quantization`` are static.

    A family adds ``visual_features``.
    """

    config: Any  # ModelConfig; a family narrows it
    quantization: QuantizationConfig
    decoder: Decoder

    def visual_features(self, pixels: Any) -> Float[Array, "R D"]:
        """Projected visual tokens of all picture slots of a batch, flattened."""
        raise NotImplementedError(type(self).__name__)

    @property
    def dtype(self):
        """The dtype of the residual stream: that of the token embeddings."""
        return self.decoder.embed.weight[...].dtype

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
        next_position=batch.next_position,
        is_visual=batch.is_visual,
        visual_count=batch.is_visual.sum(1).astype(jnp.int32),
        source=places,
        text_bucket=batch.text_bucket,
        visual_bucket=batch.visual_bucket,
        original_bucket=batch.visual_bucket,
    )
