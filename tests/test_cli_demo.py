"""``quota-jax demo`` on untrained models of the shipped ones' kind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from untrained import write_untrained

import quota_jax.testbed as testbed
from quota_jax.checkpoint import open_checkpoint
from quota_jax.cli import main
from quota_jax.cli.demo import _clear
from quota_jax.cli.demo_sheet import WIDTH, fade_dropped
from quota_jax.testbed.evaluate import make_items

LAYERS = {"llava": 4, "qwen2_5_vl": 8}
"""Enough for some of the paper's candidate layers."""


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("demo")
    return {
        family: write_untrained(root / family, family, num_layers=layers)
        for family, layers in LAYERS.items()
    }


@pytest.fixture(autouse=True)
def shipped(monkeypatch, untrained: dict[str, Path]) -> None:
    monkeypatch.setattr(testbed, "small_model_path", untrained.__getitem__)


@pytest.mark.parametrize("family", ["llava", pytest.param("qwen2_5_vl", marks=pytest.mark.slow)])
def test_demo_shows_truth_beside_both_answers_and_saves_pictures(
    family: str, tmp_path: Path, capsys
) -> None:
    out = tmp_path / "out"
    command = ["demo", "--model", family, "--out", str(out), "--pictures", "2", "--seed", "3"]
    command += ["--questions", "3", "--keep", "0.25", "--method", "rtn"]
    assert main(command) == 0
    text, err = capsys.readouterr()
    assert err == ""

    items = make_items(2, 3, questions=3, family=family)
    assert len(items) == 6
    for item in items:
        row = next(
            line
            for line in text.splitlines()
            if line.startswith(f"scene_{item.picture}.png") and item.question in line
        )
        assert item.answer in row.split(item.question)[1]
    # Pictures of 336 x 336 and 280 x 448 pixels have 144 and 160 tokens of 28 x 28.
    assert ("144 of 576" if family == "llava" else "38 of 152") in text
    assert "of 6 " in text
    small = open_checkpoint(out / "W4A4KV4")
    assert small.quantization.label == "W4A4KV4"
    stages = [1, 2, 3] if family == "llava" else [2, 3, 4, 5, 6]
    assert [stage.layer for stage in small.recipe.stages] == stages
    assert small.recipe.stages[-1].keep == 0.25
    assert open_checkpoint(out / "full").recipe.is_none
    for number in (0, 1):
        with Image.open(out / f"scene_{number}.png") as picture:
            assert picture.size == items[3 * number].image.size
    with Image.open(out / "answers.png") as sheet:
        assert sheet.width == WIDTH
        assert len(sheet.convert("RGB").getcolors(2**24) or ()) > 1000

    foreign = tmp_path / "foreign"
    (foreign / "full").mkdir(parents=True)
    (foreign / "full" / "mine.txt").write_text("keep me")
    assert main(["demo", "--out", str(foreign), "--method", "rtn"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert (foreign / "full" / "mine.txt").read_text() == "keep me"
    # A second run replaces the first one's checkpoints.
    _clear(out / "full")
    assert not (out / "full").exists()


def test_dropped_tokens_fade_and_kept_ones_stay() -> None:
    pixels = np.zeros((56, 28, 3), np.uint8)
    pixels[..., 0] = 200
    kept = np.array([[True, False], [False, False], [False, True], [False, False]])
    faded = np.asarray(fade_dropped(Image.fromarray(pixels), kept))
    cells = faded.reshape(4, 14, 2, 14, 3).transpose(0, 2, 1, 3, 4)
    assert (cells[kept] == (200, 0, 0)).all()
    saturation = cells[~kept].max(-1).astype(int) - cells[~kept].min(-1)
    assert saturation.max() < 60


@pytest.mark.slow
def test_demo_learns_from_drawn_pictures(tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    small = ["--pictures", "1", "--samples", "2", "--steps", "2"]
    assert main(["demo", "--out", str(out), *small]) == 0
    text, err = capsys.readouterr()
    assert err == ""
    assert "FlatQuant on 2 drawn pictures, 2 steps a block" in text
    assert open_checkpoint(out / "W4A4KV4").quantization.method == "flatquant"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pictures", "0"], "pictures must be at least 1"),
        (["--questions", "0"], "questions must be at least 1"),
        (["--keep", "2"], "keep must lie in"),
        (["--bits", "W3"], "do not read like"),
        (["--samples", "0"], "--samples must be at least 1"),
        (["--seed", "-1"], "seed must be"),
    ],
)
def test_bad_options_write_nothing(
    tmp_path: Path, capsys, options: list[str], message: str
) -> None:
    assert main(["demo", "--out", str(tmp_path / "out"), *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()
