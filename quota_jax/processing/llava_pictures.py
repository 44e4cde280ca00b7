"""How LLaVA-1.5 sees pictures: all of one size, each the same number of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from quota_jax.config import LlavaConfig
from quota_jax.errors import QuotaError
from quota_jax.processing.buckets import Buckets, Shape, pinned
from quota_jax.processing.images import pil_image_processor, read_image_settings
from quota_jax.processing.pictures import Bounds, Picture, PictureReader, Video

PROCESSORS = ("CLIPImageProcessor", "CLIPFeatureExtractor", "LlavaImageProcessor")


@dataclass(frozen=True, kw_only=True, slots=True)
class LlavaPictures(PictureReader):
    """Each picture is one float32[3, image_size, image_size] and ``tokens_per_image`` tokens."""

    any_size: ClassVar[bool] = False

    image_token_id: int
    image_size: int
    tokens_per_image: int

    @classmethod
    def from_folder(cls, folder: Path, config: LlavaConfig, **limits: Any) -> LlavaPictures:
        """Reads the settings and checks on a blank picture that they fit the vision tower."""
        if config.vision.num_channels != 3:
            raise QuotaError(f"the vision tower takes {config.vision.num_channels} channels, not 3")
        source, settings = read_image_settings(folder)
        pictures = cls(
            image_processor=pil_image_processor(settings, source, PROCESSORS),
            placeholders={config.image_token_id: "image"},
            image_token_id=config.image_token_id,
            image_size=config.vision.image_size,
            tokens_per_image=config.tokens_per_image,
            **limits,
        )
        size = config.vision.image_size
        try:
            pictures.read(Image.new("RGB", (3 * size // 2, size)), "a blank picture")
        except QuotaError as error:
            raise QuotaError(f"{source}: {error}") from None
        return pictures

    def token_id(self, image: Any) -> int:
        return self.image_token_id

    def read(self, image: Any, name: str) -> Picture:
        if isinstance(image, Video):
            raise QuotaError(f"{name}: LLaVA-1.5 takes pictures, no videos")
        picture = self.open(image, name)
        self.check_growth(picture, self._working_pixels(picture), name)
        pixels = np.asarray(self.process(picture, name)["pixel_values"][0], np.float32)
        expected = (3, self.image_size, self.image_size)
        if pixels.shape != expected:
            raise QuotaError(
                f"{name}: the image processor makes {pixels.shape}, "
                f"the vision tower takes {expected}"
            )
        return Picture(pixels=pixels, num_tokens=self.tokens_per_image)

    def count_tokens(self, size: tuple[int, int]) -> int:
        return self.tokens_per_image

    def bounds(self, sizes: Sequence[tuple[int, int]], buckets: Buckets) -> Bounds:
        return Bounds(pictures=buckets.for_pictures(len(sizes)))

    def visual_bucket(
        self, prompts: Sequence[Sequence[Picture]], buckets: Buckets, shape: Shape
    ) -> int:
        shape.refuse("visual_bucket", "patch_bucket", why="pin images_per_prompt instead")
        most = max(map(len, prompts))
        count = pinned(shape.images_per_prompt, most, "images_per_prompt", "pictures in a prompt")
        return (most if count is None else count) * self.tokens_per_image

    def pack(
        self, pictures: Sequence[Picture], buckets: Buckets, shape: Shape
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        slots = buckets.slots(len(pictures), shape)
        pixels = np.zeros((slots, 3, self.image_size, self.image_size), np.float32)
        for slot, picture in enumerate(pictures):
            pixels[slot] = picture.pixels
        tokens = np.arange(self.tokens_per_image)
        return pixels, [slot * len(tokens) + tokens for slot in range(len(pictures))]

    def positions(self, visual: np.ndarray, pictures: Sequence[Picture]) -> np.ndarray:
        return np.arange(len(visual) + sum(picture.num_tokens - 1 for picture in pictures))

    def _working_pixels(self, picture: Image.Image) -> int:
        """Most pixels while padding or resizing: long thin pictures explode."""
        processor = self.image_processor
        width, height = picture.size
        if getattr(processor, "do_pad", False):
            width = height = max(width, height)
        pixels = [width * height]
        for size in (processor.size, processor.crop_size):
            size = {key: value for key, value in dict(size or {}).items() if value}
            edge, longest = size.get("shortest_edge"), size.get("longest_edge")
            if edge:
                stretched = edge * edge * max(width, height) // min(width, height)
                pixels.append(min(stretched, longest * longest) if longest else stretched)
            if size.get("height") and size.get("width"):
                pixels.append(size["height"] * size["width"])
        return max(pixels)
