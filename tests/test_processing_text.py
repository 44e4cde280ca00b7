"""Decoding, streaming, stop ids and the loading of tokenizers."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from processing_folders import (
    byte_level_tokenizer,
    image_id,
    real_ids,
    tiny_config,
    write_folder,
    write_llama_folder,
)
from tiny_processor import EOS_ID

from quota_jax.errors import QuotaError
from quota_jax.processing import DecodeStream, Processor

TEXTS = [
    "The image shows a red stop sign.",
    "naïve café: 你好, 🙂👍🏽!",
    "  two leading spaces\n\nand lines\n",
    "a. b , c 's  d",  # a clean-up of spaces would alter it
    "",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama_folder(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def processor(folder: Path) -> Processor:
    return Processor.from_folder(folder, tiny_config(image_id(folder)))


@pytest.fixture(scope="module")
def byte_level() -> Any:
    return byte_level_tokenizer()


def test_decode_inverts_encoding(processor: Processor):
    ids = [processor.tokenizer(text)["input_ids"] + [2] for text in TEXTS]
    width = max(map(len, ids)) + 3
    tokens = np.full((len(ids), width), 5, np.int32)  # beyond the lengths: never decoded
    for row, values in zip(tokens, ids, strict=True):
        row[: len(values)] = values
    lengths = np.asarray([len(values) for values in ids])
    assert processor.decode(tokens, lengths) == TEXTS
    kept = processor.decode(tokens, lengths, skip_special_tokens=False)
    assert all(text.startswith("<s>") and text.endswith("</s>") for text in kept)
    assert processor.decode(tokens, np.zeros(len(ids), int)) == [""] * len(ids)


def test_decode_refuses_what_does_not_fit(processor: Processor):
    tokens = np.ones((2, 3), np.int32)
    with pytest.raises(QuotaError, match=r"tokens \(2, 3\) and lengths \(3,\) differ"):
        processor.decode(tokens, [1, 2, 3])
    with pytest.raises(QuotaError, match=r"lengths \[1, 4\] outside 0..3"):
        processor.decode(tokens, [1, 4])


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.parametrize("kind", ["llama", "byte_level"])
def test_streams_join_to_the_text(
    processor: Processor, byte_level: Any, text: str, chunk: int, kind: str
):
    tokenizer = processor.tokenizer if kind == "llama" else byte_level
    ids = tokenizer(text)["input_ids"]
    stream = DecodeStream(tokenizer)
    pieces = [stream.push(ids[i : i + chunk]) for i in range(0, len(ids), chunk)]
    assert all("\ufffd" not in piece for piece in pieces)
    assert "".join(pieces) + stream.finish() == text
    if chunk == 1 and len(text) > 20:
        assert sum(bool(piece) for piece in pieces) >= 8  # it does stream


@settings(max_examples=200, deadline=None)
@given(data=st.data(), kind=st.sampled_from(["llama", "byte_level"]), skip=st.booleans())
def test_streamed_text_is_final_for_any_ids(
    processor: Processor, byte_level: Any, data: st.DataObject, kind: str, skip: bool
):
    tokenizer = processor.tokenizer if kind == "llama" else byte_level
    whole = tokenizer.convert_tokens_to_ids
    likely = st.sampled_from([1, 2, *whole(tokenizer.tokenize("é 🙂 a"))])
    ids = data.draw(st.lists(likely | st.integers(0, len(tokenizer) + 40), max_size=14))
    stream = DecodeStream(tokenizer, skip_special_tokens=skip)
    text = ""
    for token in ids:
        text += stream.push([token])
    decoded = tokenizer.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
    assert text + stream.finish() == decoded


def test_incomplete_characters_wait(processor: Processor, byte_level: Any):
    endings = {processor.tokenizer: ["", "🙂b"], byte_level: ["🙂", "b"]}
    for tokenizer, ending in endings.items():
        ids = tokenizer("a 🙂b", add_special_tokens=False)["input_ids"]
        stream = DecodeStream(tokenizer)
        said = [stream.push([token]) for token in ids]
        assert "".join(said) == "a 🙂b"
        assert said[-2:] == ending
        cut = DecodeStream(tokenizer)
        shown = "".join(cut.push([token]) for token in ids[:-2])
        assert "\ufffd" not in shown
        assert cut.finish().startswith("\ufffd")  # the answer ended inside the character
    assert "".join(processor.decode_stream().push(ids) for ids in ([1], [2])) == ""


@pytest.mark.parametrize(
    ("value", "expected"), [(2, (2,)), ([2, 0, 2], (2, 0)), (None, (EOS_ID,)), ([], ())]
)
def test_stop_ids(tmp_path: Path, value: Any, expected: tuple[int, ...]):
    folder = write_folder(tmp_path, generation_config_json={"eos_token_id": value})
    assert Processor.from_folder(folder, tiny_config()).stop_ids == expected


def test_stop_ids_fall_back_to_the_tokenizer_then_the_config(tmp_path: Path):
    folder = write_folder(tmp_path, generation_config_json=None)
    assert Processor.from_folder(folder, tiny_config()).stop_ids == (EOS_ID,)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        settings = json.loads((folder / name).read_text())
        settings.pop("eos_token")
        (folder / name).write_text(json.dumps(settings))
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["eos_token_id"] = [7, 9]
    (folder / "config.json").write_text(json.dumps(config))
    assert Processor.from_folder(folder, tiny_config()).stop_ids == (7, 9)
    (folder / "config.json").unlink()
    assert Processor.from_folder(folder, tiny_config()).stop_ids == ()


@pytest.mark.parametrize("value", ["</s>", True, -1, [2, 600], 2.0])
def test_impossible_stop_ids(tmp_path: Path, value: Any):
    folder = write_folder(tmp_path, generation_config_json={"eos_token_id": value})
    with pytest.raises(QuotaError, match=r"generation_config.json: eos_token_id .* 0\.\.511"):
        Processor.from_folder(folder, tiny_config())


def test_the_folders_config_is_not_needed(folder: Path, processor: Processor, tmp_path: Path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    prompt = "  naïve: <s> cat 🙂"
    expected = real_ids(processor(prompts=[prompt]))
    for content in (None, '{"format_version": 1, "model": {}}', '{"model_type": "unheard_of"}'):
        (copy / "config.json").unlink(missing_ok=True)
        if content:
            (copy / "config.json").write_text(content)
        other = Processor.from_folder(copy, tiny_config(image_id(folder)))
        assert real_ids(other(prompts=[prompt])) == expected
        assert type(other.tokenizer) is type(processor.tokenizer)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer_json": None}, "has no tokenizer: neither tokenizer.json nor tokenizer.model"),
        ({"tokenizer_json": "{"}, "cannot load the tokenizer: "),
        ({"tokenizer_json": {"version": "1.0"}}, "cannot load the tokenizer: "),
        (
            {"tokenizer_config_json": "[]"},
            "tokenizer_config.json: expected a JSON object, found list",
        ),
        ({"tokenizer_config_json": "{"}, "tokenizer_config.json: not readable as JSON"),
        ({"processor_config_json": {"image_token": 3}}, "image_token 3 is not text"),
        (
            {"processor_config_json": {"image_token": "cat"}},
            r"reads 'cat' as \[\d+\], but the model's image token id is 4",
        ),
        (
            {"processor_config_json": {"image_token": "cat dog"}},
            r"reads 'cat dog' as \[\d+, \d+\], but",
        ),
    ],
)
def test_refused_tokenizers(tmp_path: Path, files: dict[str, Any], message: str):
    with pytest.raises(QuotaError, match=message):
        Processor.from_folder(write_folder(tmp_path, **files), tiny_config())


def test_a_missing_folder(tmp_path: Path):
    with pytest.raises(QuotaError, match="nowhere is not a folder"):
        Processor.from_folder(tmp_path / "nowhere", tiny_config())


def test_remote_code_is_not_run(tmp_path: Path):
    folder = write_folder(tmp_path)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    marker = tmp_path / "ran"
    (folder / "foreign.py").write_text(f"open({str(marker)!r}, 'w')\nclass Foreign: pass\n")
    settings["auto_map"] = {"AutoTokenizer": ["foreign.Foreign", "foreign.Foreign"]}
    settings["tokenizer_class"] = "Foreign"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with suppress(QuotaError):  # refused or read without the code: versions differ
        Processor.from_folder(folder, tiny_config())
    assert not marker.exists()


@pytest.mark.parametrize("key", ["tokenizer_file", "vocab_file", "fast_tokenizer_files"])
@pytest.mark.parametrize("absolute", [True, False])
def test_no_path_leads_out_of_the_folder(tmp_path: Path, key: str, absolute: bool):
    outside = write_folder(tmp_path / "outside") / "tokenizer.json"
    folder = write_folder(tmp_path / "inside")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    value = str(outside) if absolute else "../outside/tokenizer.json"
    settings[key] = [value] if key == "fast_tokenizer_files" else value
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(QuotaError, match=r"tokenizer_config.json: .* is outside the folder"):
        Processor.from_folder(folder, tiny_config())


def test_linked_files_of_a_hub_cache_are_read(tmp_path: Path):
    blobs = write_folder(tmp_path / "blobs")
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(file)
    assert real_ids(Processor.from_folder(snapshot, tiny_config())(prompts=["cat"]))


def test_loading_is_silent(tmp_path: Path):
    """A fresh process without torch prints nothing (transformers would give advice)."""
    import os
    import subprocess
    import sys

    folder = write_folder(tmp_path)
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from processing_folders import tiny_config\n"
        "from quota_jax.processing import Processor\n"
        f"p = Processor.from_folder({str(folder)!r}, tiny_config())\n"
        "p(prompts=['cat']); p.render([[{'role': 'user', 'content': 'cat'}]])\n"
        "assert sys.modules['torch'] is None\n"
    )
    tests = Path(__file__).parent
    search = [str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRANSFORMERS_")}
    environment |= {"PYTHONPATH": os.pathsep.join(search), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
