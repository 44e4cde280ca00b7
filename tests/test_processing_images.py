"""Pixels equal to transformers' PIL processors for every kind of picture; refused pictures."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from processing_folders import IMAGE_SIZE, tiny_config, write_folder
from tiny_models import draw_picture
from tiny_processor import CLIP_MEAN, CLIP_STD

from quota_jax.errors import QuotaError
from quota_jax.processing import Processor

SETTINGS = {
    "do_resize": True,
    "size": {"shortest_edge": IMAGE_SIZE},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": list(CLIP_MEAN),
    "image_std": list(CLIP_STD),
    "do_convert_rgb": True,
}


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Processor:
    return load(tmp_path_factory.mktemp("clip"))


def load(folder: Path, options: dict[str, Any] | None = None, **files: Any) -> Processor:
    return Processor.from_folder(write_folder(folder, **files), tiny_config(), **(options or {}))


def pixels_of(processor: Processor, image: Any) -> np.ndarray:
    return np.asarray(processor(images=[[image]], prompts=["<image>"]).pixels[0])


def oracle_pixels(picture: Image.Image, kind: str = "CLIP", **changes: Any) -> np.ndarray:
    """What transformers' PIL processor makes of a picture (its own class, called plainly)."""
    import transformers

    settings = SETTINGS | changes
    processor = getattr(transformers, f"{kind}ImageProcessorPil")(**settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return processor(picture, return_tensors="np")["pixel_values"][0]


def pictures() -> dict[str, Image.Image]:
    rng = np.random.default_rng(0)

    def noise(*shape: int, kind: Any = np.uint8) -> np.ndarray:
        return rng.integers(0, np.iinfo(kind).max, shape, dtype=kind, endpoint=True)

    rgb = Image.fromarray(noise(37, 53, 3))
    alpha = Image.fromarray(noise(31, 45, 4))
    see_through = rgb.convert("P")
    see_through.info["transparency"] = bytes([0, 128, 255] * 20)
    turned = draw_picture(3, (61, 33))
    turned.getexif()[0x0112] = 6
    return {
        "rgb": rgb,
        "exact size": Image.fromarray(noise(IMAGE_SIZE, IMAGE_SIZE, 3)),
        "one pixel": Image.fromarray(noise(1, 1, 3)),
        "three rows": Image.fromarray(noise(3, 17, 3)),
        "very wide": Image.fromarray(noise(5, 400, 3)),
        "very tall": Image.fromarray(noise(401, 3, 3)),
        "odd crop": Image.fromarray(noise(29, 58, 3)),
        "large": draw_picture(1, (640, 427)),
        "grey": Image.fromarray(noise(40, 30)),
        "bilevel": Image.fromarray(noise(40, 30)).convert("1"),
        "16 bit": Image.fromarray(noise(40, 30, kind=np.uint16)),
        "32 bit": Image.fromarray(noise(40, 30, kind=np.uint16).astype(np.int32)),
        "float": Image.fromarray(rng.random((40, 30), np.float32) * 300),
        "palette": rgb.convert("P"),
        "palette with transparency": see_through,
        "alpha": alpha,
        "grey with alpha": alpha.convert("LA"),
        "cmyk": rgb.convert("CMYK"),
        "ycbcr": rgb.convert("YCbCr"),
        "hsv": rgb.convert("HSV"),
        "turned": turned,
    }


PICTURES = pictures()


@pytest.mark.parametrize("name", PICTURES)
def test_pixels_equal_transformers(processor: Processor, name: str):
    picture = PICTURES[name]
    mode = picture.mode
    ours, expected = pixels_of(processor, picture), oracle_pixels(picture)
    assert ours.dtype == expected.dtype == np.float32
    assert ours.shape == (3, IMAGE_SIZE, IMAGE_SIZE)
    assert np.array_equal(ours, expected)
    assert picture.mode == mode  # the caller's picture is left alone


def test_no_resampling_golden_values(processor: Processor):
    """A picture of the tower's own size: (value / 255 - mean) / std, by arithmetic."""
    values = np.asarray(PICTURES["exact size"]).transpose(2, 0, 1)
    mean, std = (np.asarray(v)[:, None, None] for v in (CLIP_MEAN, CLIP_STD))
    expected = (values / 255 - mean) / std
    np.testing.assert_allclose(
        pixels_of(processor, PICTURES["exact size"]), expected, rtol=0, atol=2e-6
    )


@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.parametrize("pad", [True, False])
def test_llava_image_processor(tmp_path: Path, name: str, pad: bool):
    settings = {**SETTINGS, "do_pad": pad, "image_processor_type": "LlavaImageProcessorFast"}
    ours = pixels_of(load(tmp_path, preprocessor_config_json=settings), PICTURES[name])
    assert np.array_equal(ours, oracle_pixels(PICTURES[name], "Llava", do_pad=pad))


@pytest.mark.parametrize(
    ("shape", "mode"), [((9, 3), "L"), ((9, 3, 1), "L"), ((3, 4, 3), "RGB"), ((4, 3, 4), "RGBA")]
)
def test_arrays_are_rows_columns_channels(processor: Processor, shape: tuple[int, ...], mode: str):
    array = np.random.default_rng(1).integers(0, 255, shape, np.uint8)
    flat = array[..., 0] if shape[-1] == 1 else array
    assert Image.fromarray(flat).mode == mode
    expected = pixels_of(processor, Image.fromarray(flat))
    assert np.array_equal(pixels_of(processor, array), expected)
    assert np.array_equal(pixels_of(processor, array.copy(order="F")), expected)


@pytest.mark.parametrize("ending", ["png", "jpg", "gif", "tiff", "webp", "bmp"])
def test_files_equal_their_pictures(processor: Processor, tmp_path: Path, ending: str):
    path = tmp_path / f"picture.{ending}"
    more: dict[str, Any] = (
        {"save_all": True, "append_images": [draw_picture(5)]} if ending in ("gif", "tiff") else {}
    )
    draw_picture(4, (57, 41)).save(path, **more)
    with Image.open(path) as picture:
        expected = oracle_pixels(picture)
    assert np.array_equal(pixels_of(processor, path), expected)
    assert np.array_equal(pixels_of(processor, str(path)), expected)


def test_orientation_is_opt_in(processor: Processor, tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "turned.png"
    plain = draw_picture(2, (50, 30))
    plain.save(path, exif=exif)
    upright = plain.rotate(-90, expand=True)
    assert np.array_equal(pixels_of(processor, path), oracle_pixels(plain))
    turning = load(tmp_path / "turning", {"exif_orientation": True})
    assert np.array_equal(pixels_of(turning, path), oracle_pixels(upright))
    with Image.open(path) as picture:
        assert np.array_equal(pixels_of(turning, picture), oracle_pixels(upright))


@pytest.mark.parametrize(
    "settings",
    [
        {"image_processor_type": "CLIPImageProcessor"},
        {"image_processor_type": "CLIPImageProcessorFast"},
        {"image_processor_type": "CLIPImageProcessorPil"},
        {"feature_extractor_type": "CLIPFeatureExtractor"},
        {"processor_class": "LlavaProcessor"},
        {"size": IMAGE_SIZE, "crop_size": IMAGE_SIZE},  # as before transformers 4.25
        {"do_convert_rgb": False},
        {"do_convert_rgb": None, "resample": 3, "return_tensors": None},
    ],
)
def test_spellings_of_the_clip_settings(tmp_path: Path, settings: dict[str, Any]):
    ours = load(tmp_path, preprocessor_config_json=SETTINGS | settings)
    for name in ("rgb", "grey", "alpha"):
        assert np.array_equal(pixels_of(ours, PICTURES[name]), oracle_pixels(PICTURES[name]))


def test_settings_nested_in_processor_config_come_first(tmp_path: Path):
    nested = {**SETTINGS, "image_processor_type": "CLIPImageProcessor", "resample": 2}
    files = {
        "processor_config_json": {"image_processor": nested, "image_token": "<image>"},
        "preprocessor_config_json": SETTINGS,
    }
    ours = load(tmp_path, **files)
    expected = oracle_pixels(PICTURES["large"], resample=2)
    assert np.array_equal(pixels_of(ours, PICTURES["large"]), expected)
    assert not np.array_equal(expected, oracle_pixels(PICTURES["large"]))
    (tmp_path / "preprocessor_config.json").unlink()
    again = Processor.from_folder(tmp_path, tiny_config())
    assert np.array_equal(pixels_of(again, PICTURES["large"]), expected)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"preprocessor_config_json": None}, "has no preprocessor_config.json"),
        ({"preprocessor_config_json": "{,"}, "preprocessor_config.json: not readable as JSON"),
        (
            {"preprocessor_config_json": {"image_processor_type": "SiglipImageProcessor"}},
            "preprocessor_config.json: image processor 'SiglipImageProcessor' is not supported",
        ),
        (
            {"processor_config_json": {"image_processor": 3}},
            "processor_config.json: 'image_processor' must be an object, got 3",
        ),
        (
            {"preprocessor_config_json": SETTINGS | {"crop_size": {"height": 14, "width": 14}}},
            r"a blank picture: the image processor makes \(3, 14, 14\), the vision tower takes "
            r"\(3, 28, 28\)",
        ),
        (
            {"preprocessor_config_json": SETTINGS | {"size": {"edge": 3}}},
            "preprocessor_config.json: ",
        ),
        (
            {"preprocessor_config_json": SETTINGS | {"image_mean": "x"}},
            "preprocessor_config.json: ",
        ),
        (
            {"preprocessor_config_json": SETTINGS | {"size": {"height": 10**6, "width": 10**6}}},
            "grow to 1000000000000 when padded or resized",
        ),
    ],
)
def test_refused_settings(tmp_path: Path, files: dict[str, Any], message: str):
    with pytest.raises(QuotaError, match=message) as caught:
        load(tmp_path, **files)
    assert "\n" not in str(caught.value)


