"""Bucket ladders and the assembly of a compact, static-shaped `Batch`."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from quota_jax.batch import Batch, Patches
from quota_jax.errors import QuotaError

TEXT_LADDER = (
    *(32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096),
    *(6144, 8192, 12288, 16384, 24576, 32768, 49152, 65536, 98304, 131072),
)
VISUAL_LADDER = (
    *(0, 16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512, 640, 768, 896),
    *(1024, 1280, 1536, 1792, 2048, 2560, 3072, 3584, 4096, 5120, 6144, 7168, 8192, 10240, 12288),
    *(14336, 16384, 20480, 24576, 28672, 32768, 49152, 65536, 98304, 131072),
)
PATCH_LADDER = tuple(4 * tokens for tokens in VISUAL_LADDER)
SLOT_LADDER = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)


@dataclass(frozen=True, kw_only=True, slots=True)
class Buckets:
    """Sizes that shapes are rounded up to, so that few programs serve many prompts.

    text: text tokens of the longest prompt. image_slots: pictures of the whole batch (0 first, so
    that text-only batches run no vision tower). visual, patches: where pictures differ in size, the
    visual tokens of a prompt and the patches of a picture; equal steps, so that one picture takes
    the same step in both. batch_size: rows; None leaves the batch as it is.
    """

    text: tuple[int, ...] = TEXT_LADDER
    image_slots: tuple[int, ...] = SLOT_LADDER
    visual: tuple[int, ...] = VISUAL_LADDER
    patches: tuple[int, ...] = PATCH_LADDER
    batch_size: tuple[int, ...] | None = None

    def __post_init__(self):
        _check_ladder("text", self.text, lowest=1)
        for name in ("image_slots", "visual", "patches"):
            _check_ladder(name, getattr(self, name), lowest=0)
        if self.batch_size is not None:
            _check_ladder("batch_size", self.batch_size, lowest=1)

    def for_text(self, length: int) -> int:
        """The smallest text bucket that holds `length` tokens."""
        return _pick(self.text, length, "text tokens in a prompt", "text")

    def for_visual(self, count: int) -> int:
        """The smallest visual bucket that holds `count` tokens."""
        return _pick(self.visual, count, "visual tokens in a prompt", "visual")

    def for_patches(self, count: int) -> int:
        """The smallest patch bucket that holds a picture of `count` patches."""
        return _pick(self.patches, count, "patches in a picture", "patches")

    def for_pictures(self, count: int) -> int:
        """The smallest step of `image_slots` that holds `count` pictures."""
        return _pick(self.image_slots, count, "pictures", "image_slots")

    def slots(self, count: int, shape: Shape) -> int:
        """Picture slots for `count` pictures: the pinned number, or the smallest step."""
        slots = pinned(shape.image_slots, count, "image_slots", "pictures in the batch")
        return self.for_pictures(count) if slots is None else slots

    def for_rows(self, count: int) -> int:
        """The number of batch rows for `count` prompts."""
        if self.batch_size is None:
            return count
        return _pick(self.batch_size, count, "prompts in the batch", "batch_size")


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Bounds that the caller pins; None leaves one to the ladders. See `Processor.__call__`."""

    text_bucket: int | None = None
    image_slots: int | None = None
    images_per_prompt: int | None = None
    visual_bucket: int | None = None
    patch_bucket: int | None = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            name, value = field.name, getattr(self, field.name)
            lowest = 1 if name == "text_bucket" else 0
            if value is not None and (not _is_int(value) or value < lowest):
                raise QuotaError(f"{name} must be an integer of at least {lowest}, got {value!r}")

    def refuse(self, *names: str, why: str) -> None:
        """Bounds that mean nothing for a model family are an error, not ignored."""
        for name in names:
            if getattr(self, name) is not None:
                raise QuotaError(f"{name} cannot be pinned for this model: {why}")


def read_shape(pins: Mapping[str, int | None]) -> Shape:
    """The bounds of a caller's keyword arguments; an unknown name is refused."""
    known = [field.name for field in dataclasses.fields(Shape)]
    if unknown := sorted(set(pins) - set(known)):
        raise QuotaError(f"unknown bound {unknown[0]!r}; known: {', '.join(known)}")
    return Shape(**pins)


