"""The static-shaped input of every forward pass."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


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
    visual_index: row of the flattened visual features ``[P * tokens_per_image, D]`` that stands at
        this place; -1 for text and padding.
    pixels: ``P`` picture slots of the whole batch in order of appearance; unused slots are zeros.
    """

    tokens: Int[Array, "B S"]
    lengths: Int[Array, " B"]
    visual_index: Int[Array, "B S"]
    positions: Int[Array, "B S"]
    pixels: Float[Array, "P 3 height width"]
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
