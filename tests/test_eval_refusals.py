"""Damaged and wrong files of the benchmarks: each is refused by its file and row."""

from __future__ import annotations

import base64
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from quota_jax.errors import QuotaError
from quota_jax.evaluate.tasks import TASKS
from tests.official_files import (
    GQA,
    MME,
    POPE,
    POPE_2,
    SCIENCE,
    SEED,
    SPLITS,
    TABLE,
    TEXT,
    png,
    pope_line,
    read,
    table_rows,
    write_official_files,
    write_table,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_official_files(tmp_path_factory.mktemp("data"))


def _change(path: str, edit: Callable[[str], str]) -> Callable[[Path], None]:
    def apply(root: Path) -> None:
        file = root / path
        file.write_bytes(edit(file.read_text(encoding="utf-8")).encode())

    return apply


def _edit_json(path: str, edit: Callable) -> Callable[[Path], None]:
    def change(text: str) -> str:
        content = json.loads(text)
        edit(content)
        return json.dumps(content)

    return _change(path, change)


def _edit_table(place: int, **cells: str) -> Callable[[Path], None]:
    def apply(root: Path) -> None:
        rows = table_rows()
        rows[place] |= cells
        write_table(root / "mmbench/mmbench_dev_en.tsv", rows)

    return apply


def _link_outside(root: Path) -> None:
    target = root.parent / "outside.png"
    target.write_bytes(png((0, 0, 0)))
    (root / "gqa/images/n1.jpg").unlink()
    os.symlink(target, root / "gqa/images/n1.jpg")


REFUSED = {
    "pope": [
        (_change(POPE, lambda t: t.replace(POPE_2, "{")), r"popular.json: line 2: not valid JSON"),
        (
            _change(POPE, lambda t: t.replace(POPE_2, "[1]")),
            r"line 2: expected an object, got list",
        ),
        (
            _change(POPE, lambda t: t.replace(POPE_2, pope_line(2, "maybe"))),
            r"line 2: 'label' must be one of yes, no, got 'maybe'",
        ),
        (
            _change(POPE, lambda t: t.replace(POPE_2, pope_line(3))),
            r"line 3: the id 'popular/3' occurs twice, first in .*line 2",
        ),
        (_change(POPE, lambda t: t.replace('"text"', '"txt"')), r"line 1: 'text' is missing"),
        (
            _change(POPE, lambda t: t.replace("COCO_val2014_1.jpg", "COCO_5.jpg", 1)),
            r"line 2: no picture .*images/COCO_5.jpg or .*val2014/COCO_5.jpg",
        ),
        (_change(POPE, lambda t: "\n"), r"popular.json: holds no question"),
    ],
    "gqa": [
        (_edit_json(GQA, lambda c: c["202"].update(imageId="../../x")), r"'202': '../../x' is no"),
        (_edit_json(GQA, lambda c: c["202"].update(imageId="/etc/x")), r"'/etc/x' is no name"),
        (_link_outside, r"question '201': '.*n1.jpg' leads out of the folder"),
        (
            _change(GQA, lambda t: t.replace('"202"', '"201"')),
            r"questions.json: the key '201' occurs twice",
        ),
        (_change(GQA, lambda t: t[:50]), r"questions.json: not valid JSON"),
        (_change(GQA, lambda t: "{}"), r"holds no question"),
        (
            _edit_json(GQA, lambda c: c["201"]["types"].update(structural="poem")),
            r"'201': 'types': 'structural' must be one of verify, query",
        ),
        (lambda root: shutil.rmtree(root / "gqa"), r"gqa: no such folder"),
        (lambda root: (root / GQA).unlink(), r"gqa: neither testdev_balanced_q.* nor parquet"),
    ],
    "mme": [
        (_change(MME, lambda t: t.replace("No", "Perhaps")), r"0002.txt: line 2: 'answer' must be"),
        (
            _change(MME, lambda t: t.replace("\t", " ")),
            r"line 1: expected question, tab and answer",
        ),
        (_change(MME, lambda t: t.split("\n")[0]), r"0002.txt: expected 2 questions, .* got 1"),
        (lambda root: (root / "mme/colour").mkdir(), r"colour: no category of MME; known: exist"),
        (
            lambda root: (root / "mme/OCR/0002.jpg").unlink(),
            r"0002.txt: line 1: no picture .*OCR/0002.jpg \(nor .png, .jpeg\)",
        ),
    ],
    "mmbench": [
        (_edit_table(1, answer="D"), r"en.tsv: line 4: 'answer' must be one of A, B, C, got 'D'"),
        (_edit_table(0, B="nan"), r"line 2: expected two options or more, got 1"),
        (_edit_table(0, index="four"), r"line 2: 'index' must be a whole number, got 'four'"),
        (_edit_table(3, index="1000005", image="77"), r"line 8: no picture in row 77"),
        (_edit_table(0, index="4"), r"line 6: rotation 1000003 of no question 3"),
        (_edit_table(3, index="5"), r"line 8: the id '5' occurs twice, first in .*line 4"),
        (_edit_table(1, image="A" * 201), r"line 4: the picture is not whole base64"),
        (_edit_table(1, image=""), r"line 4: 'image' must be a text that is not empty"),
        (_change(TABLE, lambda t: t + "9\tlost\n"), r"line 12: 2 cells under 14 columns"),
        (_change(TABLE, lambda t: t + '9\t"open\n'), r"line 12: unexpected end of data"),
        (_change(TABLE, lambda t: ""), r"en.tsv: is empty"),
        (_change(TABLE, lambda t: t.split("\n")[0]), r"en.tsv: holds no question"),
    ],
    "seedbench": [
        (
            _edit_json(SEED, lambda c: c["questions"][1].update(answer="E")),
            r"questions\[1\]: 'answ",
        ),
        (
            _edit_json(SEED, lambda c: c["questions"][1].update(question_type_id=10)),
            r"questions\[1\]: 'question_type_id' of a picture must be 1 to 9, got 10",
        ),
        (_edit_json(SEED, lambda c: c["questions"][0].pop("data_type")), r"\[0\]: 'data_type' is"),
        (_edit_json(SEED, lambda c: c["questions"].append(c["questions"][1])), r"id '11' occurs"),
        (_edit_json(SEED, lambda c: c["questions"].pop(1)), r"holds no question"),
        (_edit_json(SEED, lambda c: c.pop("questions")), r"expected a list 'questions'"),
    ],
    "scienceqa": [
        (
            _edit_json(SCIENCE, lambda c: c["4"].update(answer=3)),
            r"'4': 'answer' is 3, but .* only 3",
        ),
        (_edit_json(SCIENCE, lambda c: c["4"].update(answer=-1)), r"'answer' must be a whole"),
        (_edit_json(SCIENCE, lambda c: c["6"].update(choices="in")), r"'6': 'choices' must be a"),
        (_edit_json(SCIENCE, lambda c: c["6"].pop("image")), r"'6': 'image' is missing"),
        (_edit_json(SPLITS, lambda c: c["test"].append("9")), r"test\[3\]: .* no problem '9'"),
        (
            _edit_json(SPLITS, lambda c: c["test"].append("4")),
            r"test\[3\]: the id '4' occurs twice",
        ),
    ],
    "textvqa": [
        (_edit_json(TEXT, lambda c: c["data"][0]["answers"].pop()), r"data\[0\]: expected 10 answ"),
        (_edit_json(TEXT, lambda c: c["data"][0].pop("question")), r"'question' is missing"),
        (lambda root: (root / "textvqa/train_images/i1.jpg").unlink(), r"i1.jpg \(nor .png\)"),
    ],
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_files_are_refused_by_file_and_row(folder, tmp_path, name):
    for place, (damage, message) in enumerate(REFUSED[name]):
        root = tmp_path / str(place)
        shutil.copytree(folder / name, root / name)
        damage(root)
        with pytest.raises(QuotaError, match=message) as caught:
            TASKS[name].read(root)
        assert "\n" not in str(caught.value)


def test_damaged_pictures_are_named(folder, tmp_path, monkeypatch):
    # lmms-eval switches this on for the whole process.
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)
    rows = table_rows()
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.png")
    rows[0]["image"] = base64.b64encode((tmp_path / "whole.png").read_bytes()[:900]).decode()
    rows[1]["image"] = base64.b64encode(b"no picture at all, but long enough for it" * 3).decode()
    write_table(tmp_path / "mmbench/x.tsv", rows)
    bench = read(tmp_path, "mmbench")
    with pytest.raises(QuotaError, match=r"x.tsv: line 2: the picture is damaged"):
        bench["3"].pictures[0].load()
    with pytest.raises(QuotaError, match=r"x.tsv: line 4: not a picture in a known format"):
        bench["5"].pictures[0].load()
    with pytest.raises(QuotaError, match="no prompts 'x'; known: lmms-eval, llava"):
        TASKS["gqa"].read(folder, prompts="x")
