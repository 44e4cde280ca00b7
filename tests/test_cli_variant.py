"""`quota-jax calibrate --variant`: a Hugging Face folder to a quantized checkpoint with its recipe,
in one call."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from converters import convert
from quota_jax.checkpoint import open_checkpoint
from quota_jax.cli import main
from tests.tiny_models import draw_picture, write_tiny_llava

ROUND = ("--bits", "W4A8KV4", "--method", "rtn", "--layers", "1", "2")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hf, full (its checkpoint), calib.json with two pictures."""
    folder = tmp_path_factory.mktemp("variant")
    write_tiny_llava(folder / "hf", num_layers=3, image_size=56)
    convert(folder / "hf", folder / "full")
    entries = []
    for seed in range(2):
        draw_picture(seed).save(folder / f"{seed}.png")
        entries.append({"image": f"{seed}.png", "text": "what is a car ?"})
    (folder / "calib.json").write_text(json.dumps(entries))
    return folder


@pytest.mark.slow
def test_one_call_makes_a_checkpoint_of_a_hugging_face_folder(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """Killed while it measures, it leaves no OUT; the same command goes on, and generate, which is
    told nothing, prunes by the recipe."""
    from quota_jax import co_calibration

    out, data = tmp_path / "quota", made / "calib.json"
    command = ["calibrate", str(made / "hf"), "--out", str(out), "--variant", "collaborative"]
    command += ["--keep", "0.25", "--data", str(data), *ROUND]
    measure = co_calibration.measure_sensitivities
    with monkeypatch.context() as patch:

        def kill(*args, **more):
            raise KeyboardInterrupt

        patch.setattr(co_calibration, "measure_sensitivities", kill)
        assert main(command) == 130
    assert [path.name for path in tmp_path.iterdir()] == ["quota.unfinished"]
    other = [part if part != "0.25" else "0.5" for part in command]
    assert main(other) == 2
    assert "begun with other settings (keep is 0.25, not 0.5)" in capsys.readouterr().err

    calls = []
    monkeypatch.setattr(
        co_calibration, "measure_sensitivities", lambda *a, **k: calls.append(a) or measure(*a, **k)
    )
    assert main(command) == 0
    assert "W4A8KV4" in capsys.readouterr().out
    assert len(calls) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["quota"]
    checkpoint = open_checkpoint(out)
    assert checkpoint.quantization.label == "W4A8KV4"
    assert checkpoint.provenance["variant"] == "collaborative"
    assert checkpoint.provenance["source"] == str(made / "hf")
    assert [stage.layer for stage in checkpoint.recipe.stages] == [1, 2]
    assert checkpoint.recipe.stages[-1].keep == 0.25
    assert checkpoint.recipe.stages[0].selector.weights.residual > 0

    ask = ["generate", str(out), "--prompt", "what is a car ?", "--image", str(made / "0.png")]
    assert main([*ask, "--show-tokens", str(tmp_path / "kept.png")]) == 0
    assert (tmp_path / "kept.png").exists()


def test_variants_that_change_no_weight_are_copies(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "pruned"
    options = ["--variant", "prune-only", "--keep", "0.5", "--layers", "1"]
    assert main(["calibrate", str(made / "full"), "--out", str(out), *options]) == 0
    checkpoint = open_checkpoint(out)
    assert checkpoint.quantization.is_none
    assert checkpoint.recipe.stages[-1].keep == 0.5
    assert open_checkpoint(made / "full").recipe.is_none
    checkpoint.verify_checksums()


REFUSALS = [
    ("full --keep 0.3", "--keep belongs to --variant"),
    ("full --variant quant-only --keep 0.3", "--keep is of no use to --variant quant-only"),
    ("full --variant prune-only --bits W4A4", "--bits is of no use to --variant prune-only"),
    ("full --variant full-precision --data DATA", "--data is of no use"),
    ("full --variant prune-then-quantize --tau 2 --data DATA", "--tau is of no use"),
    ("full --variant collaborative --rounds 2 --data DATA", "--rounds is of no use"),
    ("full --variant quant-only", "--method flatquant needs --data"),
    ("full --variant collaborative --method rtn", "--variant collaborative needs --data"),
    ("full --variant collaborative --method rtn --keep 1 --data DATA", "keep 1 prunes nothing"),
    ("hf --variant collaborative --method rtn --layers 9 --data DATA", "9"),
    ("full --variant prune-then-quantize --method rtn", "which looks at no data"),
    ("full --variant co-calibrated --method smoothquant --data DATA", "fed by quantized ones"),
    ("hf --variant quant-only --bits W16A16 --method rtn", "quantizes nothing"),
    ("full --variant collaboration", "--variant"),
]


@pytest.mark.parametrize(("line", "message"), REFUSALS)
def test_combinations_without_sense_are_refused(
    made: Path, tmp_path: Path, capsys, line: str, message: str
) -> None:
    source, *options = line.replace("DATA", str(made / "calib.json")).split()
    assert main(["calibrate", str(made / source), "--out", str(tmp_path / "x"), *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())
