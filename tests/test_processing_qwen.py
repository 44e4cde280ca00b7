"""Qwen2.5-VL's inputs: windows, positions, pixels and grids as transformers makes them."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_qwen import write_tiny_qwen

from quota_jax.config import QwenVlConfig, config_from_hf
from quota_jax.errors import QuotaError
from quota_jax.processing import Processor, Video
from quota_jax.processing.hugging_face import read_json, transformers
from quota_jax.processing.qwen_pictures import max_windows
from quota_jax.processing.windows import patch_coordinates, rope_positions, window_order

USER = "<|im_start|>user\n"
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"


def picture(width: int, height: int, seed: int = 0, mode: str = "RGB") -> Image.Image:
    """Random pixels: any wrong order shows."""
    channels = {"RGB": 3, "L": 1, "RGBA": 4}[mode]
    values = np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)
    return Image.fromarray(values[..., 0] if channels == 1 else values, mode)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_qwen(tmp_path_factory.mktemp("qwen") / "hf")


@pytest.fixture(scope="module")
def config(folder: Path) -> QwenVlConfig:
    found = config_from_hf(read_json(folder / "config.json") or {})
    assert isinstance(found, QwenVlConfig)
    return found


@pytest.fixture(scope="module")
def processor(folder: Path, config: QwenVlConfig) -> Processor:
    return Processor.from_folder(folder, config)


def test_windows_of_a_small_frame():
    found = window_order(3, 3, 2)
    assert found.order.tolist() == [0, 1, 3, 4, 2, 5, 6, 7, 8]
    assert found.lengths.tolist() == [4, 2, 2, 1]
    assert found.order[found.place].tolist() == list(range(9))
    assert patch_coordinates(2, 4, 2)[1].tolist() == [[0, 2], [0, 3], [1, 2], [1, 3]]


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 5))
def test_windows_cover_every_token_once_and_stay_within_their_bound(rows, columns, side):
    found = window_order(rows, columns, side)
    assert sorted(found.order.tolist()) == list(range(rows * columns))
    assert (found.lengths >= 1).all()
    assert found.lengths.sum() == rows * columns
    assert found.lengths.max() <= side * side
    ends = np.cumsum(found.lengths)
    for start, end in zip(ends - found.lengths, ends, strict=True):
        row, column = np.divmod(found.order[start:end], columns)
        assert len(set(row // side)) == len(set(column // side)) == 1
    for bucket in (rows * columns, rows * columns + 37):
        assert len(found.lengths) <= max_windows(bucket, side, len(found.lengths))
        if max(rows, columns) <= 4 * min(rows, columns):
            assert len(found.lengths) <= max_windows(bucket, side, 0)


def test_positions_of_a_worked_example():
    # text, text, a picture of 2 x 3 tokens, text, a video of 2 frames of 1 x 2 tokens, text
    visual = np.array([False, False, True, False, True, False])
    found = rope_positions(visual, [(1, 2, 3), (2, 1, 2)], [1.0, 2.5])
    assert found.tolist() == [
        [0, 0, 0],
        [1, 1, 1],
        *([2, 2 + row, 2 + column] for row in range(2) for column in range(3)),
        [5, 5, 5],
        [6, 6, 6],
        [6, 6, 7],
        [8, 6, 6],
        [8, 6, 7],
        [8, 8, 8],
    ]


@pytest.mark.torch
@pytest.mark.parametrize(
    "grids", [[(1, 4, 6)], [(1, 10, 2), (1, 2, 2), (1, 18, 26)], [(3, 6, 10), (1, 8, 8)]]
)
def test_windows_and_coordinates_equal_transformers(grids):
    import torch
    from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

    sizes = torch.tensor(grids)
    index, bounds = get_vision_window_index(
        sizes, spatial_merge_size=2, window_size=112, patch_size=14
    )
    order, lengths, coordinates, first = [], [], [], 0
    for frames, rows, columns in grids:
        window = window_order(rows // 2, columns // 2, 4)
        for _ in range(frames):
            order += (first + window.order).tolist()
            lengths += (4 * window.lengths).tolist()
            coordinates.append(patch_coordinates(rows, columns, 2).reshape(-1, 2))
            first += rows * columns // 4
    assert order == index.tolist()
    assert lengths == np.diff(bounds.numpy()).tolist()
    assert np.array_equal(np.concatenate(coordinates), get_vision_position_ids(sizes, 2).numpy())


@pytest.mark.torch
def test_positions_equal_transformers(folder: Path, processor: Processor, config: QwenVlConfig):
    import torch
    from tiny_qwen import load_oracle

    oracle = load_oracle(folder)
    video = Video(frames=[picture(56, 84, seed=seed) for seed in range(5)], fps=1.5)
    images = [[picture(60, 90)], [picture(200, 30), picture(29, 29)], [video], [picture(40, 40)]]
    prompts = [
        f"{USER}{IMAGE}what color",
        f"the {IMAGE} car {IMAGE}",
        f"{VIDEO} what is the color",
        f"{IMAGE}",
    ]
    batch = processor(images=images, prompts=prompts)
    for row, (sample, inputs) in enumerate(zip(prompts, images, strict=True)):
        length = int(batch.lengths[row])
        ids = np.asarray(batch.tokens[row, :length])
        kinds = (ids == config.image_token_id) + 2 * (ids == config.video_token_id)
        grids = torch.tensor([p.grid for p in processor.pictures.read_all([inputs])[0]])
        is_video = isinstance(inputs[0], Video)
        expected, delta = oracle.model.get_rope_index(
            torch.tensor(ids[None].astype(np.int64)),
            torch.tensor(kinds[None]),
            **{"video_grid_thw" if is_video else "image_grid_thw": grids},
            second_per_grid_ts=torch.tensor([2 / 1.5]) if is_video else None,
        )
        assert np.array_equal(batch.positions[row, :length].T, expected[:, 0].numpy()), sample
        assert int(batch.next_position[row]) == length + int(delta[0, 0])


@pytest.mark.parametrize(
    ("size", "mode"),
    [
        ((61, 93), "RGB"),
        ((1, 1), "RGB"),
        ((9, 3), "L"),
        ((400, 3), "RGB"),
        ((300, 400), "RGBA"),
        ((57, 200), "P"),
        ((640, 480), "RGB"),
    ],
)
def test_pixels_and_grids_equal_the_pil_processor(
    folder: Path, processor: Processor, size: tuple[int, int], mode: str
):
    image = picture(*size, mode="RGB" if mode == "P" else mode)
    if mode == "P":
        image = image.quantize(17)
        image.info["transparency"] = 3
    settings_ = read_json(folder / "preprocessor_config.json") or {}
    oracle = transformers().Qwen2VLImageProcessorPil.from_dict(settings_)
    expected = oracle([image], return_tensors="np")
    batch = processor(images=[[image]], prompts=[IMAGE])
    _, rows, columns = expected["image_grid_thw"][0]
    assert isinstance(processor.config, QwenVlConfig)
    order = window_order(rows // 2, columns // 2, processor.config.vision.window_units)
    count = rows * columns
    assert int(batch.pixels.lengths[0]) == count
    got = np.asarray(batch.pixels.values[0, :count]).reshape(count // 4, 4, -1)[order.place]
    assert np.array_equal(got.reshape(count, -1), expected["pixel_values"])
    visual = np.asarray(batch.visual_index[0])
    assert np.array_equal(visual[visual >= 0], order.place)


def test_a_video_of_one_repeated_frame_is_that_picture(processor: Processor):
    image = picture(70, 90)
    still = processor(images=[[image]], prompts=[IMAGE])
    video = processor(images=[[Video(frames=[image] * 3)]], prompts=[VIDEO])
    assert video.pixels.values.shape[0] == 2  # two temporal patches, the last frame repeated
    for frame in range(2):
        assert np.array_equal(video.pixels.values[frame], still.pixels.values[0])
    assert int(video.lengths[0]) == 2 + 2 * (int(still.lengths[0]) - 2)


def test_frames_of_a_temporal_patch_stand_next_to_each_other(processor: Processor):
    frames = [picture(56, 56, seed=seed) for seed in range(2)]
    patches = processor(images=[[Video(frames=frames)]], prompts=[VIDEO]).pixels
    values = np.asarray(patches.values[0]).reshape(-1, 3, 2, 14 * 14)
    for place, frame in enumerate(frames):
        alone = processor(images=[[frame]], prompts=[IMAGE]).pixels.values[0]
        alone = np.asarray(alone).reshape(-1, 3, 2, 14 * 14)
        assert np.array_equal(values[:, :, place], alone[:, :, 0])


def test_sizes_of_one_bucket_have_one_shape(processor: Processor):
    sizes = [(a, b) for a, b in itertools.product(range(60, 260, 28), repeat=2) if a * b / 784 > 50]
    shapes = {
        tuple(
            (name, getattr(batch.pixels, name).shape)
            for name in ("values", "window_starts", "window_slots")
        )
        for batch in (
            processor(images=[[picture(*size)]], prompts=[IMAGE], patch_bucket=512)
            for size in sizes
        )
    }
    assert len(sizes) > 10
    assert len(shapes) == 1


@pytest.mark.parametrize(
    ("images", "prompt", "message"),
    [
        ([], IMAGE, "1 <|image_pad|> placeholder but 0 images"),
        ([picture(30, 30)], VIDEO, "0 <|image_pad|> placeholders but 1 image"),
        ([picture(1000, 4)], IMAGE, "aspect ratio"),
        ([Video(frames=[picture(56, 56), picture(200, 56)])], VIDEO, "frames differ in size"),
        ([Video(frames=[picture(56, 56)]), picture(56, 56)], IMAGE + VIDEO, "in another"),
        (["nowhere.png"], IMAGE, "nowhere.png"),
    ],
)
def test_refused_inputs(processor: Processor, images: list, prompt: str, message: str):
    with pytest.raises(QuotaError) as error:
        processor(images=[images], prompts=[prompt])
    assert message in str(error.value)


def test_pins_are_checked(processor: Processor):
    image = picture(112, 112)
    batch = processor(
        images=[[image]], prompts=[IMAGE], visual_bucket=40, patch_bucket=100, image_slots=3
    )
    assert batch.visual_bucket == 40
    assert batch.pixels.values.shape[:2] == (3, 128)
    for pins, message in (
        ({"visual_bucket": 3}, "visual_bucket=3 is too small"),
        ({"patch_bucket": 63}, "patch_bucket=63 is too small"),
        ({"images_per_prompt": 1}, "cannot be pinned"),
        ({"rows": 1}, "unknown bound 'rows'"),
    ):
        with pytest.raises(QuotaError, match=message):
            processor(images=[[image]], prompts=[IMAGE], **pins)


@pytest.mark.parametrize("fps", [0, -1, "2"])
def test_a_bad_frame_rate_is_refused(fps):
    with pytest.raises(QuotaError, match="fps"):
        Video(frames=[picture(30, 30)], fps=fps)


def test_chatml_keeps_parts_in_order_and_equals_the_shipped_template(processor: Processor):
    image = picture(56, 56)
    talk = [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "the"},
                {"type": "image", "image": image},
                {"type": "text", "text": "color"},
            ],
        },
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": "what"},
    ]
    prompts, images = processor.render([talk])
    assert processor.render([talk], "chatml")[0] == prompts
    assert prompts[0].index("the") < prompts[0].index("<|image_pad|>") < prompts[0].index("color")
    assert prompts[0].startswith("<|im_start|>system\n")
    assert prompts[0].endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert images == [[image]]
