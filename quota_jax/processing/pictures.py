"""What every model family does with pictures: read, pack into slots, place their tokens."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from quota_jax.batch import Patches
from quota_jax.errors import QuotaError
from quota_jax.processing.buckets import Buckets, Shape
from quota_jax.processing.hugging_face import first_line, without_warnings
from quota_jax.processing.images import default_pixel_limit, open_picture


@dataclass(frozen=True, kw_only=True, slots=True)
class Video:
    """Frames of one size, ``fps`` of them a second, as one input of a model that takes videos."""

    frames: Sequence[Any]
    fps: float = 2.0

    def __post_init__(self):
        if not self.frames:
            raise QuotaError("a video needs at least one frame")
        if not (isinstance(self.fps, int | float) and 0 < self.fps < 1e4):
            raise QuotaError(f"a video's fps must be positive, got {self.fps!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """A picture or video as the vision tower takes it.

    pixels: float32 [3, height, width], or patches [frames, patches, values] in row order of their
        visual tokens.
    grid: frames, rows and columns of patches. frame_step: temporal positions from one frame to the
        next (videos).
    """

    pixels: np.ndarray
    num_tokens: int
    grid: tuple[int, int, int] = (1, 1, 1)
    frame_step: float = 1.0

    @property
    def slots(self) -> int:
        """Picture slots of a batch that it fills: one for each frame."""
        return self.grid[0]


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class Bounds:
    """Shapes of a prompt's pictures, each rounded up to a bucket.

    pictures: picture slots. visual, patches: visual tokens of the prompt and patches of its largest
    picture; None where pictures have one size. windows: the bound on that picture's attention
    windows.
    """

    pictures: int
    visual: int | None = None
    patches: int | None = None
    windows: int = 0

    def pins(self, prompts: int) -> dict[str, int]:
        """What to pin for a batch of so many such prompts (see `Processor.lay_out`)."""
        slots = self.pictures * prompts
        if self.visual is None or self.patches is None:
            return {"image_slots": slots, "images_per_prompt": self.pictures}
        return {
            "image_slots": slots,
            "visual_bucket": self.visual,
            "patch_bucket": self.patches,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class PictureReader(ABC):
    """One model family's way with pictures.

    image_processor: a PIL image processor of transformers, called as it stands on RGB pictures;
        other modes are converted by it, so alpha is treated as the installed version treats it.
    placeholders: token id -> what stands for it in error messages, for each kind of input.
    """

    image_processor: Any
    any_size: ClassVar[bool]
    """Whether the tokens of a picture depend on its size."""

    max_image_pixels: int = field(default_factory=default_pixel_limit)
    exif_orientation: bool = False
    placeholders: Mapping[int, str] = field(default_factory=dict)

    def __post_init__(self):
        limit = self.max_image_pixels
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
            raise QuotaError(f"max_image_pixels must be a positive integer, got {limit!r}")

    @abstractmethod
    def token_id(self, image: Any) -> int:
        """The placeholder that stands for this input in a prompt."""

    @abstractmethod
    def read(self, image: Any, name: str) -> Picture:
        """Opens and preprocesses one input; ``name`` is for errors."""

    @abstractmethod
    def count_tokens(self, size: tuple[int, int]) -> int:
        """The visual tokens of a still picture of this width and height."""

    @abstractmethod
    def bounds(self, sizes: Sequence[tuple[int, int]], buckets: Buckets) -> Bounds:
        """The shapes that a prompt with still pictures of these sizes needs.

        Prompts of equal bounds, and with as many rows, make batches of one shape.

        Args:
            sizes: width and height of each picture in pixels; any number where ``any_size`` is
                False.
        """

    @abstractmethod
    def visual_bucket(
        self, prompts: Sequence[Sequence[Picture]], buckets: Buckets, shape: Shape
    ) -> int:
        """The bound on a prompt's visual tokens."""

    @abstractmethod
    def pack(
        self, pictures: Sequence[Picture], buckets: Buckets, shape: Shape
    ) -> tuple[np.ndarray | Patches, list[np.ndarray]]:
        """The tower's input, and for each picture the rows of the flattened features of its tokens,
        in the order in which they stand in the prompt."""

    @abstractmethod
    def positions(self, visual: np.ndarray, pictures: Sequence[Picture]) -> np.ndarray:
        """Rotary positions of a prompt's tokens; ``visual`` says which of its ids, pictures not yet
        expanded, stand for one."""

    def read_all(self, images: Sequence[Sequence[Any]]) -> list[list[Picture]]:
        """All inputs of a batch, prompt by prompt."""
        return [
            [self.read(image, self._name(image, row, column)) for column, image in enumerate(part)]
            for row, part in enumerate(images)
        ]

    def open(self, image: Any, name: str) -> Image.Image:
        """A decoded picture of acceptable size."""
        return open_picture(
            image,
            name=name,
            max_image_pixels=self.max_image_pixels,
            exif_orientation=self.exif_orientation,
        )

    def process(self, picture: Image.Image, name: str) -> Mapping[str, Any]:
        """What the image processor makes of one picture."""
        try:
            # Pillow warns about palettes with transparency, which the conversion handles.
            with without_warnings():
                return self.image_processor([picture], do_convert_rgb=True, return_tensors="np")
        except Exception as error:  # modes Pillow cannot convert, settings at odds with each other
            raise QuotaError(f"{name}: cannot be processed: {first_line(error)}") from None

    def check_growth(self, picture: Image.Image, pixels: int, name: str) -> None:
        """Refuses a picture that resizing or padding would blow up to ``pixels``."""
        if pixels > self.max_image_pixels:
            raise QuotaError(
                f"{name}: {picture.size[0]} x {picture.size[1]} pixels grow to {pixels} when "
                f"padded or resized, more than max_image_pixels={self.max_image_pixels}"
            )

    @staticmethod
    def _name(image: Any, row: int, column: int) -> str:
        if isinstance(image, str | os.PathLike):
            return str(image)
        kind = "video" if isinstance(image, Video) else "image"
        return f"{kind} {column} of prompt {row}"
