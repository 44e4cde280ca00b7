"""Readers of the benchmarks' official files: prompts, keys, limits, and what is refused."""

from __future__ import annotations

import base64
import csv
import importlib
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from quota_jax.errors import QuotaError
from quota_jax.evaluate.task import Instance
from quota_jax.evaluate.tasks import TASKS

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
COLUMNS = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image"]
COLUMNS += ["source", "l2-category", "comment", "split"]


def _png(color: tuple[int, int, int], mode: str = "RGB") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (5, 4), color).convert(mode).save(out, "PNG")
    return out.getvalue()


def _put(path: Path, content: bytes | str | dict | list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, dict | list):
        content = json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def _pope_line(number: int, label: str = "yes") -> str:
    image = f"COCO_val2014_{number // 2}.jpg"
    text = f"Is there a dog in picture {number}?"
    return json.dumps({"question_id": number, "image": image, "text": text, "label": label})


def _table_rows() -> list[dict[str, str]]:
    """Two questions: one in two rotations, one in three; hints, quotes, line breaks, nan."""
    pictures = {
        key: base64.b64encode(_png((key, 0, 0)) + bytes(200_000)).decode() for key in (3, 5)
    }
    common = {"category": "c", "source": "s", "l2-category": "l", "comment": "nan", "split": "dev"}
    rows = []
    for index, options in (
        (3, ["one\ttab", "two"]),
        (5, ["x", 'a "quoted" word', "z"]),
        (1_000_003, ["two", "one\ttab"]),
        (1_000_005, ['a "quoted" word', "z", "x"]),
        (2_000_005, ["z", "x", 'a "quoted" word']),
    ):
        short = index % 1_000_000
        row = dict.fromkeys(COLUMNS, "nan") | common
        row |= {"index": str(index), "question": f"Which\none, {short}?", "answer": "B"}
        row |= {"hint": "Look." if short == 5 else ("nan" if index == 3 else "")}
        row |= dict(zip("ABCD", options, strict=False))
        # A rotation may refer to the row that has the picture.
        row["image"] = "5" if index == 2_000_005 else pictures[short]
        rows.append(row)
    return rows


