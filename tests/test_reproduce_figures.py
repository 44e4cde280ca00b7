"""Figures of a study: kept tokens over pictures (Fig. 4), and accuracy against speed and memory."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from PIL import Image

from converters import convert
from quota_jax.cli import main
from quota_jax.errors import QuotaError
from quota_jax.evaluate.predictions import Prediction, write_predictions
from quota_jax.evaluate.tasks import TASKS
from quota_jax.quant.calibration_data import Sample
from quota_jax.quantization import QuantizationConfig
from quota_jax.reproduce.kept_figure import chosen_questions, draw_kept_tokens
from quota_jax.reproduce.pareto import PANELS, key_of, read_bench, write_pareto
from quota_jax.reproduce.rows import FULL, variant_row
from quota_jax.reproduce.study import Row, Study
from quota_jax.reproduce.tables import Plan, Table, make_table
from quota_jax.reproduce.weights import Weights
from quota_jax.testbed.learning.models import SMALL_MODELS
from tests.tiny_models import write_tiny_llava
from tests.tiny_task import TinyTask, write_questions


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Forty questions to a tiny LLaVA, about four pictures in turn, some with two pictures."""
    root = tmp_path_factory.mktemp("figures")
    convert(write_tiny_llava(root / "hf", num_layers=3, image_size=56), root / "source")
    before = dict(TASKS)
    TASKS["tiny"] = TinyTask()
    yield Study(
        source=root / "source",
        data=write_questions(root / "data", [1, 2] * 20),
        pool=[Sample(text="what is a car ?")],
        num_samples=1,
        out=root / "out",
        tasks=("tiny",),
    )
    TASKS.clear()
    TASKS.update(before)


