"""The static-shaped input of every forward pass."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=(
        "values",
        "coordinates",
        "lengths",
        "window_starts",
        "window_lengths",
        "window_slots",
    ),
    meta_fields=(),
)
@dataclass(frozen=True, kw_only=True)
class Patches:
    """Pictures of any size as patches, for towers with window attention (Qwen2.5-VL).

    Each of ``P`` picture slots (a frame of a video is one too) holds up to ``N`` patches: real ones
    first, in the order of their attention windows, the patches of one visual token next to each
    other. Window ``w`` of a slot is the run of ``window_lengths[w]`` patches from
    ``window_starts[w]``.

    values: normalised pixels, flattened as (channel, frame, row, column).
    coordinates: row and column of each patch in its picture.
    lengths: real patches; unused slots have 0.
    window_slots: place of each patch in the windows laid side by side, each padded to its largest
        size.
    """

    values: Float[Array, "P N values"]
    coordinates: Int[Array, "P N 2"]
    lengths: Int[Array, " P"]
    window_starts: Int[Array, "P W"]
    window_lengths: Int[Array, "P W"]
    window_slots: Int[Array, "P N"]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("tokens", "lengths", "visual_index", "positions", "pixels"),
    meta_fields=("text_bucket", "visual_bucket"),
)
@dataclass(frozen=True, kw_only=True)
class Batch:
    """Compact sequences: real tokens first, padding (id 0) only at the end.

    ``S = text_bucket + visual_bucket``; every sample has at most ``text_bucket`` text tokens and
    at most ``visual_bucket`` visual tokens. With both bounds static, a pruning stage knows the
    longest sequence it can leave behind: ``text_bucket + K(visual_bucket)``.

    tokens: image tokens are already expanded (the image token id repeated).
    visual_index: row of the flattened visual features that stands at this place; -1 for text and
        padding.
    positions: rotary positions; three streams (frame, row, column) where the decoder's rotation is
        multimodal.
    pixels: the picture slots of the whole batch in order of appearance, unused ones zero:
        Float[Array, "P 3 height width"] (LLaVA-1.5) or `Patches` (Qwen2.5-VL).
    """

    tokens: Int[Array, "B S"]
    lengths: Int[Array, " B"]
    visual_index: Int[Array, "B S"]
    positions: Int[Array, "B S"] | Int[Array, "B S 3"]
    pixels: Any
    text_bucket: int = field(metadata={"static": True})
    visual_bucket: int = field(metadata={"static": True})

    @property
    def batch_size(self) -> int:
        return self.tokens.shape[0]

    @property
    def seq_len(self) -> int:
        return self.text_bucket + self.visual_bucket

    @property
    def is_real(self) -> Bool[Array, "B S"]:
        return jnp.arange(self.tokens.shape[1])[None, :] < self.lengths[:, None]

    @property
    def is_visual(self) -> Bool[Array, "B S"]:
        return (self.visual_index >= 0) & self.is_real

    @property
    def next_position(self) -> Int[Array, " B"]:
        """The rotary position after the largest one of each sample: that of the first new token."""
        largest = self.positions.reshape(*self.tokens.shape, -1).max(-1)
        return jnp.where(self.is_real, largest, -1).max(1).astype(jnp.int32) + 1
