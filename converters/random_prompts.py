"""Seeded random prompts with pictures of random values, for us and for transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from quota_jax.batch import Batch, Patches
from quota_jax.config import LlavaConfig, ModelConfig, QwenVlConfig
from quota_jax.processing.buckets import Buckets, Shape, assemble
from quota_jax.processing.pictures import Picture
from quota_jax.processing.qwen_pictures import QwenPictures

TEXT_LENGTHS = (24, 9)
TOKENS_BEFORE_PICTURE = 3
LARGEST_WINDOW = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class RandomPrompts:
    """A prompt of each text length with one picture of random values: our batch, and for every
    prompt the keyword arguments of transformers' model."""

    batch: Batch
    reference: tuple[dict[str, np.ndarray], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Visual:
    """One picture a prompt: the tower's input, feature rows and positions of each prompt, and what
    transformers takes."""

    pixels: np.ndarray | Patches
    rows: list[np.ndarray]
    positions: list[np.ndarray]
    reference: list[dict[str, np.ndarray]]


def random_prompts(config: ModelConfig) -> RandomPrompts:
    """Always the same prompts for a configuration; their texts hold any id but placeholders."""
    rng = np.random.default_rng(0)
    placeholders = [config.image_token_id]
    if isinstance(config, QwenVlConfig):
        placeholders.append(config.video_token_id)
    ids = np.setdiff1d(np.arange(config.text.vocab_size), placeholders).astype(np.int32)
    prompts = [
        np.insert(rng.choice(ids, length), TOKENS_BEFORE_PICTURE, config.image_token_id)
        for length in TEXT_LENGTHS
    ]
    if isinstance(config, QwenVlConfig):
        visual = _qwen(config, prompts, rng)
    else:
        visual = _llava(config, prompts, rng)
    batch = assemble(
        prompts,
        [[rows] for rows in visual.rows],
        visual.positions,
        visual.pixels,
        placeholders=placeholders,
        text_bucket=max(TEXT_LENGTHS),
        visual_bucket=max(map(len, visual.rows)),
        batch_size=len(prompts),
        filler_id=0,
    )
    rows = zip(batch.tokens, batch.lengths, visual.reference, strict=True)
    reference = tuple(
        {"input_ids": np.asarray(tokens[:length], np.int64)[None], **given}
        for tokens, length, given in rows
    )
    return RandomPrompts(batch=batch, reference=reference)


def _llava(config: LlavaConfig, prompts: Sequence[np.ndarray], rng: np.random.Generator) -> _Visual:
    vision, tokens = config.vision, config.tokens_per_image
    shape = (len(prompts), vision.num_channels, vision.image_size, vision.image_size)
    pixels = rng.standard_normal(shape, dtype=np.float32)
    return _Visual(
        pixels=pixels,
        rows=[slot * tokens + np.arange(tokens) for slot in range(len(prompts))],
        positions=[np.arange(len(prompt) - 1 + tokens) for prompt in prompts],
        reference=[{"pixel_values": picture[None]} for picture in pixels],
    )


def _qwen(config: QwenVlConfig, prompts: Sequence[np.ndarray], rng: np.random.Generator) -> _Visual:
    """Pictures of different sizes; the first has whole attention windows and parts of some."""
    vision = config.vision
    side, merge = min(vision.window_units, LARGEST_WINDOW), vision.spatial_merge_size
    # Nothing is read from files here, so there is no image processor.
    reader = QwenPictures(image_processor=None, config=config)
    pictures, positions, reference = [], [], []
    for prompt, (rows, columns) in zip(prompts, ((side + 1, 2 * side + 1), (2, 3)), strict=True):
        tokens, grid = rows * columns, (1, rows * merge, columns * merge)
        shape = (1, tokens * vision.merge_unit, vision.patch_values)
        values = rng.standard_normal(shape, dtype=np.float32)
        picture = Picture(pixels=values, num_tokens=tokens, grid=grid)
        is_picture = prompt == config.image_token_id
        pictures.append(picture)
        positions.append(reader.positions(is_picture, [picture]))
        reference.append(
            {
                "pixel_values": values[0],
                "image_grid_thw": np.array([grid]),
                # Without these transformers silently takes plain positions.
                "mm_token_type_ids": np.repeat(
                    is_picture.astype(np.int64), np.where(is_picture, tokens, 1)
                )[None],
            }
        )
    pixels, rows_of = reader.pack(pictures, Buckets(), Shape())
    return _Visual(pixels=pixels, rows=rows_of, positions=positions, reference=reference)