def damaged_files(folder: Path) -> dict[str, tuple[Path, str]]:
    noise = np.random.default_rng(2).integers(0, 255, (60, 60, 3), np.uint8)
    files = {name: folder / name for name in ("cut.png", "cut.jpg", "text.png", "empty.png")}
    for name in ("cut.png", "cut.jpg"):
        Image.fromarray(noise).save(files[name])
        files[name].write_bytes(files[name].read_bytes()[: files[name].stat().st_size // 2])
    files["text.png"].write_text("no picture")
    files["empty.png"].touch()
    return {
        "cut.png": (files["cut.png"], "the picture is damaged"),
        "cut.jpg": (files["cut.jpg"], "the picture is damaged"),
        "text.png": (files["text.png"], "not a picture in a known format"),
        "empty.png": (files["empty.png"], "not a picture in a known format"),
        "missing.png": (folder / "missing.png", "No such file or directory"),
        "folder": (folder, "Is a directory"),
    }


@pytest.mark.parametrize(
    "name", ["cut.png", "cut.jpg", "text.png", "empty.png", "missing.png", "folder"]
)
def test_damaged_files_are_named(processor: Processor, tmp_path: Path, name: str):
    path, message = damaged_files(tmp_path)[name]
    with pytest.raises(QuotaError) as caught:
        pixels_of(processor, path)
    assert str(caught.value).startswith(f"{path}: {message}")
    assert "\n" not in str(caught.value)


def test_damage_in_a_lazily_opened_picture(processor: Processor, tmp_path: Path):
    path, _ = damaged_files(tmp_path)["cut.png"]
    with (
        Image.open(path) as picture,
        pytest.raises(QuotaError, match="image 1 of prompt 1: the picture is damaged"),
    ):
        processor(images=[[], [draw_picture(), picture]], prompts=["cat", "<image><image>"])


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (Image.new("RGB", (0, 5)), r"image 0 of prompt 0: the picture is empty \(0 x 5 pixels\)"),
        (np.zeros((4, 0, 3), np.uint8), r"the picture is empty \(array of shape \(4, 0, 3\)\)"),
        (np.zeros((4, 4, 3), np.float32), r"must be uint8.*, got float32\(4, 4, 3\)"),
        (np.zeros((3, 4, 5), np.uint8), r"must be uint8.*, got uint8\(3, 4, 5\)"),
        (np.zeros(4, np.uint8), r"must be uint8.*, got uint8\(4,\)"),
        (7, "must be a PIL image, a path or a uint8 array, got int"),
        (None, "must be a PIL image, a path or a uint8 array, got NoneType"),
        ("https://example.org/a.png", "is no local file; pictures are not downloaded"),
        ("data:image/png;base64,AAAA", "is no local file; pictures are not downloaded"),
        (Image.new("La", (5, 5)), "image 0 of prompt 0: cannot be processed: conversion from La"),
    ],
)
def test_refused_pictures(processor: Processor, image: Any, message: str):
    with pytest.raises(QuotaError, match=message):
        pixels_of(processor, image)


