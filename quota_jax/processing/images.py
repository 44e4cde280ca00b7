"""Opening pictures safely, and the PIL image processors of transformers.

The PIL classes are named outright: the torchvision ones give other pixels and need torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from quota_jax.errors import QuotaError
from quota_jax.processing.hugging_face import (
    first_line,
    quiet,
    read_json,
    transformers,
    without_warnings,
)

PIL_CLASSES = {
    "CLIPFeatureExtractor": "CLIPImageProcessorPil",
    "CLIPImageProcessor": "CLIPImageProcessorPil",
    "LlavaImageProcessor": "LlavaImageProcessorPil",
    "Qwen2VLImageProcessor": "Qwen2VLImageProcessorPil",
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
        with open(path, "rb") as file, without_warnings():
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


def pil_image_processor(
    settings: Mapping[str, Any], source: Path, families: tuple[str, ...]
) -> Any:
    """The PIL image processor of transformers for these settings, whichever back end they name.

    ``families`` are the classes that the model can use; the first one is taken where none is named.
    """
    named = settings.get("image_processor_type") or settings.get("feature_extractor_type")
    named = named or families[0]
    family = str(named).removesuffix("Fast").removesuffix("Pil")
    if family not in families:
        raise QuotaError(
            f"{source}: image processor {named!r} is not supported; known: {sorted(families)}"
        )
    types = ("image_processor_type", "feature_extractor_type", "processor_class", "auto_map")
    settings = {key: value for key, value in settings.items() if key not in types}
    try:
        with quiet():
            return getattr(transformers(), PIL_CLASSES[family]).from_dict(settings)
    except Exception as error:  # settings of any kind may stand in the file
        raise QuotaError(f"{source}: unusable image processor: {first_line(error)}") from None


def default_pixel_limit() -> int:
    """Pillow's limit for decompression bombs, or its usual value where it has been switched off."""
    return Image.MAX_IMAGE_PIXELS or 89_478_485
