"""How Qwen2.5-VL sees pictures: of any size, as patches in the order of their attention windows."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from quota_jax.batch import Patches
from quota_jax.config import QwenVlConfig
from quota_jax.errors import QuotaError
from quota_jax.processing.buckets import Buckets, Shape, pinned
from quota_jax.processing.images import pil_image_processor, read_image_settings
from quota_jax.processing.pictures import Bounds, Picture, PictureReader, Video
from quota_jax.processing.windows import patch_coordinates, rope_positions, window_order

PROCESSORS = ("Qwen2VLImageProcessor",)
USUAL_ASPECT = 4
"""Pictures up to this aspect ratio share one bound on the number of attention windows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QwenPictures(PictureReader):
    """A picture of ``rows x columns`` patches is ``rows * columns / merge_unit`` tokens."""

    any_size: ClassVar[bool] = True

    config: QwenVlConfig

    @classmethod
    def from_folder(cls, folder: Path, config: QwenVlConfig, **limits: Any) -> QwenPictures:
        """Reads the settings and checks that they fit the vision tower."""
        source, settings = read_image_settings(folder)
        processor = pil_image_processor(settings, source, PROCESSORS)
        vision = config.vision
        for name, expected in (
            ("patch_size", vision.patch_size),
            ("merge_size", vision.spatial_merge_size),
            ("temporal_patch_size", vision.temporal_patch_size),
        ):
            if getattr(processor, name) != expected:
                raise QuotaError(
                    f"{source}: {name} is {getattr(processor, name)}, the vision tower has "
                    f"{expected}"
                )
        pictures = cls(
            image_processor=processor,
            placeholders={config.image_token_id: "image", config.video_token_id: "video"},
            config=config,
            **limits,
        )
        edge = 4 * vision.patch_size * vision.spatial_merge_size
        try:
            pictures.read(Image.new("RGB", (edge, edge)), "a blank picture")
        except QuotaError as error:
            raise QuotaError(f"{source}: {error}") from None
        return pictures

    def token_id(self, image: Any) -> int:
        config = self.config
        return config.video_token_id if isinstance(image, Video) else config.image_token_id

    def read(self, image: Any, name: str) -> Picture:
        if isinstance(image, Video):
            return self._read_video(image, name)
        patches, grid = self._patches(image, name)
        return Picture(
            pixels=patches[None],
            num_tokens=len(patches) // self.config.vision.merge_unit,
            grid=(1, *grid),
        )

    def _patches(self, image: Any, name: str) -> tuple[np.ndarray, tuple[int, int]]:
        """Patches [rows * columns, values] of a still picture, and the grid."""
        picture = self.open(image, name)
        width, height = picture.size
        try:
            count = self.image_processor.get_number_of_image_patches(height, width, {})
        except Exception as error:  # aspect ratios that the resizing refuses
            raise QuotaError(f"{name}: cannot be processed: {error}") from None
        self.check_growth(picture, count * self.config.vision.patch_size**2, name)
        made = self.process(picture, name)
        patches = np.asarray(made["pixel_values"], np.float32)
        _, rows, columns = (int(size) for size in made["image_grid_thw"][0])
        expected = (rows * columns, self.config.vision.patch_values)
        merge = self.config.vision.spatial_merge_size
        if patches.shape != expected or rows % merge or columns % merge:
            raise QuotaError(
                f"{name}: the image processor makes {rows} x {columns} patches as "
                f"{patches.shape}, the vision tower takes {expected}"
            )
        return patches, (rows, columns)

    def _read_video(self, video: Video, name: str) -> Picture:
        """Frames go through the image processor one by one; neighbours share a temporal patch.

        An incomplete last patch repeats the last frame, as transformers does.
        """
        vision = self.config.vision
        depth = vision.temporal_patch_size
        stills, grids = [], set()
        for place, frame in enumerate(video.frames):
            patches, grid = self._patches(frame, f"frame {place} of {name}")
            # A still picture fills all frames of its patches alike: the first is the picture.
            shape = (len(patches), vision.num_channels, depth, vision.patch_size**2)
            stills.append(patches.reshape(shape)[:, :, 0])
            grids.add(grid)
        if len(grids) > 1:
            raise QuotaError(f"{name}: its frames differ in size")
        rows, columns = grids.pop()
        stills += stills[-1:] * (-len(stills) % depth)
        frames = len(stills) // depth
        stacked = np.stack(stills).reshape(frames, depth, *stills[0].shape)
        patches = stacked.transpose(0, 2, 3, 1, 4).reshape(frames, rows * columns, -1)
        return Picture(
            pixels=patches,
            num_tokens=frames * rows * columns // vision.merge_unit,
            grid=(frames, rows, columns),
            frame_step=vision.tokens_per_second * depth / video.fps,
        )

    def count_tokens(self, size: tuple[int, int]) -> int:
        rows, columns = self._grid(*size)
        return rows * columns // self.config.vision.merge_unit

    def bounds(self, sizes: Sequence[tuple[int, int]], buckets: Buckets) -> Bounds:
        grids = [self._grid(*size) for size in sizes]
        unit, side = self.config.vision.merge_unit, self.config.vision.window_units
        patches = [rows * columns for rows, columns in grids]
        bucket = self._patch_bucket(buckets.for_patches(max(patches, default=0)))
        return Bounds(
            pictures=buckets.for_pictures(len(sizes)),
            visual=buckets.for_visual(sum(map(self.count_tokens, sizes))),
            patches=bucket,
            windows=max_windows(
                bucket // unit, side, max(map(self._window_count, grids), default=0)
            ),
        )

    def _grid(self, width: int, height: int) -> tuple[int, int]:
        """Rows and columns of patches of a picture of this size, as `_patches` finds them."""
        processor = self.image_processor
        if processor.do_resize:
            resize = sys.modules[type(processor).__module__].smart_resize
            height, width = resize(
                height,
                width,
                processor.patch_size * processor.merge_size,
                min_pixels=processor.size["shortest_edge"],
                max_pixels=processor.size["longest_edge"],
            )
        return height // processor.patch_size, width // processor.patch_size

    def _window_count(self, grid: tuple[int, int]) -> int:
        vision = self.config.vision
        rows, columns = (size // vision.spatial_merge_size for size in grid)
        return len(window_order(rows, columns, vision.window_units).lengths)

    def _patch_bucket(self, patches: int) -> int:
        """Whole tokens, and whole blocks of the attention: so padding changes no bit on the CPU."""
        step = math.lcm(self.config.vision.merge_unit, 64)
        return -(-patches // step) * step

    def visual_bucket(
        self, prompts: Sequence[Sequence[Picture]], buckets: Buckets, shape: Shape
    ) -> int:
        shape.refuse("images_per_prompt", why="pin visual_bucket instead")
        most = max(sum(picture.num_tokens for picture in prompt) for prompt in prompts)
        bound = pinned(shape.visual_bucket, most, "visual_bucket", "visual tokens in a prompt")
        return buckets.for_visual(most) if bound is None else bound

    def pack(
        self, pictures: Sequence[Picture], buckets: Buckets, shape: Shape
    ) -> tuple[Patches, list[np.ndarray]]:
        vision = self.config.vision
        unit, side = vision.merge_unit, vision.window_units
        slots = buckets.slots(sum(picture.slots for picture in pictures), shape)
        most = max((picture.pixels.shape[1] for picture in pictures), default=0)
        bucket = pinned(shape.patch_bucket, most, "patch_bucket", "patches in a picture")
        bucket = self._patch_bucket(buckets.for_patches(most) if bucket is None else bucket)
        orders = [
            window_order(*(size // vision.spatial_merge_size for size in picture.grid[1:]), side)
            for picture in pictures
        ]
        windows = max_windows(bucket // unit, side, max(map(_windows, orders), default=0))
        packed: dict[str, Any] = {
            "values": np.zeros((slots, bucket, vision.patch_values), np.float32),
            "coordinates": np.zeros((slots, bucket, 2), np.int32),
            "lengths": np.zeros(slots, np.int32),
            "window_starts": np.zeros((slots, windows), np.int32),
            "window_lengths": np.zeros((slots, windows), np.int32),
            "window_slots": np.zeros((slots, bucket), np.int32),
        }
        rows, slot = [], 0
        for picture, order in zip(pictures, orders, strict=True):
            frames, height, width = picture.grid
            count = height * width
            lengths = order.lengths * unit
            starts = np.cumsum(lengths) - lengths
            window = np.repeat(np.arange(len(lengths)), lengths)
            coordinates = patch_coordinates(height, width, vision.spatial_merge_size)
            shape_of = (frames, count // unit, unit, vision.patch_values)
            values = picture.pixels.reshape(shape_of)[:, order.order]
            for frame in range(frames):
                packed["values"][slot + frame, :count] = values[frame].reshape(count, -1)
                packed["coordinates"][slot + frame, :count] = coordinates[order.order].reshape(
                    count, 2
                )
                packed["lengths"][slot + frame] = count
                packed["window_starts"][slot + frame, : len(starts)] = starts
                packed["window_lengths"][slot + frame, : len(lengths)] = lengths
                packed["window_slots"][slot + frame, :count] = (
                    window * vision.window_patches + np.arange(count) - starts[window]
                )
            first = (slot + np.arange(frames)) * (bucket // unit)
            rows.append((first[:, None] + order.place).reshape(-1))
            slot += frames
        return Patches(**packed), rows

    def positions(self, visual: np.ndarray, pictures: Sequence[Picture]) -> np.ndarray:
        merge = self.config.vision.spatial_merge_size
        grids = [
            (frames, rows // merge, columns // merge)
            for frames, rows, columns in (picture.grid for picture in pictures)
        ]
        return rope_positions(visual, grids, [picture.frame_step for picture in pictures])


def max_windows(tokens: int, side: int, needed: int) -> int:
    """A bound on the attention windows of a picture of up to ``tokens`` visual tokens.

    It depends on the bucket alone for all pictures up to the usual aspect ratio; longer ones take
    the bound of the longest.
    """
    border = side - 1
    edges = (math.sqrt(USUAL_ASPECT) + 1 / math.sqrt(USUAL_ASPECT)) * math.sqrt(tokens)
    usual = math.ceil((tokens + border * edges + border**2) / side**2)
    return usual if needed <= usual else (tokens + border) // side


def _windows(order: Any) -> int:
    return len(order.lengths)
