"""Readers of the benchmarks' official files: prompts, keys, limits, and what is refused."""

from __future__ import annotations

import importlib
import io
import json
from pathlib import Path

import numpy as np
import pytest

from quota_jax.errors import QuotaError
from quota_jax.evaluate.task import Instance
from quota_jax.evaluate.tasks import TASKS
from tests.official_files import (
    GQA,
    LETTER,
    MME,
    POPE_2,
    SCIENCE,
    SEED,
    SHORT,
    TEXT,
    read,
    table_rows,
    write_official_files,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_official_files(tmp_path_factory.mktemp("data"))


def test_questions_as_lmms_eval_asks_them(folder):
    pope = read(folder, "pope")
    assert list(pope) == [
        f"{s}/{n}" for s in ("random", "popular", "adversarial") for n in (1, 2, 3)
    ]
    assert pope["random/2"].prompt == f"Is there a dog in picture 2?{SHORT}"
    assert pope["popular/1"].truth == {"answer": "yes", "split": "popular"}
    # Two questions about one picture share it.
    assert len({pope["random/2"].pictures, pope["popular/3"].pictures}) == 1

    gqa = read(folder, "gqa")
    assert gqa["201"].prompt == f"What is it?{SHORT}"
    assert gqa["201"].truth == {"answer": "cat", "structural": "query", "semantic": "obj"}
    assert gqa["202"].pictures[0].name == str(folder / "gqa/images/n2.png")

    mme = read(folder, "mme")
    assert next(iter(mme)) == "color/0001/0"
    assert len(mme) == 8
    # A second blank before the request stays.
    assert mme["color/0001/0"].prompt == f"Is it red?{SHORT}"
    assert mme["OCR/0002/1"].prompt == f"Is it blue? {SHORT}"
    assert mme["OCR/0002/1"].truth == {"answer": "no", "category": "OCR", "image": "0002"}

    bench = read(folder, "mmbench")
    assert list(bench) == ["3", "1000003", "5", "1000005", "2000005"]
    assert bench["3"].prompt == (
        f"Which\none, 3? There are several options:\nA. one\ttab\nB. two\n\n{LETTER}"
    )
    start = "Look. Which\none, 5? There are several options:\nA. x\n"
    assert bench["5"].prompt == f'{start}B. a "quoted" word\nC. z\n\n{LETTER}'
    assert bench["5"].truth["options"] == {"A": "x", "B": 'a "quoted" word', "C": "z"}

    seed = read(folder, "seedbench")
    assert {key: each.prompt for key, each in seed.items()} == {
        "11": f"How many?\nA. a!\nB. b!\nC. c!\nD. 4\n{LETTER}"
    }

    science = read(folder, "scienceqa")
    assert list(science) == ["6", "4"]
    assert science["4"].prompt == f"Which?  Say.\nA. in\nB. on\nC. at\n{LETTER}"
    start = "Context: It is  far.\nWhich?  Say.\nA. in"
    assert science["6"].prompt.startswith(start)

    assert read(folder, "textvqa")["34"].prompt == f"What is ibm?{SHORT}"


def test_questions_as_llava_asks_them(folder):
    ask = {name: read(folder, name, prompts="llava") for name in TASKS}
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
        lmms = read(folder, name)
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
        each = read(folder, name)[key]
        (picture,) = each.pictures
        assert (picture.load().mode, picture.load().getpixel((0, 0))) == ("RGB", color), name
        assert hash(picture) == hash(read(folder, name)[key].pictures[0])
        assert json.loads(json.dumps(dict(each.truth))) == each.truth
    assert read(folder, "mmbench")["1000003"].pictures[0].name.endswith("_en.tsv: line 6")
    gray = read(folder, "gqa")["202"].pictures[0].load()
    assert np.unique(np.asarray(gray)[..., 0]).size == 1


def test_limits_keep_groups_and_spread_over_files(folder):
    assert list(read(folder, "pope", limit=5)) == [
        "random/1", "random/2", "popular/1", "popular/2", "adversarial/1"
    ]  # fmt: skip
    pictures = {key.rsplit("/", 1)[0] for key in read(folder, "mme", limit=5)}
    assert pictures == {"color/0001", "OCR/0001"}
    assert list(read(folder, "mme", limit=1)) == ["color/0001/0", "color/0001/1"]
    assert list(read(folder, "mmbench", limit=4)) == ["3", "1000003"]
    assert list(read(folder, "gqa", limit=1)) == ["201"]
    assert len(read(folder, "gqa", limit=99)) == 2
    for limit in (0, -1, True):
        with pytest.raises(QuotaError, match="limit must be at least 1"):
            read(folder, "gqa", limit=limit)


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
    for row in table_rows():
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
    assert read(folder, "pope")["random/2"].prompt == theirs
    gqa = json.loads((folder / GQA).read_text())["201"]
    assert read(folder, "gqa")["201"].prompt == utils["gqa"].gqa_doc_to_text(gqa, short)
    for turn, row in enumerate((folder / MME).read_text().splitlines()):
        theirs = utils["mme"].mme_doc_to_text({"question": row.split("\t")[0]}, short)
        assert read(folder, "mme")[f"color/0002/{turn}"].prompt == theirs
    for row in table_rows():
        # Empty cells are "nan" on the hub.
        doc = {name: value or "nan" for name, value in row.items()} | {"L2-category": "l"}
        theirs = utils["mmbench"].mmbench_doc_to_text(doc, letter)
        assert read(folder, "mmbench")[row["index"]].prompt == theirs
    seed = json.loads((folder / SEED).read_text())["questions"][1]
    assert read(folder, "seedbench")["11"].prompt == utils["seedbench"].seed_doc_to_text(seed)
    for key, row in json.loads((folder / SCIENCE).read_text()).items():
        if key in ("4", "6"):
            theirs = utils["scienceqa"].sqa_doc_to_text(row, letter)
            assert read(folder, "scienceqa")[key].prompt == theirs
    text = json.loads((folder / TEXT).read_text())["data"][0]
    theirs = utils["textvqa"].textvqa_doc_to_text(text, {**short, "ocr": False})
    assert read(folder, "textvqa")["34"].prompt == theirs
