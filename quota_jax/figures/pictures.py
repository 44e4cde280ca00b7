"""Pictures as the vision tower sees them, and where each visual token is in them."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float, Int

from quota_jax.batch import Batch, Patches
from quota_jax.config import ModelConfig, QwenVlConfig


def token_cells(config: ModelConfig, batch: Batch) -> Int[np.ndarray, "B S 3"]:
    """Picture slot, row and column of every visual token, in cells of the picture's token grid; -1
    elsewhere, and as row and column of a class token."""
    index = np.asarray(batch.visual_index)
    visual = np.asarray(batch.is_visual)
    if isinstance(config, QwenVlConfig):
        assert isinstance(batch.pixels, Patches)
        unit, merge = config.vision.merge_unit, config.vision.spatial_merge_size
        slot, place = np.divmod(np.maximum(index, 0), batch.pixels.values.shape[1] // unit)
        cells = np.asarray(batch.pixels.coordinates)[slot, place * unit] // merge
        rows, columns = cells[..., 0], cells[..., 1]
    else:
        slot, place = np.divmod(np.maximum(index, 0), config.tokens_per_image)
        place = place - (config.tokens_per_image - config.vision.num_patches)
        rows, columns = np.divmod(place, config.vision.image_size // config.vision.patch_size)
        columns = np.where(place < 0, -1, columns)
    return np.where(visual[..., None], np.stack([slot, rows, columns], axis=-1), -1)


def pixel_scale(image_processor: Any) -> tuple[np.ndarray, np.ndarray]:
    """``mean, std`` with which ``pixels * std + mean`` is the picture again, 0 to 1: the inverse of
    a Hugging Face image processor's rescaling and normalisation."""
    full = 255 * (image_processor.rescale_factor if image_processor.do_rescale else 1)
    mean, std = np.zeros(3), np.ones(3)
    if image_processor.do_normalize:
        mean, std = np.array(image_processor.image_mean), np.array(image_processor.image_std)
    return mean / full, std / full


def seen_pictures(
    config: ModelConfig, batch: Batch, mean: np.ndarray, std: np.ndarray
) -> list[Float[np.ndarray, "rows columns 3"]]:
    """Each used picture slot as the vision tower sees it, cropped and resized: float [rows,
    columns, 3] in 0 to 1.

    ``mean`` and ``std`` undo the processor's normalisation, see ``pixel_scale``. A video's patches
    hold several frames: the first one is taken.
    """
    if isinstance(config, QwenVlConfig):
        pictures = _from_patches(config, batch)
    else:
        used = int(np.asarray(batch.visual_index).max(initial=-1)) // config.tokens_per_image + 1
        # A convolution of whole patches leaves a rest at the lower and right edge unseen.
        edge = config.vision.image_size // config.vision.patch_size * config.vision.patch_size
        pictures = list(np.asarray(batch.pixels)[:used, :, :edge, :edge].transpose(0, 2, 3, 1))
    return [np.clip(picture * std + mean, 0, 1) for picture in pictures]


def _from_patches(config: QwenVlConfig, batch: Batch) -> list[Float[np.ndarray, "rows columns 3"]]:
    vision, patches = config.vision, batch.pixels
    assert isinstance(patches, Patches)
    edge, found = vision.patch_size, []
    for values, coordinates, length in zip(
        np.asarray(patches.values),
        np.asarray(patches.coordinates),
        np.asarray(patches.lengths),
        strict=True,
    ):
        if not length:
            continue
        rows, columns = coordinates[:length].max(0) + 1
        shape = (length, vision.num_channels, vision.temporal_patch_size, edge, edge)
        tiles = values[:length].reshape(shape)[:, :, 0]
        grid = np.zeros((rows, columns, vision.num_channels, edge, edge), np.float32)
        grid[coordinates[:length, 0], coordinates[:length, 1]] = tiles
        found.append(grid.transpose(0, 3, 1, 4, 2).reshape(rows * edge, columns * edge, -1))
    return found
