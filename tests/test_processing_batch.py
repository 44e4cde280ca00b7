"""Batches: token ids equal to transformers', compact layout, buckets, refused input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from processing_folders import (
    IMAGE_SIZE,
    TOKENS_PER_IMAGE,
    hf_processor,
    image_id,
    real_ids,
    tiny_config,
    write_folder,
    write_llama_folder,
)
from tiny_models import draw_picture
from tiny_processor import BOS_ID, EOS_ID, IMAGE_TOKEN_ID

from quota_jax.errors import QuotaError
from quota_jax.processing import Buckets, Processor
from quota_jax.processing.buckets import assemble

PROMPTS = [
    "USER: <image>\nWhat is this? ASSISTANT:",
    "<image>",
    "  <image> \n\n<image>x<image>  ",
    "no picture at all",
    "USER: <image>\n<image>\ncompare: naïve café 你好 🙂 ASSISTANT: a</s>USER: b",
    "</s><image></s>",
    "<s>USER: <image>",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="module")
def processor(folder: Path) -> Processor:
    return Processor.from_folder(folder, tiny_config())


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama_folder(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def llama(llama_folder: Path) -> Processor:
    return Processor.from_folder(llama_folder, tiny_config(image_id(llama_folder)))


def pictures_for(prompts: list[str]) -> list[list[Image.Image]]:
    return [[draw_picture(i) for i in range(prompt.count("<image>"))] for prompt in prompts]


def test_the_llama_folder_has_byte_pieces_and_bos(llama: Processor):
    ids = llama.tokenizer("a 🙂")["input_ids"]
    assert ids[0] == 1
    assert llama.tokenizer.convert_ids_to_tokens(ids)[-4:] == [
        "<0xF0>",
        "<0x9F>",
        "<0x99>",
        "<0x82>",
    ]


@pytest.mark.parametrize("kind", ["folder", "llama_folder"])
def test_ids_and_pixels_equal_transformers(kind: str, request: pytest.FixtureRequest):
    folder = request.getfixturevalue(kind)
    ours = Processor.from_folder(folder, tiny_config(image_id(folder)))
    oracle = hf_processor(folder)
    images = pictures_for(PROMPTS)
    flat = [picture for row in images for picture in row]
    batch = ours(images=images, prompts=PROMPTS)
    expected = oracle(text=list(PROMPTS), images=flat)
    assert real_ids(batch) == expected["input_ids"]
    pixels = np.stack(expected["pixel_values"])
    assert pixels.dtype == np.float32
    assert np.array_equal(np.asarray(batch.pixels)[: len(flat)], pixels)
    assert not np.asarray(batch.pixels)[len(flat) :].any()


@settings(max_examples=60, deadline=None)
@given(parts=st.lists(st.sampled_from(["<image>", "\n", " ", "a", "é", "▁", "</s>", "user:"])))
def test_ids_equal_transformers_for_any_mixture(llama: Processor, parts: list[str]):
    prompt = "x" + "".join(parts)
    count = prompt.count("<image>")
    expanded = prompt.replace("<image>", "<image>" * TOKENS_PER_IMAGE)
    batch = llama(images=[[draw_picture()] * count], prompts=[prompt])
    # transformers expands the text and tokenizes the result
    assert real_ids(batch)[0] == llama.tokenizer(expanded)["input_ids"]


def test_chat_adds_no_second_bos(processor: Processor):
    import dataclasses

    template = {
        "default": "{{ bos_token }}{% for m in messages %}{{ m.content[0].text }}{% endfor %}"
    }
    with_bos = dataclasses.replace(processor, chat_templates=template)
    conversation = [{"role": "user", "content": "cat"}]
    assert real_ids(with_bos.chat([conversation]))[0].count(BOS_ID) == 1
    assert real_ids(processor.chat([conversation]))[0].count(BOS_ID) == 1
    assert real_ids(processor(prompts=["<s> cat"]))[0].count(BOS_ID) == 2  # raw: as transformers


@st.composite
def samples(draw: st.DrawFn) -> tuple[list[np.ndarray], int]:
    ids = st.lists(st.sampled_from([1, 5, 6, 9]), min_size=1, max_size=12)
    rows = draw(st.lists(ids, min_size=1, max_size=5))
    return [np.asarray(row, np.int32) for row in rows], draw(st.integers(1, 4))


@settings(max_examples=150, deadline=None)
@given(case=samples())
def test_assembled_batches_are_compact(case: tuple[list[np.ndarray], int]):
    prompts, per_image = case
    pictures = [int((ids == 9).sum()) for ids in prompts]
    count = sum(pictures)
    rows = iter(np.arange(count * per_image).reshape(count, per_image))
    batch = assemble(
        prompts,
        [[next(rows) for _ in range(n)] for n in pictures],
        [
            np.arange(len(ids) + (per_image - 1) * n)
            for ids, n in zip(prompts, pictures, strict=True)
        ],
        np.ones((count, 3, 2, 2), np.float32),
        placeholders=[9],
        text_bucket=16,
        visual_bucket=per_image * max(pictures),
        batch_size=Buckets(batch_size=(2, 4, 8)).for_rows(len(prompts)),
        filler_id=7,
    )
    tokens, lengths = np.asarray(batch.tokens), np.asarray(batch.lengths)
    index = np.asarray(batch.visual_index)
    assert tokens.shape == index.shape == (batch.batch_size, batch.seq_len)
    assert batch.seq_len == batch.text_bucket + batch.visual_bucket
    assert batch.batch_size in (2, 4, 8)
    assert batch.batch_size >= len(prompts)
    for name in ("tokens", "lengths", "visual_index", "positions"):
        assert getattr(batch, name).dtype == np.int32
    seen: list[int] = []
    for row, ids in enumerate(prompts):
        expected = [t for i in ids for t in [int(i)] * (per_image if i == 9 else 1)]
        assert tokens[row, : lengths[row]].tolist() == expected
        assert not tokens[row, lengths[row] :].any()
        visual = index[row] >= 0
        assert np.array_equal(
            visual, (tokens[row] == 9) & (np.arange(batch.seq_len) < lengths[row])
        )
        assert visual.sum() <= batch.visual_bucket
        assert lengths[row] - visual.sum() <= batch.text_bucket
        assert np.array_equal(batch.positions[row, : lengths[row]], np.arange(lengths[row]))
        seen += index[row][visual].tolist()
    assert seen == list(range(count * per_image))  # order of appearance over the batch
    for row in range(len(prompts), batch.batch_size):
        assert lengths[row] == 1
        assert tokens[row, 0] == 7
        assert (index[row] == -1).all()
    assert not np.asarray(batch.is_visual)[len(prompts) :].any()


def test_the_worked_example_of_assemble():
    batch = assemble(
        [np.asarray([1, 9, 5]), np.asarray([7])],
        [[np.asarray([4, 3])], []],
        [np.asarray([0, 1, 2, 3]), np.asarray([0])],
        np.ones((1, 3, 2, 2), np.float32),
        placeholders=[9],
        text_bucket=4,
        visual_bucket=2,
        batch_size=2,
        filler_id=0,
    )
    assert batch.tokens.tolist() == [[1, 9, 9, 5, 0, 0], [7, 0, 0, 0, 0, 0]]
    assert batch.visual_index.tolist() == [[-1, 4, 3, -1, -1, -1], [-1] * 6]
    assert batch.lengths.tolist() == [4, 1]
    assert (batch.text_bucket, batch.visual_bucket) == (4, 2)


def test_one_prompt_in_several_buckets_keeps_its_tokens(processor: Processor):
    prompt, picture = "USER: <image>\nwhat colour is the cat?", draw_picture()
    plain = processor(images=[[picture]], prompts=[prompt])
    pinned = processor(
        images=[[picture]], prompts=[prompt], text_bucket=77, image_slots=5, images_per_prompt=3
    )
    beside = processor(images=[[], [picture]], prompts=["cat " * 90, prompt])
    assert (plain.text_bucket, plain.visual_bucket, plain.pixels.shape[0]) == (32, 16, 1)
    assert (pinned.text_bucket, pinned.visual_bucket, pinned.pixels.shape[0]) == (77, 48, 5)
    assert beside.text_bucket == 96
    length = int(plain.lengths[0])
    for other, row in ((pinned, 0), (beside, 1)):
        assert int(other.lengths[row]) == length
        for name in ("tokens", "visual_index", "positions"):
            left, right = getattr(plain, name)[0], getattr(other, name)[row]
            assert np.array_equal(left[:length], right[:length])
        assert np.array_equal(plain.pixels[0], other.pixels[0])


def test_text_only_batches_have_no_picture_slots(processor: Processor):
    batch = processor(prompts=["cat", "the red dog"])
    assert batch.pixels.shape == (0, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert batch.visual_bucket == 0
    assert not np.asarray(batch.is_visual).any()
    assert real_ids(processor(images=[[]], prompts=["cat"])) == real_ids(batch)[:1]


def test_slots_follow_the_ladder(processor: Processor):
    sizes = [
        processor(images=[[draw_picture()] * n], prompts=["<image>" * n]).pixels.shape[0]
        for n in (1, 2, 5, 7, 9)
    ]
    assert sizes == [1, 2, 6, 8, 12]


def test_batch_buckets_pad_rows(folder: Path):
    buckets = Buckets(batch_size=(1, 4))
    processor = Processor.from_folder(folder, tiny_config(), buckets=buckets)
    batch = processor(prompts=["cat", "dog"])
    assert batch.batch_size == 4
    assert batch.lengths.tolist()[2:] == [1, 1]
    assert batch.tokens[2:, 0].tolist() == [BOS_ID, BOS_ID]
    with pytest.raises(
        QuotaError, match="5 prompts in the batch: the largest batch_size bucket is 4"
    ):
        processor(prompts=["cat"] * 5)


def test_full_strategy_counts_the_class_token(folder: Path):
    processor = Processor.from_folder(folder, tiny_config(strategy="full"))
    batch = processor(images=[[draw_picture()]], prompts=["<image>"])
    assert int(np.asarray(batch.is_visual).sum()) == TOKENS_PER_IMAGE + 1


PICTURE = Image.new("RGB", (30, 20))


@pytest.mark.parametrize(
    ("images", "prompts", "message"),
    [
        (
            [[], [], [PICTURE] * 2],
            ["a", "b", "<image>"],
            "prompt 2 has 1 <image> placeholder but 2 im",
        ),
        ([[PICTURE]], ["<image> <image>"], "prompt 0 has 2 <image> placeholders but 1 image$"),
        (None, ["<image>"], "prompt 0 has 1 <image> placeholder but 0 images"),
        ([[PICTURE]], ["cat"], "prompt 0 has 0 <image> placeholders but 1 image$"),
        ([[PICTURE]], ["<image>", "cat"], "2 prompts but 1 lists of images"),
        ([PICTURE], ["<image>"], "images must hold one list of pictures for each prompt"),
        ("x", ["<image>"], "images must hold one list"),
        ([], [], "the list of prompts is empty"),
        (None, "cat", "prompts must be a list of strings"),
        (None, [3], "prompts must be a list of strings"),
    ],
)
def test_refused_calls(processor: Processor, images: Any, prompts: Any, message: str):
    with pytest.raises(QuotaError, match=message):
        processor(images=images, prompts=prompts)


def test_an_empty_prompt_needs_at_least_a_bos(processor: Processor):
    assert real_ids(processor(prompts=[""])) == [[BOS_ID]]
    tokenizer = processor.tokenizer
    post, tokenizer.backend_tokenizer.post_processor = (
        tokenizer.backend_tokenizer.post_processor,
        None,
    )
    try:
        with pytest.raises(QuotaError, match="prompt 0 is empty"):
            processor(prompts=[""])
    finally:
        tokenizer.backend_tokenizer.post_processor = post


@pytest.mark.parametrize(
    ("pins", "message"),
    [
        ({"text_bucket": 2}, "text_bucket=2 is too small: there are 3 text tokens in a prompt"),
        ({"image_slots": 1}, "image_slots=1 is too small: there are 2 pictures in the batch"),
        ({"images_per_prompt": 0}, "images_per_prompt=0 is too small: there are 1 pictures"),
        ({"text_bucket": 0}, "text_bucket must be an integer of at least 1, got 0"),
        ({"image_slots": True}, "image_slots must be an integer of at least 0, got True"),
        ({"max_new_tokens": -1}, "max_new_tokens must not be negative, got -1"),
        ({"max_new_tokens": 1.5}, "max_new_tokens must be an integer, got 1.5"),
    ],
)
def test_refused_pins(processor: Processor, pins: dict[str, int], message: str):
    with pytest.raises(QuotaError, match=message):
        processor(images=[[PICTURE], [PICTURE]], prompts=["cat <image> dog", "<image>"], **pins)


def test_room_for_new_tokens(folder: Path):
    processor = Processor.from_folder(folder, tiny_config(max_position_embeddings=24))
    prompt = "cat <image> dog"  # 3 text tokens with <s>, 16 visual ones
    assert int(processor([[PICTURE]], [prompt], max_new_tokens=5).lengths[0]) == 19
    with pytest.raises(
        QuotaError,
        match=r"prompt 0 is too long: 3 text \+ 16 visual \+ 6 new tokens exceed "
        "max_position_embeddings 24",
    ):
        processor([[PICTURE]], [prompt], max_new_tokens=6)


def test_image_ids_from_other_text_are_refused(folder: Path):
    from tokenizers import AddedToken

    processor = Processor.from_folder(folder, tiny_config())
    backend = processor.tokenizer.backend_tokenizer
    # a normalizer that turns other text into the placeholder after it has been counted
    from tokenizers import normalizers

    backend.normalizer = normalizers.Replace("picture", "<image>")
    backend.add_special_tokens([AddedToken("<image>", special=True, normalized=True)])
    assert IMAGE_TOKEN_ID in processor.tokenizer("a picture")["input_ids"]
    with pytest.raises(QuotaError, match=r"prompt 0 tokenizes to 1 image tokens \(id 4\) for 0"):
        processor(prompts=["a picture"])


def test_ids_outside_the_vocabulary_are_refused(folder: Path):
    processor = Processor.from_folder(folder, tiny_config(vocab_size=100))
    assert real_ids(processor(prompts=["user"]))
    with pytest.raises(
        QuotaError, match=r"prompt 0 holds token 'bottle' with id \d+, outside .* 100"
    ):
        processor(prompts=["bottle"])


@pytest.mark.parametrize(
    ("ladder", "message"),
    [
        ({"text": ()}, "non-empty tuple"),
        ({"text": (8, 8)}, r"must rise from at least 1, got \(8, 8\)"),
        ({"text": (0, 8)}, "must rise from at least 1"),
        ({"image_slots": [1, 2]}, "non-empty tuple"),
        ({"batch_size": (1, 2.0)}, "tuple of integers"),
    ],
)
def test_refused_ladders(ladder: dict[str, Any], message: str):
    with pytest.raises(QuotaError, match=message):
        Buckets(**ladder)


def test_stop_ids_of_the_folder(processor: Processor):
    assert processor.stop_ids == (EOS_ID,)
