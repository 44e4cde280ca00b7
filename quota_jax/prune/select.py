"""Keeps the best visual tokens of each sample and compacts the sequences (Eq. 9)."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from quota_jax.recipe import kept


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=(
        "lengths",
        "positions",
        "next_position",
        "is_visual",
        "visual_count",
        "source",
    ),
    meta_fields=("text_bucket", "visual_bucket", "original_bucket"),
)
@dataclass(frozen=True, kw_only=True)
class Sequence:
    """Bookkeeping of compact sequences inside the decoder.

    ``visual_count`` is the sample's *original* number of visual tokens (budgets are fractions of
    it); ``source`` the place that each token had in the input sequence; ``next_position`` the
    rotary position of the first token after the sequence.
    """

    lengths: Int[Array, " B"]
    positions: Int[Array, "B S"] | Int[Array, "B S 3"]
    next_position: Int[Array, " B"]
    is_visual: Bool[Array, "B S"]
    visual_count: Int[Array, " B"]
    source: Int[Array, "B S"]
    text_bucket: int
    visual_bucket: int
    original_bucket: int

    @property
    def is_real(self) -> Bool[Array, "B S"]:
        return jnp.arange(self.source.shape[1])[None, :] < self.lengths[:, None]

    @property
    def is_text(self) -> Bool[Array, "B S"]:
        return self.is_real & ~self.is_visual


def budget(sequence: Sequence, keep: float) -> Int[Array, " B"]:
    """K of each sample, from a table made in Python (never ``ceil`` in float32 on the device)."""
    table = np.array([kept(n, keep) for n in range(sequence.original_bucket + 1)], np.int32)
    return jnp.asarray(table)[sequence.visual_count]


def keep_mask(
    sequence: Sequence, scores: Float[Array, "B S"], target: Int[Array, " B"]
) -> Bool[Array, "B S"]:
    """All text tokens and the ``target`` best visual ones; ties go to the lowest index."""
    ranked = jnp.where(sequence.is_visual, scores, -jnp.inf)
    order = jnp.argsort(-ranked, axis=1, stable=True)
    rank = jnp.argsort(order, axis=1, stable=True)
    return jnp.where(sequence.is_visual, rank < target[:, None], sequence.is_real)


def select(
    sequence: Sequence, scores: Float[Array, "B S"], keep: float, *, renumber: bool
) -> tuple[Sequence, Int[Array, "B R"]]:
    """The pruned sequence and, for each of its places, the place to gather from.

    Kept tokens stay in ascending order; padding places gather an arbitrary dropped or padding
    token. ``renumber`` gives every token its new place as position, in all streams of a multimodal
    rotation.
    """
    target = budget(sequence, keep)
    mask = keep_mask(sequence, scores, target)
    visual_bucket = kept(sequence.original_bucket, keep)
    length = sequence.text_bucket + visual_bucket
    order = jnp.argsort(~mask, axis=1, stable=True)[:, :length]
    take = functools.partial(jnp.take_along_axis, indices=order, axis=1)
    lengths = mask.sum(1).astype(jnp.int32)
    real = jnp.arange(length)[None, :] < lengths[:, None]
    positions = gather(sequence.positions, order)
    if renumber:
        places = jnp.arange(length).reshape(-1, *[1] * (positions.ndim - 2))
        positions = jnp.broadcast_to(places, positions.shape)
    pruned = dataclasses.replace(
        sequence,
        lengths=lengths,
        positions=positions,
        next_position=lengths if renumber else sequence.next_position,
        is_visual=take(sequence.is_visual) & real,
        source=take(sequence.source),
        visual_bucket=visual_bucket,
    )
    return pruned, order


def gather(x: Array, order: Int[Array, "B R"]) -> Array:
    """Gathers the second axis of ``[B, S, ...]``."""
    return jnp.take_along_axis(x, order.reshape(*order.shape, *[1] * (x.ndim - 2)), axis=1)
