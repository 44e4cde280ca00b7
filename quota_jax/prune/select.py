"""Keeps the best visual tokens of each sample and compacts the sequences (Eq. 9)."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from quota_jax.errors import QuotaError
from quota_jax.recipe import Recipe, Stage


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=(
        "lengths",
        "positions",
        "next_position",
        "is_visual",
        "visual_count",
        "source",
        "grid",
    ),
    meta_fields=("text_bucket", "visual_bucket", "original_bucket"),
)
@dataclass(frozen=True, kw_only=True)
class Sequence:
    """Bookkeeping of compact sequences inside the decoder.

    ``visual_count`` is the sample's *original* number of visual tokens (budgets are fractions of
    it); ``source`` the place that each token had in the input sequence, -1 for a new token that
    stands for none (VisionZip's class token); ``next_position`` the rotary position of the first
    token after the sequence; ``grid`` the picture slot of each visual token and its row and column
    in it (None where nobody needs to know; ascending slots within a sample).
    """

    lengths: Int[Array, " B"]
    positions: Int[Array, "B S"] | Int[Array, "B S 3"]
    next_position: Int[Array, " B"]
    is_visual: Bool[Array, "B S"]
    visual_count: Int[Array, " B"]
    source: Int[Array, "B S"]
    grid: Int[Array, "B S 3"] | None = None
    text_bucket: int
    visual_bucket: int
    original_bucket: int

    @property
    def is_real(self) -> Bool[Array, "B S"]:
        return jnp.arange(self.source.shape[1])[None, :] < self.lengths[:, None]

    @property
    def is_text(self) -> Bool[Array, "B S"]:
        return self.is_real & ~self.is_visual


def budget(sequence: Sequence, recipe: Recipe, keep: float) -> Int[Array, " B"]:
    """K of each sample, from a table made in Python (never ``ceil`` in float32 on the device)."""
    table = [recipe.target(n, keep) for n in range(sequence.original_bucket + 1)]
    return jnp.asarray(np.array(table, np.int32))[sequence.visual_count]


def keep_mask(
    sequence: Sequence, scores: Float[Array, "B S"], target: Int[Array, " B"], least: int = 0
) -> Bool[Array, "B S"]:
    """All text tokens and the ``target`` best visual ones; ties go to the lowest index.

    ``least``: the floor of each picture, see ``Stage.min_keep_per_image``.
    """
    ranked = jnp.where(sequence.is_visual, scores, -jnp.inf)
    order = jnp.argsort(-ranked, axis=1, stable=True)
    rank = jnp.argsort(order, axis=1, stable=True)
    if least:
        # Turns of the pictures come before ranks among all.
        turn = jnp.minimum(picture_rank(sequence, rank), least)
        places = jnp.broadcast_to(jnp.arange(rank.shape[1]), rank.shape)
        hidden = ~sequence.is_visual
        *_, order = jax.lax.sort((hidden, turn, rank, places), dimension=1, num_keys=3)
        rank = jnp.argsort(order, axis=1, stable=True)
    return jnp.where(sequence.is_visual, rank < target[:, None], sequence.is_real)


def picture_rank(sequence: Sequence, rank: Int[Array, "B S"]) -> Int[Array, "B S"]:
    """The rank of each visual token among those of its picture, from 0."""
    places = jnp.broadcast_to(jnp.arange(rank.shape[1]), rank.shape)
    slot = jnp.where(sequence.is_visual, grid_of(sequence)[..., 0], -1)
    slot, _, order = jax.lax.sort((slot, rank, places), dimension=1, num_keys=2)
    starts = jnp.concatenate([jnp.ones_like(slot[:, :1], bool), slot[:, 1:] != slot[:, :-1]], 1)
    inside = places - jax.lax.cummax(jnp.where(starts, places, 0), axis=1)
    return jnp.take_along_axis(inside, jnp.argsort(order, axis=1, stable=True), axis=1)


def picture_shares(
    sequence: Sequence, target: Int[Array, " B"]
) -> tuple[Int[Array, "B S"], Int[Array, "B S"]]:
    """For each visual token of a whole sequence: its place in its picture, from 0, and the
    picture's share of the sample's ``target``.

    Shares of P pictures differ by at most 1: ``K (p + 1) // P - K p // P``. 0 elsewhere.
    """
    visual, slot = sequence.is_visual, grid_of(sequence)[..., 0]
    last = jax.lax.cummax(jnp.where(visual, slot, -1), axis=1)
    before = jnp.concatenate([jnp.full_like(last[:, :1], -1), last[:, :-1]], axis=1)
    first = visual & (slot != before)
    picture, pictures = jnp.cumsum(first, axis=1), jnp.maximum(first.sum(1), 1)[:, None]
    ordinal = jnp.cumsum(visual, axis=1) - 1
    place = ordinal - jax.lax.cummax(jnp.where(first, ordinal, 0), axis=1)
    whole = target[:, None]
    share = whole * picture // pictures - whole * (picture - 1) // pictures
    return jnp.where(visual, place, 0), jnp.where(visual, share, 0)


def grid_of(sequence: Sequence) -> Int[Array, "B S 3"]:
    if sequence.grid is None:
        raise QuotaError("this recipe needs to know which picture each visual token belongs to")
    return sequence.grid


def select(
    sequence: Sequence, scores: Float[Array, "B S"], stage: Stage, recipe: Recipe
) -> tuple[Sequence, Int[Array, "B R"]]:
    """The pruned sequence and, for each of its places, the place to gather from.

    Kept tokens stay in ascending order; padding places gather an arbitrary dropped or padding
    token. Positions "renumber" give every token its new place as position, in all streams of a
    multimodal rotation.
    """
    renumber = recipe.positions == "renumber"
    target = budget(sequence, recipe, stage.keep)
    mask = keep_mask(sequence, scores, target, stage.min_keep_per_image)
    visual_bucket = recipe.target(sequence.original_bucket, stage.keep)
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
        grid=None if sequence.grid is None else gather(sequence.grid, order),
        visual_bucket=visual_bucket,
    )
    return pruned, order


def gather(x: Array, order: Int[Array, "B R"]) -> Array:
    """Gathers the second axis of ``[B, S, ...]``."""
    return jnp.take_along_axis(x, order.reshape(*order.shape, *[1] * (x.ndim - 2)), axis=1)
