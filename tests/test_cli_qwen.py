"""The command line on a tiny Qwen2.5-VL: the same commands as for LLaVA-1.5."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from test_processing_qwen import picture
from tiny_qwen import write_tiny_qwen

import quota_jax as qj
from quota_jax.cli import main


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hf, full, w4 and two pictures of different sizes."""
    folder = tmp_path_factory.mktemp("cli_qwen")
    write_tiny_qwen(folder / "hf", num_layers=4, max_position_embeddings=512)
    picture(200, 120).save(folder / "a.png")
    picture(90, 300, seed=1).save(folder / "b.png")
    full = str(folder / "full")
    assert main(["convert", str(folder / "hf"), "--out", full]) == 0
    bits = ["--bits", "W4A8KV4"]
    assert main(["calibrate", full, "--out", str(folder / "w4"), *bits]) == 0
    layers = ["--layers", "1", "2", "--write"]
    assert main(["recipe", str(folder / "w4"), "--keep", "0.3", *layers]) == 0
    return folder


def answer(path: Path, text: str, *images: Path) -> str:
    vlm = qj.load(path)
    parts: list = [{"type": "image", "image": str(image)} for image in images]
    turn = {"role": "user", "content": [*parts, {"type": "text", "text": text}]}
    batch = vlm.processor.chat([[turn]])
    made = qj.generate(
        vlm.model, batch, recipe=vlm.recipe, max_new_tokens=6, stop_ids=vlm.processor.stop_ids
    )
    return vlm.processor.decode(made.tokens, made.lengths)[0].strip()


@pytest.mark.parametrize("name", ["full", "w4"])
def test_generate_answers_as_the_library_does(files: Path, name: str, capsys):
    images = [files / "a.png", files / "b.png"]
    command = ["generate", str(files / name), "--prompt", "what is the color", "--max-new", "6"]
    for image in images:
        command += ["--image", str(image)]
    capsys.readouterr()
    assert main(command) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.strip() == answer(files / name, "what is the color", *images)


@pytest.mark.slow
def test_chat_keeps_the_picture_of_an_earlier_turn(files: Path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("what is the color\nis there a car\n"))
    command = ["chat", str(files / "w4"), "--image", str(files / "a.png"), "--max-new", "4"]
    capsys.readouterr()
    assert main(command) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert len(out.splitlines()) == 2


def test_inspect_and_recipe_describe_the_model(files: Path, capsys):
    assert main(["inspect", str(files / "w4")]) == 0
    out = capsys.readouterr().out
    assert "qwen2_5_vl" in out
    assert "windows of" in out
    assert "W4A8KV4" in out
    assert "of 1296 visual tokens of a picture of 1008 x 1008 pixels" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--image", "{files}/a.png", "--max-new", "600"], "too long"),
        (["--image", "{files}/wide.png"], "aspect ratio"),
        (["--template", "zephyr"], "chatml"),
        (["--image", "{files}/hf/config.json"], "not a picture"),
    ],
)
def test_bad_input_is_one_line(files: Path, capsys, options: list[str], message: str):
    if not (files / "wide.png").exists():
        picture(1000, 3).save(files / "wide.png")
    options = [part.format(files=files) for part in options]
    capsys.readouterr()
    assert main(["generate", str(files / "full"), "--prompt", "what", *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert message in err


def test_export_gives_back_the_tensors(files: Path, capsys):
    from tiny_models import assert_same_tensors, read_folder

    assert main(["export", str(files / "full"), "--out", str(files / "back")]) == 0
    assert_same_tensors(read_folder(files / "back"), read_folder(files / "hf"))
