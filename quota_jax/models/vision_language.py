"""What all models share: visual features merged into the decoder's input embeddings."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from quota_jax.batch import Batch, Patches
from quota_jax.errors import QuotaError
from quota_jax.models.clip import VisionTower
from quota_jax.models.decoder import Decoder
from quota_jax.prune.options import VisionZipOptions
from quota_jax.prune.select import Sequence, budget, grid_of, picture_shares
from quota_jax.prune.visionzip import visionzip
from quota_jax.quantization import QuantizationConfig
from quota_jax.recipe import Recipe, Stage


class VisionLanguageModel(nnx.Module):
    """A vision tower with a projector, and a decoder; ``config`` and ``quantization`` are static.

    A family adds ``visual_features`` and ``project``.
    """

    config: Any  # ModelConfig; a family narrows it
    quantization: QuantizationConfig
    vision: Any
    decoder: Decoder

    def visual_features(self, pixels: Any) -> Float[Array, "R D"]:
        """Projected visual tokens of all picture slots of a batch, flattened."""
        raise NotImplementedError(type(self).__name__)

    def project(self, states: Float[Array, "P V F"]) -> Float[Array, "R D"]:
        """Features of the vision tower -> visual tokens."""
        raise NotImplementedError(type(self).__name__)

    @property
    def dtype(self):
        """The dtype of the residual stream: that of the token embeddings."""
        return self.decoder.embed.dtype

    def embed(self, batch: Batch, features: Float[Array, "R D"]) -> Float[Array, "B S D"]:
        """Token embeddings with visual features in the places of the image tokens."""
        x = self.decoder.embed.rows(batch.tokens)
        if features.shape[0] == 0:
            return x
        visual = features[jnp.maximum(batch.visual_index, 0)]
        return jnp.where(batch.is_visual[..., None], visual.astype(x.dtype), x)

    def decoder_input(
        self, batch: Batch, recipe: Recipe
    ) -> tuple[Float[Array, "B S D"], Sequence, Float[Array, "B S F"] | None]:
        """What ``Decoder.prefill`` takes: embeddings, bookkeeping, and the vision tower's features
        where the recipe reads them.

        Under VisionZip the first visual tokens of each picture already are the new ones.
        """
        sequence = sequence_of(batch)
        if any(needs_grid(stage) for stage in recipe.stages):
            sequence = dataclasses.replace(sequence, grid=self.picture_grid(batch))
        stage = next((stage for stage in recipe.stages if stage.point == "input"), None)
        name = None if stage is None else stage.selector.name
        if name == "visionzip" and not isinstance(self.vision, VisionTower):
            raise QuotaError(
                "selector 'visionzip' needs a vision tower with a class token: "
                f"{self.config.model_type} has none"
            )
        empty = not batch.visual_bucket or jax.tree.leaves(batch.pixels)[0].size == 0
        if stage is None or empty or name not in ("mmtok", "visionzip"):
            vision = jnp.zeros((*batch.tokens.shape, 1)) if name == "mmtok" else None
            return self.embed(batch, self.visual_features(batch.pixels)), sequence, vision
        if name == "mmtok":
            states = self.tower_states(batch.pixels)
            features = self.project(states)
            vision = states.reshape(features.shape[0], -1)[jnp.maximum(batch.visual_index, 0)]
            return self.embed(batch, features), sequence, vision
        features, sequence = self._merged(batch, sequence, stage, recipe)
        return self.embed(batch, features), sequence, None

    def tower_states(self, pixels: Any) -> Float[Array, "P V F"]:
        """What the projector reads. Reshaped to one row per visual token it has all of the token's
        features (Qwen2.5-VL: its patches side by side)."""
        if not isinstance(self.vision, VisionTower):
            return self.vision(pixels)
        states = self.vision(pixels, self.config.feature_states)
        return states[:, 1:] if self.drops_class else states

    @property
    def drops_class(self) -> bool:
        """Whether the tower's class token is none of the visual tokens."""
        return self.config.vision_feature_select_strategy == "default"

    def slot_tokens(self, batch: Batch) -> int:
        """Rows of the visual features that belong to one picture slot."""
        if isinstance(batch.pixels, Patches):
            return batch.pixels.values.shape[1] // self.config.vision.merge_unit
        return self.config.tokens_per_image

    def picture_grid(self, batch: Batch) -> Int[Array, "B S 3"]:
        """Picture slot, row and column of each visual token (a class token stands outside)."""
        index = jnp.maximum(batch.visual_index, 0)
        slot, place = jnp.divmod(index, max(1, self.slot_tokens(batch)))
        if isinstance(batch.pixels, Patches):
            # Rotary positions: rows and columns from a start of the picture's own.
            return jnp.concatenate([slot[..., None], batch.positions[..., 1:]], axis=-1)
        vision = self.config.vision
        place = place if self.drops_class else place - 1
        side = vision.image_size // vision.patch_size
        return jnp.stack([slot, *jnp.divmod(place, side)], axis=-1)

    def _merged(
        self, batch: Batch, sequence: Sequence, stage: Stage, recipe: Recipe
    ) -> tuple[Float[Array, "R D"], Sequence]:
        """VisionZip: features whose first rows of each picture are the new tokens."""
        options, states = stage.selector.options, self.config.feature_states
        assert isinstance(options, VisionZipOptions)
        layer, rows = max(states) - 1, self.slot_tokens(batch)
        if layer < 0:
            raise QuotaError("selector 'visionzip' needs features of a layer, not the embeddings")
        place, share = picture_shares(sequence, budget(sequence, recipe, stage.keep))
        slot = jnp.where(sequence.is_visual, grid_of(sequence)[..., 0], 0)
        pictures = batch.pixels.shape[0]
        shares = jnp.zeros(pictures, jnp.int32).at[slot].max(share.astype(jnp.int32))

        seen = self.vision(batch.pixels, (layer, *states))
        width = self.config.vision.hidden_size
        attention, keys = self.vision.class_attention(seen[..., :width], jnp.int32(layer))
        limit = recipe.target(rows, stage.keep)
        merged, chosen = visionzip(seen[..., width:], attention, keys, shares, limit, options)
        features = self.project(merged).reshape(pictures, limit, -1)
        features = jnp.pad(features, [(0, 0), (0, rows - limit), (0, 0)])

        # A patch stands at its place in the picture, a class token that was none at no place.
        chosen = jnp.pad(chosen - self.drops_class, [(0, 0), (0, rows - limit)])
        behind = chosen[slot, place]
        source = jnp.where(behind < 0, -1, sequence.source - place + behind)
        source = jnp.where(sequence.is_visual, source, sequence.source)
        return features.reshape(pictures * rows, -1), dataclasses.replace(sequence, source=source)


def needs_grid(stage: Stage) -> bool:
    """Whether a stage has to know which picture each visual token belongs to, and where it is."""
    return stage.min_keep_per_image > 0 or stage.selector.name in ("sqap", "visionzip")


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
