"""Pictures to pixel arrays, by the PIL image processors of transformers.

The PIL classes are named outright: the torchvision ones give other pixels and need torch.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from quota_jax.config import LlavaConfig
from quota_jax.errors import QuotaError
from quota_jax.processing.hugging_face import first_line, quiet, read_json, transformers

PIL_CLASSES = {
    "CLIPFeatureExtractor": "CLIPImageProcessorPil",
    "CLIPImageProcessor": "CLIPImageProcessorPil",
    "LlavaImageProcessor": "LlavaImageProcessorPil",
}
ARRAY_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def open_picture(
    source: Any, *, name: str, max_image_pixels: int, exif_orientation: bool = False
) -> Image.Image:
    """A decoded picture from a PIL image, a path, or a uint8 array [H, W] or [H, W, 1 | 3 | 4].

    The size is checked before anything is decoded. Pillow's own limit, twice
    `PIL.Image.MAX_IMAGE_PIXELS`, holds beside `max_image_pixels`. A file that cannot be decoded to
    its end is refused.

    Args:
        name: what errors call a picture without a path, such as "image 0 of prompt 2".
        exif_orientation: turn the picture upright by its EXIF tag.
    """
    if isinstance(source, str | os.PathLike):
        path = os.fspath(source)
        if not isinstance(path, str):
            raise QuotaError(f"{name}: a path must be text, got {path!r}")
        if path.startswith(("http://", "https://", "data:")):
            raise QuotaError(f"{name}: {path[:60]!r} is no local file; pictures are not downloaded")
        return _read_file(path, max_image_pixels, exif_orientation)
    if isinstance(source, np.ndarray):
        source = _from_array(source, name)
    if not isinstance(source, Image.Image):
        raise QuotaError(
            f"{name} must be a PIL image, a path or a uint8 array, got {type(source).__name__}"
        )
    return _decode(source, name, max_image_pixels, exif_orientation)


def _read_file(path: str, max_image_pixels: int, exif_orientation: bool) -> Image.Image:
    try:
        # Opened here, not by Pillow, so that the file is closed whatever the decoder does.
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            picture = Image.open(file)
            return _decode(picture, path, max_image_pixels, exif_orientation)
    except QuotaError:
        raise
    except Image.UnidentifiedImageError:
        raise QuotaError(f"{path}: not a picture in a known format") from None
    except Image.DecompressionBombError as error:
        raise QuotaError(f"{path}: {first_line(error)}") from None
    except OSError as error:
        raise QuotaError(f"{path}: {error.strerror or first_line(error)}") from None
    except Exception as error:  # whatever a decoder raises on a damaged header
        raise QuotaError(f"{path}: not readable as a picture: {first_line(error)}") from None


def _decode(
    picture: Image.Image, name: str, max_image_pixels: int, exif_orientation: bool
) -> Image.Image:
    width, height = picture.size
    if not width or not height:
        raise QuotaError(f"{name}: the picture is empty ({width} x {height} pixels)")
    if width * height > max_image_pixels:
        raise QuotaError(
            f"{name}: {width} x {height} pixels exceed max_image_pixels={max_image_pixels}"
        )
    try:
        picture.load()
        return ImageOps.exif_transpose(picture) if exif_orientation else picture
    except (
        Exception
    ) as error:  # the decoders raise OSError, SyntaxError, ValueError, struct.error...
        raise QuotaError(f"{name}: the picture is damaged: {first_line(error)}") from None


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    channels = 1 if array.ndim == 2 else array.shape[-1] if array.ndim == 3 else 0
    if array.dtype != np.uint8 or channels not in ARRAY_MODES:
        raise QuotaError(
            f"{name} must be uint8[H, W] or uint8[H, W, 1 | 3 | 4], got {array.dtype}{array.shape}"
        )
    if not array.size:
        raise QuotaError(f"{name}: the picture is empty (array of shape {array.shape})")
    array = array[..., 0] if array.ndim == 3 and channels == 1 else array
    return Image.fromarray(np.ascontiguousarray(array))


def read_image_settings(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The image processor's settings and their file.

    As in transformers, `image_processor` inside processor_config.json comes before
    preprocessor_config.json.
    """
    path = folder / "processor_config.json"
    nested = (read_json(path) or {}).get("image_processor")
    if nested is not None:
        if not isinstance(nested, dict):
            raise QuotaError(f"{path}: 'image_processor' must be an object, got {nested!r}")
        return path, nested
    path = folder / "preprocessor_config.json"
    settings = read_json(path)
    if settings is None:
        raise QuotaError(f"{folder} has no preprocessor_config.json")
    return path, settings


