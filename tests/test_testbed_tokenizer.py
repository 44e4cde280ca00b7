"""Tokenizer, prompt and processor files of the testbed's models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from quota_jax.processing import Processor
from quota_jax.testbed import TYPES, draw_scenes
from quota_jax.testbed.conversation import compact, turns
from quota_jax.testbed.layout import UNIFORMS_PER_SCENE, Difficulty, sample_layout
from quota_jax.testbed.questions import UNIFORMS_PER_QUESTION, ask_layout
from quota_jax.testbed.scenes import join_words
from quota_jax.testbed.training_model import MEAN, PREFIX, SMALL_LLAVA, STD
from quota_jax.testbed.vocabulary import (
    BOS,
    EOS,
    ID,
    IMAGE,
    PAD,
    UNK,
    VOCAB_SIZE,
    WORDS,
    build_tokenizer,
    plural,
    prompt,
    write_processor_files,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("processor")
    write_processor_files(path)
    (path / "config.json").write_text('{"model_type": "llava"}')
    return path


@pytest.fixture(scope="module")
def tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def test_special_tokens(tokenizer):
    assert [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id] == [0, 1, 2]
    assert tokenizer.unk_token == UNK
    assert tokenizer.image_token == IMAGE
    assert tokenizer.convert_tokens_to_ids([PAD, BOS, EOS, UNK, IMAGE]) == [0, 1, 2, 3, 4]
    assert len(tokenizer) == len(WORDS) <= VOCAB_SIZE
    assert [tokenizer.convert_ids_to_tokens(i) for i in range(len(WORDS))] == list(WORDS)


def test_training_tokens_are_what_the_prompt_gives(tokenizer):
    """Every question type, with and without the suffix: `prompt(text)` == the first turn."""
    rng = np.random.default_rng(0)
    count = 60
    uniforms = rng.random((count, UNIFORMS_PER_SCENE), dtype=np.float32)
    layout = sample_layout(uniforms, Difficulty())
    types = np.broadcast_to(np.arange(len(TYPES)), (count, len(TYPES)))
    uniforms = rng.random((count, len(TYPES) * UNIFORMS_PER_QUESTION), dtype=np.float32)
    questions = ask_layout(layout, uniforms, types, np, 0.3)
    suffixed = 0
    for scene in range(count):
        for index in range(len(TYPES)):
            single = type(questions)(*(x[scene : scene + 1, index : index + 1] for x in questions))
            tokens, weights = compact(*turns(single), 40)
            asked = list(tokens[0][: int(np.argmax(weights[0] > 0))])
            text = join_words(single.words[0, 0])
            text = text[0].upper() + text[1:]
            suffixed += "single word" in text
            expected = [*PREFIX, ID[IMAGE], *asked]
            assert tokenizer(prompt(text))["input_ids"] == expected, text
            # The answer as text is what decoding gives back.
            answer = [t for t in single.answers[0, 0] if t >= 0]
            assert tokenizer.decode([*answer, ID[EOS]], skip_special_tokens=True) == join_words(
                single.answers[0, 0]
            )
    assert 60 < suffixed < 240


def test_free_text(tokenizer):
    def pieces(text: str) -> list[str]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return tokenizer.convert_ids_to_tokens(ids)

    assert pieces("Is there a RED Car?") == ["is", "there", "a", "red", "car", "?"]
    assert pieces("42 cars, 123") == ["4", "##2", "cars", ",", "1", "##2", "##3"]
    assert pieces("apple carpet 4x !") == [UNK, UNK, "4", UNK, UNK]
    assert tokenizer("")["input_ids"] == [ID[BOS]]


def test_chat_template_gives_the_training_prompt(tokenizer):
    pytest.importorskip("jinja2", reason="transformers renders templates with jinja2")
    question = {"type": "text", "text": "Where is the car?"}
    chat = [{"role": "user", "content": [{"type": "image"}, question]}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == prompt("Where is the car?")
    chat += [
        {"role": "assistant", "content": [{"type": "text", "text": "top left"}]},
        {"role": "user", "content": "And the tree?"},
    ]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == (
        "USER: <image>\nWhere is the car? ASSISTANT: top left</s>USER: And the tree? ASSISTANT:"
    )


def test_image_processor_is_the_training_normalisation(folder):
    from transformers import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil.from_pretrained(folder)
    scene = draw_scenes(0, 1)[0]
    pixels = processor([scene.pil], return_tensors="np")["pixel_values"][0]
    expected = (scene.image.transpose(2, 0, 1) / np.float32(255) - MEAN[:, None, None]) / (
        STD[:, None, None]
    )
    np.testing.assert_allclose(pixels, expected, atol=1e-6)


def test_library_processor_gives_the_training_sequence(folder):
    processor = Processor.from_folder(folder, SMALL_LLAVA)
    scene = draw_scenes(0, 1)[0]
    batch = processor(images=[[scene.pil]], prompts=[prompt("Where is the red car?")])
    length = int(batch.lengths[0])
    tokens = np.asarray(batch.tokens)[0, :length]
    text = [ID[word] for word in ("where", "is", "the", "red", "car", "?", "assistant:")]
    np.testing.assert_array_equal(tokens, [*PREFIX, *[ID[IMAGE]] * 576, *text])
    assert processor.stop_ids == (ID[EOS],)
    answer = np.array([[ID["4"], ID["##2"], ID[EOS], 0]])
    assert processor.decode(answer, np.array([3])) == ["42"]


def test_plurals_and_vocabulary():
    assert [plural(kind) for kind in ("car", "cross", "fish")] == ["cars", "crosses", "fish"]
    assert len(set(WORDS)) == len(WORDS)
    assert build_tokenizer().get_vocab_size() == len(WORDS)
