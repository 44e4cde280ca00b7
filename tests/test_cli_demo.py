"""``quota-jax demo`` on an untrained model of the shipped one's kind."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from PIL import Image

import quota_jax.testbed as testbed
from quota_jax.checkpoint import open_checkpoint
from quota_jax.cli import main
from quota_jax.testbed.evaluate import MAIN_TYPES, make_items
from quota_jax.testbed.export import write_hf_folder
from quota_jax.testbed.training_model import SMALL_LLAVA, init_params


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    vision = dataclasses.replace(
        SMALL_LLAVA.vision, hidden_size=32, intermediate_size=48, num_layers=3, num_heads=2
    )
    text = dataclasses.replace(
        SMALL_LLAVA.text,
        **{"hidden_size": 48, "intermediate_size": 64, "num_layers": 4, "head_dim": 16},
        **{"num_heads": 3, "num_kv_heads": 3},
    )
    config = dataclasses.replace(SMALL_LLAVA, vision=vision, text=text)
    folder = tmp_path_factory.mktemp("demo") / "model"
    write_hf_folder(folder, init_params(config, 1), config, card="untrained\n")
    return folder


def test_demo_shows_truth_beside_both_answers_and_saves_pictures(
    untrained: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(testbed, "small_llava_path", lambda: untrained)
    out = tmp_path / "out"
    command = ["demo", "--out", str(out), "--pictures", "2", "--seed", "3", "--keep", "0.25"]
    command += ["--method", "rtn"]
    assert main(command) == 0
    text, err = capsys.readouterr()
    assert err == ""

    items = make_items(2, 3, MAIN_TYPES)
    assert len(items) >= 2
    for scene, question in items:
        row = next(
            line
            for line in text.splitlines()
            if line.startswith(f"scene_{scene.index}.png") and question.text in line
        )
        assert question.answer in row.split(question.text)[1]
    assert "144 of 576" in text  # ceil(.25 * 576) after the last stage
    small = open_checkpoint(out / "W4A4KV4")
    assert small.quantization.label == "W4A4KV4"
    assert [stage.layer for stage in small.recipe.stages] == [2, 3]
    assert small.recipe.stages[-1].keep == 0.25
    assert open_checkpoint(out / "full").recipe.is_none
    for name, width in (("scene_0", 336), ("scene_1", 336), ("answers", 760)):
        with Image.open(out / f"{name}.png") as picture:
            assert picture.width == width

    foreign = tmp_path / "foreign"
    (foreign / "full").mkdir(parents=True)
    (foreign / "full" / "mine.txt").write_text("keep me")
    assert main(["demo", "--out", str(foreign), "--method", "rtn"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert (foreign / "full" / "mine.txt").read_text() == "keep me"
    # A second run replaces the first one's checkpoints.
    first = (out / "full" / "manifest.json").stat().st_mtime_ns
    assert main(command) == 0
    assert (out / "full" / "manifest.json").stat().st_mtime_ns > first


def test_demo_learns_from_pictures_that_it_does_not_ask_about(
    untrained: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(testbed, "small_llava_path", lambda: untrained)
    out = tmp_path / "out"
    small = ["--pictures", "1", "--samples", "2", "--steps", "2"]
    assert main(["demo", "--out", str(out), *small]) == 0
    text, err = capsys.readouterr()
    assert err == ""
    assert "FlatQuant on 2 drawn pictures, 2 steps a block" in text
    assert open_checkpoint(out / "W4A4KV4").quantization.method == "flatquant"
    drawn = sorted((out / "calibration").glob("*.png"))
    assert len(drawn) == 2
    asked = (out / "scene_0.png").read_bytes()
    assert asked not in [path.read_bytes() for path in drawn]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pictures", "0"], "--pictures must be at least 1"),
        (["--keep", "2"], "keep must lie in"),
        (["--bits", "W3"], "do not read like"),
        (["--samples", "0"], "--samples must be at least 1"),
        (["--seed", "-1"], "seed must be"),
    ],
)
def test_bad_options_write_nothing(
    untrained: Path, tmp_path: Path, monkeypatch, capsys, options: list[str], message: str
) -> None:
    monkeypatch.setattr(testbed, "small_llava_path", lambda: untrained)
    assert main(["demo", "--out", str(tmp_path / "out"), *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()
