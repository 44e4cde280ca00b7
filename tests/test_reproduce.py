"""Studies: rows are run once, shared, compared with their baseline, and written as tables."""

from __future__ import annotations

import dataclasses
import json
import time

import pytest

from converters import convert
from quota_jax.checkpoint import open_checkpoint
from quota_jax.cli import main
from quota_jax.errors import QuotaError
from quota_jax.evaluate.tasks import TASKS
from quota_jax.prune.presets import peer_recipe
from quota_jax.quant.calibration_data import Sample
from quota_jax.reproduce.paper import PAPER
from quota_jax.reproduce.report import write_table
from quota_jax.reproduce.rows import FULL, KEEP, variant_row
from quota_jax.reproduce.study import Busy, Derived, Row, Study
from quota_jax.reproduce.tables import Plan, Table, all_tables, make_table
from quota_jax.reproduce.weights import Weights
from quota_jax.reproduce.work import begin_study, open_study
from quota_jax.testbed.learning.models import SMALL_MODELS
from tests.tiny_models import draw_picture, write_tiny_llava
from tests.tiny_task import TinyTask, write_questions

ROUNDED = Weights(method="rtn", bits="W4A8KV4")


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Eight questions, with a picture each, to a tiny LLaVA of three layers."""
    root = tmp_path_factory.mktemp("study")
    convert(write_tiny_llava(root / "hf", num_layers=3, image_size=56), root / "source")
    before = dict(TASKS)
    TASKS["tiny"] = TinyTask()
    yield Study(
        source=root / "source",
        data=write_questions(root / "data", [1] * 8),
        pool=[Sample(text="what is a car ?", image=draw_picture(i)) for i in range(4)],
        num_samples=2,
        out=root / "out",
        tasks=("tiny",),
        batch_size=4,
        max_new_tokens=4,
        text_bucket=32,
    )
    TASKS.clear()
    TASKS.update(before)


@pytest.mark.slow
def test_a_study_runs_each_row_once_and_writes_its_table(study, tmp_path):
    config = open_checkpoint(study.source).config
    pruned = peer_recipe("random", config, keep=0.5)
    rows = (
        FULL,
        Row(label="half", recipe=pruned, facts=(("LLM FLOPs", "50 %"),)),
        Row(label="4 bits", weights=ROUNDED),
        Row(label="derived", weights=ROUNDED, recipe=Derived(keep=0.5)),
        Row(label="the same again", weights=ROUNDED),
        Row(label="gray", blind=True),
    )
    told: list[str] = []
    assert study.run(rows, told.append, only="weights")  # no run is begun
    assert not any(study.complete(row) for row in rows)
    assert study.run(rows, told.append, threads=2, only="runs")
    assert sum("questions in" in line for line in told) == 5
    assert sum("calibrated" in line for line in told) == 1
    assert study.run(rows, lambda line: pytest.fail(line))  # nothing is left to do

    derived = json.loads((study.folder(rows[3]) / "run.json").read_text())["recipe"]
    layers = [stage["layer"] for stage in derived["stages"]]
    assert layers == [1, 2]
    assert derived["stages"][-1]["keep"] == 0.5
    assert study.sensitivities(ROUNDED).values[0] > 0

    missing = Row(label="missing", weights=ROUNDED, recipe=Derived(keep=0.1))
    pairs = ((rows[3], rows[2]), (rows[1], missing))
    table = Table(name="x", title="Some rows", rows=(*rows, missing), pairs=pairs)
    provenance = {"command": "quota-jax reproduce x"}
    paper = PAPER["table3"].markdown()
    found, text, card = write_table(
        study, table, tmp_path / "tables", provenance=provenance, paper=paper
    )
    content = json.loads(found.read_text())
    assert content["command"] == provenance["command"]
    entries = {entry["label"]: entry for entry in content["rows"]}
    assert entries["full precision"]["retention"] is None
    assert entries["half"]["facts"] == {"LLM FLOPs": "50 %"}
    assert entries["4 bits"]["scores"] == entries["the same again"]["scores"]
    assert entries["4 bits"]["questions"] == {"tiny": 8}
    assert [(pair["label"], pair["baseline"]) for pair in content["pairs"]] == [
        ("derived", "4 bits")
    ]
    assert content["left out"] == ["1 of 7 rows not run: missing"]
    assert "## In pairs" in text.read_text()
    lines = text.read_text().splitlines()
    assert sum(line.startswith("| half | 50 % |") for line in lines) == 1
    assert "| collaborative | 57.47 | 1688.72 | 57.97 | 84.83 | 62.1 | 62.96 | 95.65 |" in lines
    assert json.loads(card.read_text())["rows"]["half"] == entries["half"]["scores"]


def test_what_another_process_makes_is_left_to_it(study):
    with study._alone("anything"), pytest.raises(Busy), study._alone("anything"):
        pass
    other = Weights(method="rtn", bits="W8A8")
    with study._alone(other.name), pytest.raises(Busy):
        study.checkpoint(other)


def test_a_row_that_becomes_ready_goes_before_later_ones(study, monkeypatch):
    order: list[str] = []

    def make(self, row, log, only):
        if row.label == "a" and not order:
            raise Busy(row.label)
        order.append(row.label)

    monkeypatch.setattr(Study, "_make_row", make)
    monkeypatch.setattr(Study, "_made", lambda self, row, only: row.label in order)
    rows = [Row(label=label) for label in "abc"]
    assert study._work(rows, print, None, None) == (True, [])
    assert order == ["b", "a", "c"]
    assert study._work([Row(label="d")], print, time.monotonic(), None) == (False, [])


def test_a_row_that_fails_is_told_after_the_others_are_run(study):
    bad = Row(label="bad", weights=Weights(method="rtn", bits="W5A4"))
    good = Row(label="8 bits", weights=Weights(method="rtn", bits="W8A8"))
    with pytest.raises(QuotaError, match="1 rows failed, first bad: QuotaError: weight_bits must"):
        study.run((bad, good), lambda line: None)
    assert study.complete(good)


@pytest.mark.parametrize("family", list(SMALL_MODELS))
def test_tables_have_rows_of_their_own(family):
    """Labels are unique, equal runs have equal recipes, and all rows end at what they say."""
    config = SMALL_MODELS[family]
    plan = Plan(config=config, seeds=(0, 1), visual_tokens=144)
    for table in all_tables(plan):
        labels = [row.label for row in table.rows]
        assert len(set(labels)) == len(labels), table.name
        whole = dataclasses.replace(FULL, measured=table.name == "table7")
        assert table.rows[0] == table.baseline == whole
        assert {row.measured for row in table.rows} == {whole.measured}
        if table.name == "peers":
            missing = {note.split()[0] for note in table.notes}
            assert ("visionzip" in missing) == (family == "qwen2_5_vl")
            # Qwen2.5-VL's peers keep positions anyway, and what merges tokens has to number anew.
            kept = {row.label.split(",")[0] for row in table.rows if ", positions" in row.label}
            renumber = {"pyramid_drop", "div_prune", "mmtok", "qapruner"}
            assert kept == (renumber if family == "llava" else set())
    other = "table6" if family == "llava" else "table4"
    with pytest.raises(QuotaError, match="belongs to the other model family"):
        make_table(other, plan)
    with pytest.raises(QuotaError, match="no table 'table9'"):
        make_table("table9", plan)
    joint = {row.label: row for row in make_table("table3", Plan(config=config)).rows}
    collaborative = joint["W4A4KV4 collaborative 30 %"]
    assert collaborative.recipe == Derived(keep=KEEP)
    assert joint["W4A4KV4 quant-only"].weights == collaborative.weights
    # Named variants are the rows of Table 3, so their runs are shared.
    for name in ("prune-only", "quantize-then-prune", "collaborative", "co-calibrated"):
        row = variant_row(name, config, "W4A4KV4", keep=0.1)
        assert row.run_name == joint[row.label].run_name
    deployed = joint["W4A4KV4 co-calibrated 10 %"].weights
    assert deployed is not None
    assert (deployed.variant, deployed.keep) == ("co-calibrated", 0.1)


def test_samples_of_a_seed_are_drawn_once(study):
    assert study.samples(0) == study.samples(0)
    assert {study.samples(seed)[0].image.tobytes() for seed in range(6)} != {
        study.samples(0)[0].image.tobytes()
    }
    with pytest.raises(QuotaError, match="5 calibration samples asked for, 4 are there"):
        Study(source=study.source, data=study.data, pool=study.pool, out=study.out, num_samples=5)


def test_a_folder_holds_one_study(study, tmp_path, capsys):
    samples = tmp_path / "samples.json"
    samples.write_text(json.dumps([{"text": "what is a car ?"}] * 128))
    settings = {"source": study.source, "data": study.data, "samples": samples, "limit": 4}
    begin_study(tmp_path / "s", settings)
    assert open_study(tmp_path / "s").limit == 4
    with pytest.raises(QuotaError, match="holds a study with limit 4, not 5"):
        begin_study(tmp_path / "s", settings | {"limit": 5})
    with pytest.raises(QuotaError, match="is no study"):
        open_study(tmp_path)
    command = ["reproduce", "table3", "--out", str(tmp_path / "t")]
    assert main([*command, "--source", str(study.source)]) == 2
    assert "--source, --data and --samples belong together" in capsys.readouterr().err
    given = ["--source", study.source, "--data", study.data, "--samples", samples]
    command = ["reproduce", "fig5", "--out", str(tmp_path / "u"), *map(str, given)]
    assert main(command) == 2
    assert "fig5 is a figure of qwen2_5_vl, not of llava" in capsys.readouterr().err


def test_the_papers_tables_are_whole():
    """Each row has a number, or a gap that the paper has too, for each column."""
    for name, table in PAPER.items():
        assert table.rows, name
        for label, values in table.rows.items():
            assert len(values) == len(table.columns), (name, label)