def _write_table(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All seven tasks in their official files."""
    root = tmp_path_factory.mktemp("data")
    for split in ("random", "popular", "adversarial"):
        lines = [_pope_line(number) for number in (1, 2, 3)]
        _put(root / f"pope/coco_pope_{split}.json", "\n".join(lines) + "\n\n")
    for number in range(2):
        _put(root / f"pope/val2014/COCO_val2014_{number}.jpg", _png((number, 1, 1)))

    question = {"question": "What is it?", "answer": "cat", "imageId": "n1"}
    types = {"structural": "query", "semantic": "obj", "detailed": "objThis"}
    questions = {"201": {**question, "types": types}, "202": {**question, "imageId": "n2"}}
    _put(root / "gqa/testdev_balanced_questions.json", questions)
    _put(root / "gqa/images/n1.jpg", _png((1, 2, 3)))
    _put(root / "gqa/images/n2.png", _png((1, 2, 4), "LA"))

    ask = "Is it {}? {}Please answer yes or no.\t{}"
    for image in ("0001", "0002"):
        lines = [ask.format("red", "", "Yes"), ask.format("blue", " ", "No")]
        _put(root / f"mme/color/questions_answers_YN/{image}.txt", "\r\n".join(lines) + "\r\n")
        _put(root / f"mme/color/images/{image}.png", _png((9, 0, 0)))
        _put(root / f"mme/OCR/{image}.txt", "\n".join(lines))
        _put(root / f"mme/OCR/{image}.jpg", _png((9, 0, 1)))

    _write_table(root / "mmbench/mmbench_dev_en.tsv", _table_rows())

    seed = {f"choice_{letter}": f"{letter}!" for letter in "abcd"} | {"choice_d": 4}
    seed |= {"question": "How many?", "answer": "D", "question_type_id": 5}
    rows = [
        {**seed, "question_id": "v", "data_id": "x.mp4", "data_type": "video"},
        {**seed, "question_id": "11", "data_id": "p_1", "data_type": "image"},
    ]
    _put(root / "seedbench/SEED-Bench.json", {"questions": rows, "question_type": {}})
    _put(root / "seedbench/SEED-Bench-image/p_1", _png((0, 7, 0)))

    problem = {"question": "Which?  Say.", "choices": ["in", "on", "at"], "answer": 2, "hint": ""}
    problem |= {"image": "image.png", "subject": "language science", "grade": "grade2"}
    problems = {
        "4": problem,
        "5": {**problem, "image": None},
        "6": {**problem, "hint": "It is  far."},
        "7": problem,
    }
    _put(root / "scienceqa/problems.json", problems)
    _put(root / "scienceqa/pid_splits.json", {"train": ["7"], "test": ["6", "5", "4"]})
    for key in ("4", "6"):
        _put(root / f"scienceqa/images/test/{key}/image.png", _png((0, 0, int(key))))

    row = {"question": "what is IBM?", "image_id": "i1", "question_id": 34, "answers": ["a"] * 10}
    _put(root / "textvqa/TextVQA_0.5.1_val.json", {"data": [row]})
    words = {"data": [{"image_id": "i1", "ocr_tokens": ["I", "BM"]}]}
    _put(root / "textvqa/TextVQA_Rosetta_OCR_v0.2_val.json", words)
    _put(root / "textvqa/train_images/i1.jpg", _png((3, 3, 3)))
    return root


def _read(folder: Path, name: str, **options) -> dict[str, Instance]:
    return {each.key: each for each in TASKS[name].read(folder, **options)}


def test_questions_as_lmms_eval_asks_them(folder):
    pope = _read(folder, "pope")
    assert list(pope) == [
        f"{s}/{n}" for s in ("random", "popular", "adversarial") for n in (1, 2, 3)
    ]
    assert pope["random/2"].prompt == f"Is there a dog in picture 2?{SHORT}"
    assert pope["popular/1"].truth == {"answer": "yes", "split": "popular"}
    # Two questions about one picture share it.
    assert len({pope["random/2"].pictures, pope["popular/3"].pictures}) == 1

    gqa = _read(folder, "gqa")
    assert gqa["201"].prompt == f"What is it?{SHORT}"
    assert gqa["201"].truth == {"answer": "cat", "structural": "query", "semantic": "obj"}
    assert gqa["202"].pictures[0].name == str(folder / "gqa/images/n2.png")

    mme = _read(folder, "mme")
    assert next(iter(mme)) == "color/0001/0"
    assert len(mme) == 8
    # A second blank before the request stays.
    assert mme["color/0001/0"].prompt == f"Is it red?{SHORT}"
    assert mme["OCR/0002/1"].prompt == f"Is it blue? {SHORT}"
    assert mme["OCR/0002/1"].truth == {"answer": "no", "category": "OCR", "image": "0002"}

    bench = _read(folder, "mmbench")
    assert list(bench) == ["3", "1000003", "5", "1000005", "2000005"]
    assert bench["3"].prompt == (
        f"Which\none, 3? There are several options:\nA. one\ttab\nB. two\n\n{LETTER}"
    )
    start = "Look. Which\none, 5? There are several options:\nA. x\n"
    assert bench["5"].prompt == f'{start}B. a "quoted" word\nC. z\n\n{LETTER}'
    assert bench["5"].truth["options"] == {"A": "x", "B": 'a "quoted" word', "C": "z"}

    seed = _read(folder, "seedbench")
    assert {key: each.prompt for key, each in seed.items()} == {
        "11": f"How many?\nA. a!\nB. b!\nC. c!\nD. 4\n{LETTER}"
    }

    science = _read(folder, "scienceqa")
    assert list(science) == ["6", "4"]
    assert science["4"].prompt == f"Which?  Say.\nA. in\nB. on\nC. at\n{LETTER}"
    start = "Context: It is  far.\nWhich?  Say.\nA. in"
    assert science["6"].prompt.startswith(start)

    assert _read(folder, "textvqa")["34"].prompt == f"What is ibm?{SHORT}"


def test_questions_as_llava_asks_them(folder):
    ask = {name: _read(folder, name, prompts="llava") for name in TASKS}
    assert ask["mme"]["OCR/0002/1"].prompt == f"Is it blue?{SHORT}"
    assert ask["mmbench"]["5"].prompt == (
        f'Look.\nWhich\none, 5?\nA. x\nB. a "quoted" word\nC. z\n{LETTER}'
    )
    assert ask["scienceqa"]["6"].prompt == (
        "Context: It is far.\nQuestion: Which? Say.\nOptions: (A) in (B) on (C) at\n" + LETTER
    )
    assert ask["scienceqa"]["4"].prompt.startswith("Context: N/A\n")
    assert ask["textvqa"]["34"].prompt == f"What is ibm?\nReference OCR token: I, BM{SHORT}"
    for name in ("pope", "gqa", "seedbench"):
        lmms = _read(folder, name)
        assert [each.prompt for each in ask[name].values()] == [p.prompt for p in lmms.values()]


def test_pictures_open_when_asked_and_json_holds_the_truth(folder):
    colors = {
        ("pope", "random/2"): (1, 1, 1),
        ("gqa", "201"): (1, 2, 3),
        ("mme", "OCR/0001/0"): (9, 0, 1),
        ("mmbench", "1000003"): (3, 0, 0),
        ("mmbench", "2000005"): (5, 0, 0),
        ("seedbench", "11"): (0, 7, 0),
        ("scienceqa", "6"): (0, 0, 6),
        ("textvqa", "34"): (3, 3, 3),
    }
    for (name, key), color in colors.items():
        each = _read(folder, name)[key]
        (picture,) = each.pictures
        assert (picture.load().mode, picture.load().getpixel((0, 0))) == ("RGB", color), name
        assert hash(picture) == hash(_read(folder, name)[key].pictures[0])
        assert json.loads(json.dumps(dict(each.truth))) == each.truth
    assert _read(folder, "mmbench")["1000003"].pictures[0].name.endswith("_en.tsv: line 6")
    gray = _read(folder, "gqa")["202"].pictures[0].load()
    assert np.unique(np.asarray(gray)[..., 0]).size == 1


def test_limits_keep_groups_and_spread_over_files(folder):
    assert list(_read(folder, "pope", limit=5)) == [
        "random/1", "random/2", "popular/1", "popular/2", "adversarial/1"
    ]  # fmt: skip
    pictures = {key.rsplit("/", 1)[0] for key in _read(folder, "mme", limit=5)}
    assert pictures == {"color/0001", "OCR/0001"}
    assert list(_read(folder, "mme", limit=1)) == ["color/0001/0", "color/0001/1"]
    assert list(_read(folder, "mmbench", limit=4)) == ["3", "1000003"]
    assert list(_read(folder, "gqa", limit=1)) == ["201"]
    assert len(_read(folder, "gqa", limit=99)) == 2
    for limit in (0, -1, True):
        with pytest.raises(QuotaError, match="limit must be at least 1"):
            _read(folder, "gqa", limit=limit)


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
        rows = _table_rows()
        rows[place] |= cells
        _write_table(root / "mmbench/mmbench_dev_en.tsv", rows)

    return apply


def _link_outside(root: Path) -> None:
    target = root.parent / "outside.png"
    target.write_bytes(_png((0, 0, 0)))
    (root / "gqa/images/n1.jpg").unlink()
    os.symlink(target, root / "gqa/images/n1.jpg")


POPE, GQA = "pope/coco_pope_popular.json", "gqa/testdev_balanced_questions.json"
MME, SEED = "mme/color/questions_answers_YN/0002.txt", "seedbench/SEED-Bench.json"
SCIENCE, SPLITS = "scienceqa/problems.json", "scienceqa/pid_splits.json"
TEXT, TABLE = "textvqa/TextVQA_0.5.1_val.json", "mmbench/mmbench_dev_en.tsv"
POPE_2 = _pope_line(2)
REFUSED = {
    "pope": [
        (_change(POPE, lambda t: t.replace(POPE_2, "{")), r"popular.json: line 2: not valid JSON"),
        (
            _change(POPE, lambda t: t.replace(POPE_2, "[1]")),
            r"line 2: expected an object, got list",
        ),
        (
            _change(POPE, lambda t: t.replace(POPE_2, _pope_line(2, "maybe"))),
            r"line 2: 'label' must be one of yes, no, got 'maybe'",
        ),
        (
            _change(POPE, lambda t: t.replace(POPE_2, _pope_line(3))),
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
    rows = _table_rows()
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.png")
    rows[0]["image"] = base64.b64encode((tmp_path / "whole.png").read_bytes()[:900]).decode()
    rows[1]["image"] = base64.b64encode(b"no picture at all, but long enough for it" * 3).decode()
    _write_table(tmp_path / "mmbench/x.tsv", rows)
    bench = _read(tmp_path, "mmbench")
    with pytest.raises(QuotaError, match=r"x.tsv: line 2: the picture is damaged"):
        bench["3"].pictures[0].load()
    with pytest.raises(QuotaError, match=r"x.tsv: line 4: not a picture in a known format"):
        bench["5"].pictures[0].load()
    with pytest.raises(QuotaError, match="no prompts 'x'; known: lmms-eval, llava"):
        TASKS["gqa"].read(folder, prompts="x")


def test_parquet_of_the_hub_gives_the_same_questions(folder, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="needs the extra 'eval'")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()

    def save(path: str, rows: list[dict]) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / path))

    def cell(each: Instance) -> dict:
        out = io.BytesIO()
        each.pictures[0].load().save(out, "PNG")
        return {"bytes": out.getvalue(), "path": None}

    own = {name: TASKS[name].read(folder) for name in TASKS}
    question = len(SHORT)
    rows = [
        {
            "question_id": each.key.split("/")[1],
            "category": each.truth["split"],
            "question": each.prompt[:-question],
            "answer": each.truth["answer"],
            "image": cell(each),
        }
        for each in own["pope"]
    ]
    save("pope/data/test-00000-of-00002.parquet", rows[:4])
    save("pope/data/test-00001-of-00002.parquet", rows[4:])
    official = json.loads((folder / GQA).read_text())
    rows = [{"id": key, **entry} for key, entry in official.items()]
    save("gqa/testdev_balanced_instructions/testdev-0.parquet", rows)
    rows = [{"id": each["imageId"], "image": cell(own["gqa"][0])} for each in official.values()]
    save("gqa/testdev_balanced_images/testdev-0.parquet", rows)
    rows = [
        {
            "question_id": f"{each.truth['category']}/{each.truth['image']}.png",
            "category": each.truth["category"],
            "question": each.prompt[:-question] + " Please answer yes or no.",
            "answer": each.truth["answer"].capitalize(),
            "image": cell(each),
        }
        for each in own["mme"]
    ]
    save("mme/data/test-0.parquet", rows)
    by_key = {each.key: each for each in own["mmbench"]}
    rows = []
    for row in _table_rows():
        level = {"L2-category": row.pop("l2-category"), "image": cell(by_key[row["index"]])}
        rows.append({**row, "index": int(row["index"]), **level})
    save("mmbench/en/dev-0.parquet", rows)
    rows = json.loads((folder / SEED).read_text())["questions"]
    images = [cell(own["seedbench"][0])]
    rows = [
        {**row, "choice_d": "4", "image": images * (1 + 7 * (not n))} for n, row in enumerate(rows)
    ]
    save("seedbench/data/test-0.parquet", rows)
    problems = json.loads((folder / SCIENCE).read_text())
    rows = [{**problems[key], "image": cell(own["scienceqa"][0])} for key in ("6", "4")]
    save("scienceqa/ScienceQA-IMG/test-0.parquet", rows)
    rows = json.loads((folder / TEXT).read_text())["data"]
    save("textvqa/data/validation-0.parquet", [{**rows[0], "ocr_tokens": [], "image": images[0]}])

    for name, instances in own.items():
        found = TASKS[name].read(tmp_path)
        assert [each.prompt for each in found] == [each.prompt for each in instances], name
        assert [each.truth for each in found] == [each.truth for each in instances], name
        if name != "scienceqa":  # the hub's rows have no id
            assert [each.key for each in found] == [each.key for each in instances], name
        picture = found[-1].pictures[0]
        assert picture.load().mode == "RGB"
        assert hash(picture) == hash(TASKS[name].read(tmp_path)[-1].pictures[0])
    assert "Reference OCR token: \n" in TASKS["textvqa"].read(tmp_path, prompts="llava")[0].prompt

    lines = (tmp_path / "pope/data/test-00001-of-00002.parquet").read_bytes()
    (tmp_path / "pope/data/test-00001-of-00002.parquet").write_bytes(lines[:200])
    with pytest.raises(QuotaError, match=r"test-00001-of-00002.parquet: not readable as parquet"):
        TASKS["pope"].read(tmp_path)
    save(
        "textvqa/data/validation-0.parquet",
        [rows[0] | {"image": None}, {**rows[0], "image": images[0]}],
    )
    with pytest.raises(QuotaError, match=r"validation-0.parquet: row 0: holds no picture"):
        TASKS["textvqa"].read(tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_prompts_equal_those_of_lmms_eval(folder):
    pytest.importorskip("lmms_eval", reason="lmms-eval 0.7.3 is not installed")
    utils = {
        name: importlib.import_module(f"lmms_eval.tasks.{module}")
        for name, module in {
            "pope": "pope.utils",
            "gqa": "gqa.utils",
            "mme": "mme.utils",
            "mmbench": "mmbench.en_utils",
            "seedbench": "seedbench.utils",
            "scienceqa": "scienceqa.utils",
            "textvqa": "textvqa.utils",
        }.items()
    }
    short = {"pre_prompt": "", "post_prompt": SHORT}
    letter = {"pre_prompt": "", "post_prompt": f"\n{LETTER}", "format": "default"}
    line = json.loads(POPE_2)
    theirs = utils["pope"].pope_doc_to_text({"question": line["text"]}, short)
    assert _read(folder, "pope")["random/2"].prompt == theirs
    gqa = json.loads((folder / GQA).read_text())["201"]
    assert _read(folder, "gqa")["201"].prompt == utils["gqa"].gqa_doc_to_text(gqa, short)
    for turn, row in enumerate((folder / MME).read_text().splitlines()):
        theirs = utils["mme"].mme_doc_to_text({"question": row.split("\t")[0]}, short)
        assert _read(folder, "mme")[f"color/0002/{turn}"].prompt == theirs
    for row in _table_rows():
        # Empty cells are "nan" on the hub.
        doc = {name: value or "nan" for name, value in row.items()} | {"L2-category": "l"}
        theirs = utils["mmbench"].mmbench_doc_to_text(doc, letter)
        assert _read(folder, "mmbench")[row["index"]].prompt == theirs
    seed = json.loads((folder / SEED).read_text())["questions"][1]
    assert _read(folder, "seedbench")["11"].prompt == utils["seedbench"].seed_doc_to_text(seed)
    for key, row in json.loads((folder / SCIENCE).read_text()).items():
        if key in ("4", "6"):
            theirs = utils["scienceqa"].sqa_doc_to_text(row, letter)
            assert _read(folder, "scienceqa")[key].prompt == theirs
    text = json.loads((folder / TEXT).read_text())["data"][0]
    theirs = utils["textvqa"].textvqa_doc_to_text(text, {**short, "ocr": False})
    assert _read(folder, "textvqa")["34"].prompt == theirs
