"""``recipe``, ``profile`` and ``generate --show-tokens`` at work, against the library's answers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from quota_jax.checkpoint import open_checkpoint, set_recipe
from quota_jax.cli import main
from quota_jax.cli.recipe_tables import sweep_table
from quota_jax.config import PRESETS
from quota_jax.prune.allocator import allocate, quota_recipe
from quota_jax.prune.calibration_pass import Journal
from quota_jax.prune.sensitivity import Sensitivities
from quota_jax.prune.weights import QuotaWeights
from quota_jax.recipe import Recipe, Selector
from tests.tiny_models import draw_picture, write_tiny_llava

DERIVE = ("--derive", "--data", "calib.json", "--reference", "full")
QUESTION = "is there a red circle ?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """full and w4, checkpoints of one model of 4 layers; other, of 2; calib.json, a.png, b.png."""
    folder = tmp_path_factory.mktemp("recipe")
    write_tiny_llava(folder / "hf", num_layers=4, image_size=56)
    write_tiny_llava(folder / "hf2", num_layers=2, image_size=56)
    entries = []
    for seed, name in enumerate(("a.png", "b.png")):
        draw_picture(seed, (90, 50)).save(folder / name)
        # Batches of two then have one shape.
        entries += [{"image": name, "text": QUESTION}, {"text": QUESTION}]
    (folder / "calib.json").write_text(json.dumps(entries))
    for source, out in (("hf", "full"), ("hf2", "other")):
        assert main(["convert", str(folder / source), "--out", str(folder / out)]) == 0
    bits = ["--out", str(folder / "w4"), "--bits", "W4A4KV4", "--modules", "decoder"]
    assert main(["calibrate", str(folder / "full"), *bits]) == 0
    return folder


@pytest.fixture(autouse=True)
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(folder)
    yield
    for left in folder.glob("*.sensitivities.json*"):
        left.unlink()


@pytest.fixture
def output(capsys: pytest.CaptureFixture[str]):
    """Runs a command that must succeed; returns its stdout."""

    def run(*argv: object) -> str:
        capsys.readouterr()
        status = main([str(part) for part in argv])
        out, err = capsys.readouterr()
        assert (status, err) == (0, "")
        return out

    return run


def interrupted(monkeypatch: pytest.MonkeyPatch, *argv: object) -> None:
    """Runs a command that is stopped behind its first batch."""
    append = Journal.append

    def stop(journal: Journal, values) -> None:
        append(journal, values)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Journal, "append", stop)
        assert main([str(part) for part in argv]) == 130


def test_derive_measures_allocates_and_stores(output, monkeypatch) -> None:
    options = ("--layers", 1, 2, 3, "--rho", 0.25, "--tau", 0.5, "--batch-size", 2)
    command = ("recipe", "w4", *DERIVE, *options)
    interrupted(monkeypatch, *command)
    assert Path("w4.sensitivities.json.partial").exists()
    resumed = output(*command)
    assert not Path("w4.sensitivities.json.partial").exists()
    found = Sensitivities.read(Path("w4.sensitivities.json"))
    text = output(*command, "--sensitivities", "again.json", "--write", "--plot", "plot.png")
    assert Sensitivities.read(Path("again.json")) == found  # killed or not
    assert "wrote plot.png\nwrote w4/recipe.json\n" in text
    Image.open("plot.png").load()

    allocation = allocate(found.values[1:], (1, 2, 3), 0.25, 0.5)
    expected = quota_recipe(4, (1, 2, 3), allocation.ratios, selector="quota")
    checkpoint = open_checkpoint("w4")
    assert checkpoint.recipe == expected
    derivation = checkpoint.provenance["derivation"]
    assert derivation["sensitivities"]["values"] == list(found.values)
    assert derivation["allocation"]["ratios"] == list(allocation.ratios)
    assert (derivation["rho"], derivation["tau"]) == (0.25, 0.5)
    assert found.provenance["samples"] == 4
    for value, ratio in zip(found.values[1:], allocation.ratios, strict=True):
        assert f"{value:.4f}" in text
        assert f"{ratio:.4f}" in text

    # Measured once: the same command, and one without data, take the file.
    monkeypatch.setattr(Journal, "append", None)
    assert output(*command).split("\n", 1)[1] == resumed.split("\n", 1)[1]
    file = ("--derive", "--sensitivities", "w4.sensitivities.json", *options)
    assert output("recipe", "w4", *file).split("\n", 1)[1] == resumed.split("\n", 1)[1]

    # A recipe that is not derived has no derivation.
    output("recipe", "w4", "--stages", "1:0.5", "3:0.25", "--selector", "stride", "--write")
    assert open_checkpoint("w4").provenance["derivation"] is None


def test_stages_files_and_peers(output, tmp_path: Path) -> None:
    output("recipe", "w4", "--stages", "1:0.5", "3:0.25", "--min-keep-per-image", 2, "--write")
    recipe = open_checkpoint("w4").recipe
    assert [(s.layer, s.keep, s.point, s.min_keep_per_image) for s in recipe.stages] == [
        (1, 0.5, "after_attention", 2),
        (3, 0.25, "after_attention", 2),
    ]
    by_hand = {"num_layers": 4, "stages": [{"layer": 2, "keep": 0.5, "selector": "random"}]}
    (tmp_path / "r.json").write_text(json.dumps(by_hand))
    output("recipe", "w4", "--file", tmp_path / "r.json", "--write")
    assert open_checkpoint("w4").recipe == Recipe.from_json(by_hand)
    text = output("recipe", "w4", "--peer", "div_prune", "--keep", 0.25)
    assert re.search(r"^1-3 +4 +25\.0 %", text, re.MULTILINE)


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        (("--redistribute", "inter"), (0.0, 0.40, 0.25, 0.35)),
        (("--redistribute", "residual"), (0.45 + 0.2 / 3, 0.25 + 0.2 / 3, 0.1 + 0.2 / 3, 0.0)),
        (("--redistribute", "intra", "residual"), (0.60, 0.40, 0.0, 0.0)),
        (("--weights", "inter=.35,residual=0.3"), (0.35, 0.25, 0.10, 0.30)),
        (("--weights", "inter=.55,magnitude=.15,intra=0,residual=.3"), (0.55, 0.15, 0.0, 0.3)),
    ],
)
def test_weights_as_in_table_5(output, options, weights) -> None:
    order = ("inter", "magnitude", "intra", "residual")
    common = ("--keep", 0.5, "--layers", 1, 2, "--selector", "quota")
    text = output("recipe", "w4", *common, *options, "--write")
    (found,) = {stage.selector.weights for stage in open_checkpoint("w4").recipe.stages}
    np.testing.assert_allclose([getattr(found, name) for name in order], weights, rtol=1e-12)
    shown = ", ".join(f"{n} {w:.4g}" for n, w in zip(order, weights, strict=True) if w)
    assert f"keep 0.75 by quota ({shown})" in text


def test_a_score_without_residual_runs_on_inputs_that_are_not_quantized(output) -> None:
    common = ("recipe", "full", "--keep", 0.5, "--layers", 1, "--selector", "quota", "--write")
    output(*common, "--redistribute", "residual")
    (stage,) = open_checkpoint("full").recipe.stages
    assert stage.selector == Selector(name="quota", weights=QuotaWeights().without("residual"))
    output(*common, "--redistribute")
    (stage,) = open_checkpoint("full").recipe.stages
    assert stage.selector == Selector(name="quota", redistribute=True)


def test_the_sweep_reproduces_the_papers_budgets(output) -> None:
    def recipe(keep: float) -> Recipe:
        return Recipe.uniform(num_layers=32, layers=range(2, 7), keep=keep)

    lines = sweep_table(
        {"0.3": recipe(0.3), "0.05": recipe(0.05)}, PRESETS["llava_1_5_7b"]
    ).splitlines()
    assert lines[0].split()[:3] == ["kept", "layer", "2"]
    # Reference: 223.4 tokens on average and 40.85 % at .3, 20.15 % at .05.
    assert lines[2].split()[:9] == ["0.3", "496", "415", "335", "254", "173", "223.4", "40.85", "%"]
    assert lines[3].split()[:6] == ["0.05", "467", "358", "248", "139", "29"]
    assert lines[3].split()[7] == "20.15"

    swept = output("recipe", "w4", "--sweep", "0.5,0.25", "1", "--layers", 1, 3, "--plot", "s.svg")
    rows = [line.split() for line in swept.splitlines()[2:5]]
    # 16 tokens: ceil(.75 * 16), 8; ceil(.625 * 16), 4; all.
    assert [row[:3] for row in rows] == [["0.5", "12", "8"], ["0.25", "10", "4"], ["1", "16", "16"]]
    assert rows[2][4:] == ["100.00", "%", "100.00", "%"]
    assert Path("s.svg").read_text().startswith("<?xml")


REFUSED = [
    ("--derive", "needs --data and --reference, or --sensitivities"),
    ("--derive --data calib.json", "--data and --reference belong together"),
    ("--derive --data calib.json --reference w4", "w4 is quantized (W4A4KV4)"),
    ("--derive --data calib.json --reference other", "text.num_layers is 4, not 2"),
    ("--derive --data calib.json --reference full --layers 9", "layer 9, but the decoder has 4"),
    ("--derive --data calib.json --reference full --rho 2", "rho must lie in [0, 1], got 2"),
    ("--derive --data calib.json --reference full --tau 0", "tau must be positive"),
    ("--derive --data nowhere.json --reference full", "nowhere.json"),
    ("--derive --data calib.json --reference full --batch-size 0", "batch_size"),
    ("--derive --sensitivities calib.json", "calib.json"),
    ("--derive --keep 0.3 --rho 0.3", "--rho belongs to --derive"),
    ("--keep 0.3 --tau 2", "--tau belongs to --derive"),
    ("--derive --stages 1:0.5", "exclude each other"),
    ("--stages 1:0.5 --keep 0.3", "takes no --keep"),
    ("--stages 1=0.5", "is not LAYER:KEEP"),
    ("--stages 1:half", "'half' is no number"),
    ("--stages 1:0.5 2:0.7", "grows at layer 2"),
    ("--stages 7:0.5", "layer 7, but the decoder has 4"),
    ("--file calib.json", "calib.json"),
    ("--file calib.json --positions keep --seed 3", "takes no --seed"),
    ("--peer magic --keep 0.5", "unknown peer 'magic'"),
    ("--peer fastv --keep 0.5 --seed 1", "--peer takes the published settings"),
    ("--flops 0.5", "--flops belongs to --peer"),
    ("--sweep 0.5,x", "'x' is no number"),
    ("--sweep 0.5 --keep 0.3", "--sweep names the final fractions"),
    ("--sweep 0.5 --write", "--write stores one"),
    ("--seed 3", "belongs to a new recipe"),
    ("--keep 0.5 --plot a.gif", "a.gif"),
    ("--keep 0.5 --weights inter=1", "belong to the selector 'quota'"),
    ("--keep 0.5 --selector quota --weights inter=1", "add up to 1.55, not to 1"),
    ("--keep 0.5 --selector quota --weights outer=1", "no metric 'outer'"),
    ("--keep 0.5 --selector quota --weights inter=.4,inter=.5", "inter twice"),
    ("--keep 0.5 --selector quota --weights inter=-1,magnitude=1.7", "not negative"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_recipe_refuses_in_one_line(capsys, options: str, message: str) -> None:
    assert main(["recipe", "w4", *options.split()]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err


def test_derive_refuses_other_checkpoints(capsys, output) -> None:
    assert main(["recipe", "full", *DERIVE]) == 2
    assert "full is not quantized" in capsys.readouterr().err
    made = Sensitivities(values=(1.0,) * 4, lower=(1.0,) * 4, upper=(1.0,) * 4)
    made.write(Path("s.json"))
    assert main(["recipe", "w4", "--derive", "--sensitivities", "s.json"]) == 2
    assert "s.json: was measured on another checkpoint" in capsys.readouterr().err
    assert main(["recipe", "w4", *DERIVE, "--sensitivities", "s.json"]) == 2
    assert "s.json: was measured on other checkpoints, data or options" in capsys.readouterr().err


def test_profile_writes_json_and_figure_and_resumes(output, capsys, monkeypatch) -> None:
    command = ("profile", "w4", "--data", "calib.json", "--reference", "full", "--batch-size", 2)
    interrupted(monkeypatch, *command, "--out", "killed")
    capsys.readouterr()
    assert [path.name for path in Path("killed").iterdir()] == ["full_precision.partial.jsonl"]
    text = output(*command, "--out", "killed")
    assert text == output(*command, "--out", "whole").replace("whole", "killed")
    files = {name: Path("whole", name).read_bytes() for name in ("profile.json", "profile.png")}
    for name, content in files.items():
        assert Path("killed", name).read_bytes() == content
    assert sorted(path.name for path in Path("killed").iterdir()) == sorted(files)

    found = json.loads(files["profile.json"])
    assert list(found["series"]) == ["full_precision", "quantized"]
    for series in found["series"].values():
        for spread in series.values():
            low, middle, high = (np.array(spread[key]) for key in ("lower", "median", "upper"))
            assert low.shape == (4,)
            assert (low <= middle).all()
            assert (middle <= high).all()
    assert "candidates: --layers 1 (" in text
    assert found["candidates"]["layers"] == [1]
    assert main(["profile", "w4", "--data", "calib.json", "--out", "whole"]) == 2
    assert "whole/profile.json exists" in capsys.readouterr().err


def test_profile_needs_a_picture(capsys) -> None:
    Path("texts.json").write_text(json.dumps([{"text": QUESTION}]))
    assert main(["profile", "full", "--data", "texts.json", "--out", "texts"]) == 2
    assert "no sample with two visual tokens" in capsys.readouterr().err


def test_show_tokens_draws_what_is_kept(output, capsys) -> None:
    recipe = Recipe.uniform(num_layers=4, layers=(1, 2), keep=0.25, selector="stride")
    set_recipe("full", recipe)
    ask = ("generate", "full", "--prompt", QUESTION, "--max-new", 2)
    shown = output(*ask, "--image", "a.png", "--image", "b.png", "--show-tokens", "kept.png")
    plain = output(*ask, "--image", "a.png", "--image", "b.png")
    assert shown == plain + "wrote kept.png\n"
    Image.open("kept.png").load()
    for options, message in (
        (["--show-tokens", "k.png"], "needs a picture"),
        (
            ["--image", "a.png", "--recipe-none", "--show-tokens", "k.png"],
            "keeps every visual token",
        ),
        (["--image", "a.png", "--show-tokens", "k.txt"], "k.txt"),
    ):
        assert main([*map(str, ask), *options]) == 2
        assert message in capsys.readouterr().err
        assert not Path("k.png").exists()
