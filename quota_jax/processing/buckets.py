"""Bucket ladders and the assembly of a compact, static-shaped `Batch`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import jax.numpy as jnp
import numpy as np

from quota_jax.batch import Batch
from quota_jax.errors import QuotaError

TEXT_LADDER = (
    *(32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096),
    *(6144, 8192, 12288, 16384, 24576, 32768, 49152, 65536, 98304, 131072),
)
SLOT_LADDER = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)


@dataclass(frozen=True, kw_only=True, slots=True)
class Buckets:
    """Sizes that shapes are rounded up to, so that few programs serve many prompts.

    text: text tokens of the longest prompt. image_slots: pictures of the whole batch (0 first, so
    that text-only batches run no vision tower). batch_size: rows; None leaves the batch as it is.
    """

    text: tuple[int, ...] = TEXT_LADDER
    image_slots: tuple[int, ...] = SLOT_LADDER
    batch_size: tuple[int, ...] | None = None

    def __post_init__(self):
        _check_ladder("text", self.text, lowest=1)
        _check_ladder("image_slots", self.image_slots, lowest=0)
        if self.batch_size is not None:
            _check_ladder("batch_size", self.batch_size, lowest=1)

    def for_text(self, length: int) -> int:
        """The smallest text bucket that holds `length` tokens."""
        return _pick(self.text, length, "text tokens in a prompt", "text")

    def for_images(self, count: int) -> int:
        """The smallest number of picture slots that holds `count` pictures."""
        return _pick(self.image_slots, count, "pictures in the batch", "image_slots")

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

    def __post_init__(self):
        for name, lowest in (("text_bucket", 1), ("image_slots", 0), ("images_per_prompt", 0)):
            value = getattr(self, name)
            if value is not None and (not _is_int(value) or value < lowest):
                raise QuotaError(f"{name} must be an integer of at least {lowest}, got {value!r}")


def assemble(
    prompts: Sequence[np.ndarray],
    pixels: np.ndarray,
    *,
    image_token_id: int,
    tokens_per_image: int,
    buckets: Buckets,
    shape: Shape,
    filler_id: int,
) -> Batch:
    """Lays prompts, each picture one token in them, out as a `Batch`.

    Every image token becomes `tokens_per_image` of them. Pictures are numbered in order of
    appearance over the batch: picture p fills rows p * tokens_per_image onwards of the visual
    features, and its pixels `pixels[p]`. Rows beyond the prompts (`Buckets.batch_size`) hold one
    text token, `filler_id`.

    For two tokens a picture, image token 9, and prompts [1, 9, 5] and [7]:
        tokens [1 9 9 5 0 ..], [7 0 ..]; visual_index [-1 0 1 -1 -1 ..], [-1 ..]; lengths 4, 1

    Args:
        prompts: int[n] token ids each, pictures not expanded.
        pixels: float32[number of pictures, 3, height, width].
    """
    pictures = [int(np.count_nonzero(ids == image_token_id)) for ids in prompts]
    texts = [len(ids) - count for ids, count in zip(prompts, pictures, strict=True)]
    if sum(pictures) != len(pixels):
        raise ValueError(f"{sum(pictures)} image tokens for {len(pixels)} pictures")

    text_bucket = _pinned(shape.text_bucket, max(texts), "text_bucket", "text tokens in a prompt")
    if text_bucket is None:
        text_bucket = buckets.for_text(max(texts))
    per_prompt = _pinned(
        shape.images_per_prompt, max(pictures), "images_per_prompt", "pictures in a prompt"
    )
    if per_prompt is None:
        per_prompt = max(pictures)
    slots = _pinned(shape.image_slots, len(pixels), "image_slots", "pictures in the batch")
    if slots is None:
        slots = buckets.for_images(len(pixels))
    visual_bucket = per_prompt * tokens_per_image
    rows, width = buckets.for_rows(len(prompts)), text_bucket + visual_bucket

    tokens = np.zeros((rows, width), np.int32)
    visual_index = np.full((rows, width), -1, np.int32)
    lengths = np.ones(rows, np.int32)
    tokens[len(prompts) :, 0] = filler_id
    first_feature = 0
    for row, ids in enumerate(prompts):
        is_picture = ids == image_token_id
        repeats = np.where(is_picture, tokens_per_image, 1)
        expanded = np.repeat(ids, repeats)
        visual = np.repeat(is_picture, repeats)
        count = int(visual.sum())
        lengths[row] = len(expanded)
        tokens[row, : len(expanded)] = expanded
        visual_index[row, : len(expanded)][visual] = first_feature + np.arange(count)
        first_feature += count
    slotted = np.zeros((slots, *pixels.shape[1:]), np.float32)
    slotted[: len(pixels)] = pixels
    return Batch(
        tokens=jnp.asarray(tokens),
        lengths=jnp.asarray(lengths),
        visual_index=jnp.asarray(visual_index),
        positions=jnp.asarray(np.tile(np.arange(width, dtype=np.int32), (rows, 1))),
        pixels=jnp.asarray(slotted),
        text_bucket=text_bucket,
        visual_bucket=visual_bucket,
    )


def _pinned(value: int | None, needed: int, name: str, what: str) -> int | None:
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
