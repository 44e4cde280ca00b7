"""``quota-jax flops``: its tables against the library's counts, and one line for bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quota_jax.checkpoint import open_checkpoint
from quota_jax.cli import main
from quota_jax.flops import executed_flops, paper_flops
from quota_jax.recipe import Recipe
from tests.tiny_models import write_tiny_llava

UNIFORM = Recipe.uniform(num_layers=32, layers=[2, 3, 4, 5, 6], keep=0.3)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """full, a checkpoint with a stored recipe, and recipes written by hand."""
    folder = tmp_path_factory.mktemp("flops")
    write_tiny_llava(folder / "hf", num_layers=4, image_size=56)
    assert main(["convert", str(folder / "hf"), "--out", str(folder / "full")]) == 0
    layers = ["--layers", "1", "2", "--write"]
    assert main(["recipe", str(folder / "full"), "--keep", "0.5", *layers]) == 0
    (folder / "uniform.json").write_text(json.dumps(UNIFORM.to_json()))
    growing = [{"layer": 1, "keep": 0.5}, {"layer": 2, "keep": 1}]
    (folder / "grows.json").write_text(json.dumps({"num_layers": 32, "stages": growing}))
    (folder / "broken.json").write_text("{")
    (folder / "list.json").write_text("[]")
    return folder


@pytest.fixture
def output(capsys: pytest.CaptureFixture[str]):
    """Runs a command that must succeed without a word on stderr; returns its lines."""

    def run(*argv: object) -> list[str]:
        capsys.readouterr()
        status = main(["flops", *map(str, argv)])
        out, err = capsys.readouterr()
        assert (status, err) == (0, "")
        return out.splitlines()

    return run


def row(lines: list[str], name: str) -> list[str]:
    (line,) = [line for line in lines if line.startswith(f"{name}  ")]
    return line.removeprefix(name).split()


@pytest.mark.parametrize("by", ["options", "file"])
def test_the_papers_setting_of_llava(files: Path, output, by: str):
    options = ["--keep", 0.3] if by == "options" else ["--recipe", files / "uniform.json"]
    lines = output("llava_1_5_7b", *options)
    assert lines[0] == "576 visual and 25 text tokens, 10^9 multiply-accumulates"
    # 1.6286 of 3.98677 T: the reference's 40.85 %.
    assert row(lines, "total, paper") == ["1628.660", "3986.766", "40.85", "%"]
    # 113.765 for the layer, and 32 heads x 128 x 601^2 for the attention mass that it is scored by.
    assert row(lines, "2") == ["601", "521", "115.245", "521", "107.661"]
    assert row(lines, "7-31") == ["198", "198", "40.391", "198", "40.391"]
    assert row(lines, "head, last token")[2:] == ["100.00", "%"]


def test_options_of_the_papers_count(output):
    options = ["llava_1_5_7b", "--keep", 0.3, "--text-tokens", 0]
    assert row(output(*options, "--matrices", 2), "total, paper")[2] == "38.22"
    late = output(*options, "--counted", "exit")
    assert row(late, "2")[-2:] == ["576", "119.286"]
    qwen = output("qwen2_5_vl_7b", "--keep", 0.3, "--grid", 18, 20)
    assert qwen[0].startswith("360 visual and 25 text tokens")
    assert row(qwen, "total, paper")[2] == "55.41"


def test_a_checkpoint_is_counted_under_its_stored_recipe(files: Path, output):
    checkpoint = open_checkpoint(files / "full")
    config, recipe = checkpoint.config, checkpoint.recipe
    tokens = {"visual_tokens": 16, "text_tokens": 9}
    lines = output(files / "full", "--text-tokens", 9)
    same = output(files / "full", "--text-tokens", 9, "--recipe", files / "full" / "recipe.json")
    assert lines == same
    executed = executed_flops(config, recipe, **tokens)
    whole = executed_flops(config, Recipe.none(4), **tokens)
    assert row(lines, "total, executed")[2] == f"{executed.percent_of(whole):.2f}"
    paper = paper_flops(config.text, recipe, **tokens)
    whole = paper_flops(config.text, Recipe.none(4), **tokens)
    assert row(lines, "total, paper")[2] == f"{paper.percent_of(whole):.2f}"
    two = output(files / "full", "--visual-tokens", 32)
    assert two[0].startswith("32 visual and 25 text tokens")
    none = output(files / "full", "--visual-tokens", 0)
    assert row(none, "vision tower") == ["0", "0", "-"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("nowhere", "nowhere: no such checkpoint folder, and no preset (llava_1_5_7b"),
        ("hf", "manifest.json"),
        ("", "CHECKPOINT|PRESET"),
        ("full --keep 1.5", "got 1.5"),
        ("full --keep nan", "got nan"),
        ("full --layers 1", "--layers needs --keep"),
        ("full --keep 0.3 --layers 7", "layer 7, but the decoder has 4"),
        ("full --keep 0.3 --recipe uniform.json", "--recipe and --keep exclude each other"),
        ("full --recipe uniform.json", "for 32 decoder layers, the model has 4"),
        ("llava_1_5_7b --recipe full/recipe.json", "for 4 decoder layers, the model has 32"),
        ("llava_1_5_7b --recipe grows.json", "grows.json: recipe grows at layer 2"),
        ("llava_1_5_7b --recipe broken.json", "broken.json: not valid JSON"),
        ("llava_1_5_7b --recipe list.json", "list.json"),
        ("llava_1_5_7b --recipe nowhere.json", "nowhere.json: cannot be read"),
        ("llava_1_5_7b --visual-tokens 577", "577 visual tokens are no whole pictures of 576"),
        ("llava_1_5_7b --visual-tokens -576", "got -576 visual"),
        ("llava_1_5_7b --text-tokens -1", "got 576 visual and -1 text"),
        ("llava_1_5_7b --grid 24 24", "grids"),
        ("qwen2_5_vl_7b --grid 0 3", "grids [(0, 3)]"),
        ("qwen2_5_vl_7b --grid 3 4 --visual-tokens 12", "exclude each other"),
        ("llava_1_5_7b --matrices 4", "--matrices"),
        ("llava_1_5_7b --counted mid", "--counted"),
    ],
)
def test_bad_input_is_one_line(files: Path, monkeypatch, capsys, argv: str, words: str):
    monkeypatch.chdir(files)
    capsys.readouterr()
    assert main(["flops", *argv.split()]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert words in err