def test_too_many_pixels(tmp_path: Path):
    processor = load(tmp_path / "f", {"max_image_pixels": 2000})
    assert pixels_of(processor, Image.new("RGB", (50, 40))).shape == (3, 28, 28)
    message = "51 x 40 pixels exceed max_image_pixels=2000"
    path = tmp_path / "big.png"
    Image.new("RGB", (51, 40)).save(path)
    for image in (Image.new("RGB", (51, 40)), np.zeros((40, 51, 3), np.uint8), path):
        with pytest.raises(QuotaError, match=message):
            pixels_of(processor, image)
    # small, but 28 x 2800 once its shortest edge is 28
    with pytest.raises(QuotaError, match="1 x 100 pixels grow to 78400 when padded or resized"):
        pixels_of(processor, Image.new("RGB", (1, 100)))


@pytest.mark.parametrize("side", [10_000, 60_000])
def test_decompression_bombs(processor: Processor, tmp_path: Path, side: int):
    """100 million pixels are beyond the default limit, 3.6 thousand million beyond Pillow's own."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    path = tmp_path / "bomb.png"
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100)))
    )
    with pytest.raises(QuotaError, match=r"bomb.png: .*(max_image_pixels=89478485|limit of)"):
        pixels_of(processor, path)


def test_padding_to_a_square_counts_against_the_limit(tmp_path: Path):
    settings = {**SETTINGS, "do_pad": True, "image_processor_type": "LlavaImageProcessor"}
    processor = load(tmp_path, preprocessor_config_json=settings)
    with pytest.raises(QuotaError, match="20000 x 1 pixels grow to 400000000 when padded"):
        pixels_of(processor, Image.new("L", (20_000, 1)))


@pytest.mark.parametrize("limit", [0, -1, True, 1.5])
def test_impossible_limits(tmp_path: Path, limit: Any):
    with pytest.raises(QuotaError, match="max_image_pixels must be a positive integer"):
        load(tmp_path, {"max_image_pixels": limit})


def test_only_three_channels(tmp_path: Path):
    import dataclasses

    config = tiny_config()
    config = dataclasses.replace(config, vision=dataclasses.replace(config.vision, num_channels=1))
    with pytest.raises(QuotaError, match="the vision tower takes 1 channels, not 3"):
        Processor.from_folder(write_folder(tmp_path), config)