def assemble(
    prompts: Sequence[np.ndarray],
    visual_rows: Sequence[Sequence[np.ndarray]],
    positions: Sequence[np.ndarray],
    pixels: np.ndarray | Patches,
    **layout: Any,
) -> Batch:
    """The batch that `lay_out` makes of the same arguments, on the device."""
    return jax.tree.map(jnp.asarray, lay_out(prompts, visual_rows, positions, pixels, **layout))


def lay_out(
    prompts: Sequence[np.ndarray],
    visual_rows: Sequence[Sequence[np.ndarray]],
    positions: Sequence[np.ndarray],
    pixels: np.ndarray | Patches,
    *,
    placeholders: Collection[int],
    text_bucket: int,
    visual_bucket: int,
    batch_size: int,
    filler_id: int,
) -> Batch:
    """Lays prompts, each picture one token in them, out as a `Batch` of numpy arrays.

    Every placeholder becomes as many tokens as its picture has rows. Rows of the batch beyond the
    prompts hold one text token, `filler_id`.

    For image token 9, prompts [1, 9, 5] and [7], and rows [[4, 3]], []:
        tokens [1 9 9 5 0 ..], [7 0 ..]; visual_index [-1 4 3 -1 -1 ..], [-1 ..]; lengths 4, 1

    Args:
        prompts: int[n] token ids each, pictures not expanded.
        visual_rows: for each picture of each prompt the rows of the visual features of its tokens.
        positions: int[n] or int[n, 3] rotary positions of each prompt, pictures expanded.
        pixels: what the vision tower reads.
    """
    width = text_bucket + visual_bucket
    tokens = np.zeros((batch_size, width), np.int32)
    visual_index = np.full((batch_size, width), -1, np.int32)
    lengths = np.ones(batch_size, np.int32)
    tokens[len(prompts) :, 0] = filler_id
    streams = positions[0].shape[1:]
    places = np.zeros((batch_size, width, *streams), np.int32)
    # Padding goes on counting: positions are never read there, but stay in the usual range.
    places += np.arange(width, dtype=np.int32).reshape(-1, *[1] * len(streams))
    for row, (ids, rows, place) in enumerate(zip(prompts, visual_rows, positions, strict=True)):
        is_picture = np.isin(ids, list(placeholders))
        repeats = np.ones(len(ids), np.int64)
        repeats[is_picture] = [len(part) for part in rows]
        expanded = np.repeat(ids, repeats)
        visual = np.repeat(is_picture, repeats)
        length = len(expanded)
        lengths[row] = length
        tokens[row, :length] = expanded
        if rows:
            visual_index[row, :length][visual] = np.concatenate(rows)
        places[row, :length] = place
    host: dict[str, Any] = {
        "tokens": tokens,
        "lengths": lengths,
        "visual_index": visual_index,
        "positions": places,
        "pixels": pixels,
    }
    return Batch(**host, text_bucket=text_bucket, visual_bucket=visual_bucket)


def pinned(value: int | None, needed: int, name: str, what: str) -> int | None:
    """A pinned bound, refused if it is too small for what is needed."""
    if value is not None and needed > value:
        raise QuotaError(f"{name}={value} is too small: there are {needed} {what}")
    return value


def _pick(ladder: tuple[int, ...], needed: int, what: str, name: str) -> int:
    for size in ladder:
        if size >= needed:
            return size
    raise QuotaError(f"{needed} {what}: the largest {name} bucket is {ladder[-1]}")


def _check_ladder(name: str, ladder: tuple[int, ...], *, lowest: int) -> None:
    if not isinstance(ladder, tuple) or not ladder or not all(map(_is_int, ladder)):
        raise QuotaError(f"buckets {name!r} must be a non-empty tuple of integers, got {ladder!r}")
    if ladder[0] < lowest or any(a >= b for a, b in pairwise(ladder)):
        raise QuotaError(f"buckets {name!r} must rise from at least {lowest}, got {ladder!r}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
