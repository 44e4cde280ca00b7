"""Tables that go on from one of another day, and the credits that rows are compared by."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quota_jax.cli import main
from quota_jax.cli.reproduce import Reproduce
from quota_jax.errors import QuotaError
from quota_jax.evaluate.predictions import Prediction, write_predictions
from quota_jax.evaluate.summary import summarize
from quota_jax.evaluate.task import Instance, Scores
from quota_jax.evaluate.tasks import TASKS
from quota_jax.quant.calibration_data import Sample
from quota_jax.reproduce.credits import decode_credits, encode_credits
from quota_jax.reproduce.earlier import read_earlier, rows_to_run, told_in
from quota_jax.reproduce.report import write_table
from quota_jax.reproduce.rows import FULL
from quota_jax.reproduce.study import Row, Study
from quota_jax.reproduce.tables import Plan, Table
from quota_jax.reproduce.weights import Weights
from quota_jax.testbed.learning.models import SMALL_MODELS
from tests.tiny_task import TinyTask, write_questions

A, B, C, D = (
    Row(label=name, weights=Weights(method="rtn", bits=bits))
    for name, bits in zip("abcd", ("W4A8", "W4A4", "W8A8", "W4A16"), strict=True)
)
TABLE = Table(name="x", title="Some rows", rows=(FULL, A, B, C, D), pairs=((B, A), (C, B)))
TOLD = {"command": "quota-jax reproduce x", "device": "first"}


@pytest.fixture
def days(tmp_path, monkeypatch):
    """Studies of the same hundred questions, by name, each with run folders of its own."""
    monkeypatch.setitem(TASKS, "tiny", TinyTask())
    data = write_questions(tmp_path / "data", [1] * 100)

    def day(name: str, **changes) -> Study:
        fields: dict[str, Any] = {
            "source": tmp_path / "source",
            "data": data,
            "pool": [Sample(text="what is a car ?")],
            "num_samples": 1,
            "out": tmp_path / name,
            "tasks": ("tiny",),
        }
        return Study(**{**fields, **changes})

    return day


def answer(study: Study, wrong: Mapping[Row, range]) -> Study:
    """Runs whose answers are right but to these questions."""
    for row, places in wrong.items():
        study.folder(row).mkdir(parents=True)
        write_predictions(
            study.folder(row) / "predictions.jsonl",
            [
                Prediction(
                    task="tiny",
                    key=each.key,
                    prompt="0",
                    answer="a" * (2 + (each.truth["parity"] + (place in places)) % 2),
                    tokens=1,
                )
                for place, each in enumerate(study.questions["tiny"])
            ],
        )
    return study


def write(study: Study, folder: Path, earlier: Path | None = None, **told) -> dict:
    file = write_table(study, TABLE, folder, provenance={**TOLD, **told}, earlier=earlier)[0]
    return json.loads(file.read_text())


def without_credits(file: Path) -> Path:
    """A file as it was written before there were credits."""
    content = json.loads(file.read_text())
    del content["questions digest"]
    for row in content["rows"]:
        del row["credits"]
    file.write_text(json.dumps(content))
    return file


def by_label(content: dict) -> dict[str, dict]:
    return {row["label"]: row for row in content["rows"]}


FIRST = {FULL: range(4), A: range(2, 20), B: range(40)}


def test_credits_bring_back_every_interval(days, tmp_path) -> None:
    """What two days write together is what one study of all runs writes, marks aside."""
    runs = {**FIRST, C: range(30, 60)}
    whole = write(answer(days("whole"), runs), tmp_path / "whole")
    write(answer(days("one"), FIRST), tmp_path / "t")
    second = answer(days("two"), {FULL: range(4), C: range(30, 60)})
    both = write(second, tmp_path / "t", tmp_path / "t" / "x.json")
    assert [row["label"] for row in both["rows"]] == ["full precision", "a", "b", "c"]
    assert [row["label"] for row in both["rows"] if row.pop("earlier", False)] == ["a", "b"]
    assert [pair.pop("earlier", False) for pair in both["pairs"]] == [True, True]
    assert (both.pop("notes"), both.pop("earlier")) == ([], [])
    assert both == whole
    assert both["left out"] == ["1 of 5 rows not run: d"]
    text = (tmp_path / "t" / "x.md").read_text()
    assert "| a * | 82.0 |" in text
    assert "| c | 70.0 |" in text
    assert "| b * | a |" in text
    assert "Rows with * were measured earlier." in text
    assert "Measured earlier: a, b" in json.loads((tmp_path / "t/x.card.json").read_text())["text"]


def test_rows_without_credits_keep_the_retention_of_their_day(days, tmp_path) -> None:
    first = write(answer(days("one"), FIRST), tmp_path / "t")
    file = without_credits(tmp_path / "t" / "x.json")
    # Another device answers one question less, and b is run again.
    second = answer(days("two"), {FULL: range(5), B: range(30), C: range(30, 60)})
    both = write(second, tmp_path / "t", file, device="second", later="b and c: another day")
    was, now = by_label(first), by_label(both)
    assert now["a"]["retention"] == was["a"]["retention"]
    assert now["a"]["baseline scores"] == {"tiny": 96.0}
    assert "credits" not in now["a"]
    assert now["b"]["scores"] == {"tiny": 70.0}
    assert now["b"]["retention"]["value"] == pytest.approx(70 / 95)
    assert [name for name, row in now.items() if "earlier" in row] == ["a"]
    # b is of today, and of a nothing is known that it could be compared with.
    assert [(pair["label"], pair["baseline"]) for pair in both["pairs"]] == [("c", "b")]
    assert "1 pairs, of rows without credits: b against a" in both["left out"]
    assert both["notes"] == [
        "scores of full precision, in brackets an earlier measurement's: tiny 95.00 (96.00); "
        "retention of 1 rows with * is against the earlier ones"
    ]
    assert (both["device"], both["later"]) == ("second", "b and c: another day")
    assert both["earlier"] == [{"device": "first"}]
    text = (tmp_path / "t" / "x.md").read_text()
    assert "- of earlier rows, device: first" in text
    assert f"- {both['notes'][0]}" in text
    # Once more, from what is there now, changes nothing.
    again = write(second, tmp_path / "t", file, device="second", later="b and c: another day")
    assert again == both
    # A third day knows what each row was compared with.
    third = answer(days("three"), {FULL: range(4), D: range(7)})
    last = write(third, tmp_path / "t", file, device="third")
    rows = by_label(last)
    assert list(rows) == ["full precision", "a", "b", "c", "d"]
    assert "baseline scores" not in rows["a"]
    assert rows["b"]["retention"]["value"] == pytest.approx(70 / 96)
    assert last["notes"] == [
        "scores of full precision, in brackets an earlier measurement's: tiny 96.00 (95.00)"
    ]
    later = "b and c: another day"
    assert last["earlier"] == [{"device": "second", "later": later}, {"device": "first"}]
    assert told_in(last) == {**TOLD, "device": "third"}


def test_pairs_of_kept_rows_are_kept(days, tmp_path) -> None:
    first = write(answer(days("one"), FIRST), tmp_path / "t")
    file = without_credits(tmp_path / "t" / "x.json")
    second = answer(days("two"), {FULL: range(4), C: range(30, 60)})
    both = write(second, tmp_path / "t", file)
    assert both["pairs"] == [{**first["pairs"][0], "earlier": True}]
    assert "1 pairs, of rows without credits: c against b" in both["left out"]


def test_rows_are_known_by_their_run(days, tmp_path) -> None:
    """A table of more seeds says so in its labels; what is run again is what is not there."""
    study = answer(days("one"), FIRST)
    write(study, tmp_path)
    renamed = dataclasses.replace(B, label="b (seed 0)")
    table = dataclasses.replace(TABLE, rows=(FULL, A, C, renamed), pairs=())
    earlier = read_earlier(tmp_path / "x.json", study, table)
    assert rows_to_run(table, earlier) == [FULL, C]
    assert rows_to_run(table, None) == list(table.rows)
    second = answer(days("two"), {FULL: range(4)})
    found = write_table(second, table, tmp_path, provenance=TOLD, earlier=tmp_path / "x.json")
    content = json.loads(found[0].read_text())
    assert [row["label"] for row in content["rows"]] == ["full precision", "a", "b (seed 0)"]


def test_tables_that_do_not_fit_are_refused(days, tmp_path) -> None:
    one = answer(days("one"), FIRST)
    write(one, tmp_path)
    file = tmp_path / "x.json"
    content = file.read_text()

    def refused(match: str, study: Study = one, table: Table = TABLE, provenance=None) -> None:
        before = file.read_bytes()
        with pytest.raises(QuotaError, match=match) as raised:
            write_table(study, table, tmp_path, provenance=provenance or TOLD, earlier=file)
        assert "\n" not in str(raised.value)
        assert file.read_bytes() == before

    fewer = answer(days("fewer", limit=50), {FULL: range(4)})
    refused("'full precision' answers 100 questions of tiny, this study 50", fewer)
    worse = answer(days("worse"), {FULL: range(6)})
    refused("'full precision' had 96.00 in tiny and has 94.00 now, more than 2 % apart", worse)
    other = days("other", data=write_questions(tmp_path / "more", [2] * 100))
    (tmp_path / "more/tiny/tiny.jsonl").write_text(
        (tmp_path / "data/tiny/tiny.jsonl").read_text().replace("a red", "a blue")
    )
    refused("other questions of tiny", answer(other, {FULL: range(4)}))
    rest = dataclasses.replace(TABLE, rows=(FULL, A, D), pairs=())
    refused("1 rows are none of this table, first 'b'; are seeds", table=rest)
    refused("is table 'x', not 'y'", table=dataclasses.replace(TABLE, name="y"))
    refused("provenance cannot hold 'rows'", provenance={"rows": 1})
    refused("no row was run, or not 'full precision'", days("none"))

    changed = json.loads(content)
    changed["rows"] = changed["rows"][1:]
    file.write_text(json.dumps(changed))
    refused("lacks 'full precision', which all rows are compared with")
    file.write_text(content.replace('"run"', '"ran"'))
    refused("no table of a study: KeyError")
    file.write_text(content[:1000])
    refused("not valid JSON")
    file.write_text(content.replace('"tiny": "0.0,1.0 ', '"tiny": "0.0,1.0 f'))
    refused(
        "'a': the credits of tiny are not those of 100 units", answer(days("z"), {FULL: range(4)})
    )


def test_a_kill_leaves_the_old_file_or_the_new_one(days, tmp_path, monkeypatch) -> None:
    first = write(answer(days("one"), FIRST), tmp_path)
    file = tmp_path / "x.json"
    second = answer(days("two"), {FULL: range(4), C: range(30, 60)})
    replace = os.replace

    def killed(source, target) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write(second, tmp_path, file)
    assert json.loads(file.read_text()) == first
    monkeypatch.setattr(os, "replace", replace)
    assert "c" in by_label(write(second, tmp_path, file))


def questions(name: str, truths: list[dict]) -> list[Instance]:
    return [
        Instance(key=f"{name}{place}", prompt="?", pictures=(), truth=truth)
        for place, truth in enumerate(truths)
    ]


def test_credits_of_every_kind_of_units_are_exact_and_small() -> None:
    rng = np.random.default_rng(0)
    yes_no = [("Yes", "No")[n] for n in rng.integers(0, 2, 250)]
    words = [["red"] * n + ["blue"] * (10 - n) for n in rng.integers(0, 5, 250)]
    options = {"A": "one", "B": "two", "C": "three", "D": "four"}
    asked = {
        "gqa": questions("gqa", [{"answer": each.lower()} for each in yes_no]),
        "mme": questions(
            "mme",
            [
                {"answer": each.lower(), "category": ("count", "color")[n % 2], "image": str(n)}
                for n, each in ((place // 2, each) for place, each in enumerate(yes_no))
            ],
        ),
        "mmbench": questions(
            "mmbench",
            [
                {"index": n // 4 + 1_000_000 * (n % 4), "answer": "ABCD"[n % 4], "options": options}
                for n in range(248)
            ],
        ),
        "textvqa": questions("textvqa", [{"answers": each} for each in words]),
    }
    guesses = {
        "gqa": ["yes", "no"],
        "mme": ["yes", "no"],
        "mmbench": ["A", "B", "C", "D"],
        "textvqa": ["red", "blue", "green"],
    }

    def run() -> dict[str, Scores]:
        found = {}
        for name, part in asked.items():
            truth = [each.truth.get("answer", "red") for each in part]
            guess = rng.choice(guesses[name], len(part))
            known = rng.random(len(part)) < 0.8
            found[name] = TASKS[name].score(part, list(np.where(known, truth, guess)))
        return found

    counts = {name: len(part) for name, part in asked.items()}
    base, *rows = (run() for _ in range(3))
    assert len({value for value in rows[0]["textvqa"].units.values()}) > 3
    stored = [json.loads(json.dumps(encode_credits(row))) for row in rows]
    assert all(len(json.dumps(each, indent=1)) < 800 for each in stored)
    back = [
        decode_credits(each, {n: s.metrics[s.headline] for n, s in row.items()}, base, "file")
        for each, row in zip(stored, rows, strict=True)
    ]
    for other in (base, rows[1]):
        exact = summarize("row", rows[0], counts, other, "other")
        for against in (other, back[1] if other is rows[1] else base):
            found = summarize("row", back[0], counts, against, "other")
            assert (found.retention, found.corrected) == (exact.retention, exact.corrected)
            for name, task in exact.tasks.items():
                assert found.tasks[name].score == task.score
                assert found.tasks[name].comparison == task.comparison
    damaged: tuple[Any, ...] = ("0.0,100.0", "0.0 1", "0.0,x 1", "0.0,100.0 -1", 3)
    for bad in damaged:
        with pytest.raises(QuotaError, match="file: the credits of gqa are not those of 250 units"):
            decode_credits({**stored[0], "gqa": bad}, {}, base, "file")


def test_the_command_runs_what_the_earlier_table_lacks(days, tmp_path, monkeypatch, capsys) -> None:
    before = answer(days("before"), {FULL: range(4), A: range(9)})
    table = dataclasses.replace(TABLE, rows=(FULL, A, B), pairs=())
    write(before, tmp_path / "old")
    study, plan = days("now"), Plan(config=SMALL_MODELS["llava"])
    monkeypatch.setattr("quota_jax.reproduce.work.begin_study", lambda out, settings: study)
    monkeypatch.setattr("quota_jax.reproduce.work.plan_of", lambda study, seeds: plan)
    monkeypatch.setattr("quota_jax.reproduce.tables.make_table", lambda name, plan: table)
    monkeypatch.setattr(Reproduce, "_provenance", lambda self, *given: TOLD)
    monkeypatch.setattr(Study, "run", lambda self, rows: answer(self, {r: range(7) for r in rows}))
    command = ["reproduce", "x", "--out", str(study.out)]
    command += [f for name in ("source", "data", "samples") for f in (f"--{name}", name)]
    assert main([*command, "--extend", str(tmp_path / "none")]) == 2
    assert "none/x.json: cannot be read" in capsys.readouterr().err
    assert main([*command, "--extend", str(tmp_path / "old")]) == 2
    assert "had 96.00 in tiny and has 93.00 now" in capsys.readouterr().err
    assert not study.complete(A)
    monkeypatch.setattr("quota_jax.reproduce.earlier.TOLERANCE", 0.05)
    monkeypatch.setattr(Study, "run", lambda self, rows: None)
    assert main([*command, "--extend", str(tmp_path / "old")]) == 0
    rows = json.loads((study.out / "tables/x.json").read_text())["rows"]
    assert [(row["label"], "earlier" in row) for row in rows] == [
        ("full precision", False),
        ("a", True),
        ("b", False),
    ]
    whole = dataclasses.replace(table, name="pareto")
    monkeypatch.setattr("quota_jax.reproduce.tables.make_table", lambda name, plan: whole)
    assert main([*command, "--extend", str(tmp_path / "old")]) == 2
    assert "pareto is made whole" in capsys.readouterr().err