@pytest.mark.slow
def test_kept_tokens_of_several_questions(study, tmp_path) -> None:
    """Each question has a row for each of its pictures; counts are those of the recipe."""
    row = variant_row("prune-only", study.reference.config, "", keep=0.5)
    picture, found = draw_kept_tokens(
        study, row, tmp_path, "fig4", count=3, provenance={"command": "quota-jax reproduce"}
    )
    content = json.loads(found.read_text())
    assert content["stages"] == ["layer 1", "layer 2"]
    tokens = study.reference.config.tokens_per_image
    assert [each["visual_tokens"] for each in content["questions"]] == [tokens, 2 * tokens, tokens]
    for each in content["questions"]:
        count = each["visual_tokens"]
        assert each["kept"] == [-(-3 * count // 4), -(-count // 2)]
    with Image.open(picture) as drawn:
        assert drawn.size[0] > 900
        assert drawn.size[1] > 900
    with pytest.raises(QuotaError, match="keeps every token"):
        draw_kept_tokens(study, FULL, tmp_path, "x", count=1, provenance={})
    with pytest.raises(QuotaError, match="at least one picture"):
        draw_kept_tokens(study, row, tmp_path, "x", count=0, provenance={})


def test_questions_are_about_different_pictures(study) -> None:
    chosen = [each for _, each in chosen_questions(study, 100)]
    names = [tuple(picture.name for picture in each.pictures) for each in chosen]
    assert len(set(names)) == len(names) == 4
    assert [each.key for _, each in chosen_questions(study, 2)] == ["q00", "q01"]


# precision, keep, share of right answers, (first token in s, decode step in s, bytes)
POINTS = [
    ("bf16", 1.0, 1.0, (0.040, 0.010, 14_000_000_000)),
    ("bf16", 0.3, 0.9, (0.030, 0.009, 13_900_000_000)),
    ("W4A8KV4", 1.0, 0.95, (0.025, 0.004, 4_000_000_000)),
    ("W4A8KV4", 0.3, 0.85, (0.020, 0.0038, 3_900_000_000)),
    ("W4A4KV4", 1.0, 0.8, (0.022, 0.004, 4_000_000_000)),
    ("W4A4KV4", 0.3, 0.7, (0.018, 0.0037, 3_900_000_000)),
]


def bench_file(path: Path, **changes) -> Path:
    results = [
        {
            "label": label,
            "keep": keep,
            "batch_size": batch,
            "first_token": batch * first,
            "decode_step": step,
            "weight_bytes": held - 1000,
            "cache_bytes": 1000,
        }
        for batch in (1, 8)
        for label, keep, _, (first, step, held) in POINTS
    ]
    extra = dict(results[0], label="W8A8KV8")
    content = {"preset": "llava_1_5_7b", "method": "rtn", "device": "a device", "jax": "0"}
    path.write_text(json.dumps(content | {"results": [*results, extra]} | changes))
    return path


def answer(study: Study, row: Row, share: float) -> None:
    """A finished run in which this share of the answers is right."""
    questions = study.questions["tiny"]
    folder = study.folder(row)
    folder.mkdir(parents=True)
    right = round(share * len(questions))
    write_predictions(
        folder / "predictions.jsonl",
        [
            Prediction(
                task="tiny",
                key=each.key,
                prompt="0",
                answer="a" * (2 + (each.truth["parity"] + (place >= right)) % 2),
                tokens=1,
            )
            for place, each in enumerate(questions)
        ],
    )


def test_accuracy_against_speed(study, tmp_path) -> None:
    config = study.reference.config
    plan = Plan(config=config, seeds=(0, 1))
    table = make_table("pareto", plan)
    keys = {key_of(row) for row in table.rows}
    assert keys == {(bits, keep) for bits, keep, *_ in POINTS} | {
        (bits, 0.1) for bits in ("bf16", "W4A8KV4", "W4A4KV4")
    }
    for row in table.rows:
        share = {(bits, keep): s for bits, keep, s, _ in POINTS}.get(key_of(row), 0.5)
        second = row.weights is not None and row.weights.seed == 1
        answer(study, row, share - 0.05 * second)
    bench = read_bench(bench_file(tmp_path / "bench.json"), config)
    found, text, picture = write_pareto(
        study, table, bench, tmp_path / "tables", provenance={"command": "quota-jax reproduce"}
    )
    content = json.loads(found.read_text())
    assert len(content["points"]) == 2 * len(POINTS)
    first = {(p["precision"], p["kept"]): p for p in content["points"] if p["batch_size"] == 1}
    assert first["bf16", "100 %"]["retention"] == [100, 100, 100]
    low = first["W4A8KV4", "30 %"]
    mean, least, most = low["retention"]
    assert mean == pytest.approx(100 * (0.85 + 0.8) / 2)
    assert least < 80 < 85 < most
    costs = dict(zip((f"{p.title}, {p.unit}" for p in PANELS), (20, 1 / 0.0038, 3.9), strict=True))
    assert low["costs"] == pytest.approx(costs)
    # Both are later, and worse, than W4A8: with all tokens, and with 30 % of them.
    fronts = {key: point["on_front"]["Time to first token, ms"] for key, point in first.items()}
    assert [key for key, on in fronts.items() if not on] == [
        ("bf16", "30 %"),
        ("W4A4KV4", "100 %"),
    ]
    assert set(content["left out"]) == {
        *(f"{bits} 10 %: not in the bench file" for bits in ("bf16", "W4A8KV4", "W4A4KV4")),
        "W8A8KV8 100 %: no accuracy",
    }
    lines = text.read_text()
    assert "| 1 | bf16 | 100 % | 100.0 [100.0, 100.0] | **40** | **100** | **14** |" in lines
    assert (
        "- speed and memory of: llava_1_5_7b with random weights, quantized as rtn does, on a "
        "device, jax 0" in lines
    )
    assert "- accuracy of: hf (llava" in lines
    with Image.open(picture) as drawn:
        assert drawn.size[0] > drawn.size[1] > 600


def test_bench_files_that_do_not_fit_are_refused(study, tmp_path) -> None:
    config = study.reference.config
    file = tmp_path / "bench.json"
    for changes, message in (
        ({"results": [{"label": "bf16"}]}, "not written by quota-jax bench --json"),
        ({"preset": "llava_2"}, "no preset 'llava_2'"),
        ({"preset": "qwen2_5_vl_7b"}, "is of qwen2_5_vl_7b, a qwen2_5_vl: the study is of llava"),
    ):
        with pytest.raises(QuotaError, match=message):
            read_bench(bench_file(file, **changes), config)
    other = [{"label": "W8A8KV8", "keep": 1, "batch_size": 1, "first_token": 1, "decode_step": 1}]
    other[0] |= {"weight_bytes": 1, "cache_bytes": 1}
    bench = read_bench(bench_file(file, results=other), config)
    table = Table(name="pareto", title="x", rows=(FULL,))
    answered = dataclasses.replace(study, out=tmp_path / "study")
    answer(answered, FULL, 1.0)
    with pytest.raises(QuotaError, match="the bench file has none of bf16 100 %"):
        write_pareto(answered, table, bench, tmp_path / "t", provenance={})


@pytest.mark.slow
def test_the_command_writes_table7_the_figure_and_pareto(
    study, tmp_path, monkeypatch, capsys
) -> None:
    """Measured rows come last, and each kind of table has its own writer."""
    from quota_jax.reproduce import tables, work

    own = dataclasses.replace(study, out=tmp_path / "s", limit=4, max_new_tokens=4, text_bucket=32)
    rows = (FULL, Row(label="4 bits", weights=Weights(method="rtn", bits="W4A8KV4")))
    measured = tuple(dataclasses.replace(row, measured=True) for row in rows)
    monkeypatch.setattr(work, "begin_study", lambda out, settings: own)
    made = {
        "table7": Table(name="table7", title="Seven", rows=measured, baseline=measured[0]),
        "pareto": Table(name="pareto", title="Front", rows=rows),
    }
    for name, table in made.items():
        monkeypatch.setitem(tables.TABLES, name, lambda plan, table=table: table)
    given = ("--source", str(study.source), "--data", str(study.data), "--samples", "x.json")
    bench = bench_file(tmp_path / "bench.json")
    what = ("table7", "fig4", "pareto")
    command = ["reproduce", *what, "--out", str(own.out), "--bench", str(bench), *given]
    assert main([*command, "--variant", "prune-only", "--keep", "0.5", "--pictures", "1"]) == 0
    wrote = [line for line in capsys.readouterr().out.splitlines() if line.startswith("wrote")]
    files = [Path(line.removeprefix("wrote ")) for line in wrote]
    assert [file.name for file in files] == [
        *("pareto.json", "pareto.md", "pareto.png", "table7.json", "table7.md"),
        *("fig4_prune-only_0.5_1.png", "fig4_prune-only_0.5_1.json"),
    ]
    assert all(file.exists() for file in files)
    assert "not measured" in files[4].read_text()
    told = json.loads(files[0].read_text())["command"]
    assert told.endswith(
        "reproduce pareto --out OUT --source CHECKPOINT --data DATA --samples SAMPLES --bench BENCH"
    )
    told = json.loads(files[6].read_text())["command"]
    assert told.endswith("--variant prune-only --keep 0.5 --pictures 1")


def test_refusals_of_the_command(tmp_path, capsys) -> None:
    assert main(["reproduce", "pareto", "--out", str(tmp_path / "x")]) == 2
    assert "pareto needs --bench" in capsys.readouterr().err
    assert main(["reproduce", "--out", str(tmp_path / "x")]) == 2
    assert "name a table or figure" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_named_variants_are_rows() -> None:
    config = SMALL_MODELS["llava"]
    assert variant_row("full-precision", config, "W4A4KV4") == FULL
    with pytest.raises(QuotaError, match="no variant 'quota'"):
        variant_row("quota", config, "W4A4KV4")
    joint = variant_row("co-calibrated", config, "W4A4KV4", keep=0.1, seed=2)
    assert isinstance(joint.weights, Weights)
    assert (joint.weights.variant, joint.weights.keep, joint.weights.seed) == (
        *("co-calibrated", 0.1, 2),
    )
    assert joint.recipe is None
    assert joint.weights.quantization == QuantizationConfig.parse("W4A4KV4", method="flatquant")