def pil_image_processor(settings: Mapping[str, Any], source: Path) -> Any:
    """The PIL image processor of transformers for these settings, whichever back end they name."""
    named = settings.get("image_processor_type") or settings.get("feature_extractor_type")
    named = named or "CLIPImageProcessor"
    family = str(named).removesuffix("Fast").removesuffix("Pil")
    if family not in PIL_CLASSES:
        raise QuotaError(
            f"{source}: image processor {named!r} is not supported; known: {sorted(PIL_CLASSES)}"
        )
    types = ("image_processor_type", "feature_extractor_type", "processor_class", "auto_map")
    settings = {key: value for key, value in settings.items() if key not in types}
    try:
        with quiet():
            return getattr(transformers(), PIL_CLASSES[family]).from_dict(settings)
    except Exception as error:  # settings of any kind may stand in the file
        raise QuotaError(f"{source}: unusable image processor: {first_line(error)}") from None


@dataclass(frozen=True, kw_only=True, slots=True)
class LlavaPictures:
    """How LLaVA-1.5 sees pictures: each is one float32[3, image_size, image_size] and
    `tokens_per_image` tokens.

    image_processor: a PIL image processor of transformers, called as it stands on RGB pictures;
    other modes are converted by it, so alpha is treated as the installed version treats it.
    """

    image_processor: Any
    image_size: int
    tokens_per_image: int
    max_image_pixels: int
    exif_orientation: bool = False

    def __post_init__(self):
        limit = self.max_image_pixels
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
            raise QuotaError(f"max_image_pixels must be a positive integer, got {limit!r}")

    @classmethod
    def from_folder(
        cls,
        folder: Path,
        config: LlavaConfig,
        *,
        max_image_pixels: int | None = None,
        exif_orientation: bool = False,
    ) -> LlavaPictures:
        """Reads the settings and checks on a blank picture that they fit the vision tower."""
        if config.vision.num_channels != 3:
            raise QuotaError(f"the vision tower takes {config.vision.num_channels} channels, not 3")
        source, settings = read_image_settings(folder)
        pictures = cls(
            image_processor=pil_image_processor(settings, source),
            image_size=config.vision.image_size,
            tokens_per_image=config.tokens_per_image,
            max_image_pixels=_default_limit() if max_image_pixels is None else max_image_pixels,
            exif_orientation=exif_orientation,
        )
        size = config.vision.image_size
        try:
            pictures._pixels(Image.new("RGB", (3 * size // 2, size)), "a blank picture")
        except QuotaError as error:
            raise QuotaError(f"{source}: {error}") from None
        return pictures

    def __call__(self, images: Sequence[Sequence[Any]]) -> np.ndarray:
        """float32[P, 3, image_size, image_size] of all pictures, prompt after prompt."""
        pixels = []
        for row, sources in enumerate(images):
            for column, image in enumerate(sources):
                is_path = isinstance(image, str | os.PathLike)
                name = str(image) if is_path else f"image {column} of prompt {row}"
                pixels.append(self._pixels(self._open(image, name), name))
        empty = np.zeros((0, 3, self.image_size, self.image_size), np.float32)
        return np.stack(pixels) if pixels else empty

    def _open(self, image: Any, name: str) -> Image.Image:
        return open_picture(
            image,
            name=name,
            max_image_pixels=self.max_image_pixels,
            exif_orientation=self.exif_orientation,
        )

    def _pixels(self, picture: Image.Image, name: str) -> np.ndarray:
        self._check_working_size(picture, name)
        try:
            # Pillow warns about palettes with transparency, which the conversion handles.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                values = self.image_processor([picture], do_convert_rgb=True, return_tensors="np")[
                    "pixel_values"
                ]
        except (
            Exception
        ) as error:  # modes Pillow cannot convert, settings that contradict each other
            raise QuotaError(f"{name}: cannot be processed: {first_line(error)}") from None
        pixels = np.asarray(values[0], np.float32)
        expected = (3, self.image_size, self.image_size)
        if pixels.shape != expected:
            raise QuotaError(
                f"{name}: the image processor makes {pixels.shape}, "
                f"the vision tower takes {expected}"
            )
        return pixels

    def _check_working_size(self, picture: Image.Image, name: str) -> None:
        """Refuses pictures so long and thin that padding or resizing explodes."""
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
        if max(pixels) > self.max_image_pixels:
            raise QuotaError(
                f"{name}: {picture.size[0]} x {picture.size[1]} pixels grow to {max(pixels)} when "
                f"padded or resized, more than max_image_pixels={self.max_image_pixels}"
            )


def _default_limit() -> int:
    """Pillow's limit for decompression bombs, or its usual value where it has been switched off."""
    return Image.MAX_IMAGE_PIXELS or 89_478_485
