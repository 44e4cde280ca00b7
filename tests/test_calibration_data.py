"""Samples for calibration: drawn from official files, stored, read back, put into prompts."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from converters import convert
from quota_jax.checkpoint import open_checkpoint
from quota_jax.cli import main
from quota_jax.errors import QuotaError
from quota_jax.processing import Processor
from quota_jax.quant import json_rows
from quota_jax.quant.calibration_data import Sample, digest, make_batches, read_samples
from quota_jax.quant.json_rows import JsonRows
from quota_jax.quant.sample_lists import allot
from quota_jax.quant.sample_sources import Draft
from tests.tiny_models import draw_picture, write_tiny_llava
from tests.tiny_qwen import write_tiny_qwen

SHORT = "\nAnswer the question using a single word or phrase."


def save(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Small files in the official layouts."""
    root = tmp_path_factory.mktemp("data")

    def picture(name: str, seed: int) -> str:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        draw_picture(seed).save(root / name)
        return Path(name).name

    mix = [
        {
            "id": f"{i:06d}",
            "image": f"coco/{picture(f'pictures/coco/{i}.png', i)}",
            "conversations": [
                {"from": "human", "value": ("<image>\n", "")[i % 2] + f"q{i} Zürich?"},
                {"from": "gpt", "value": f"a{i}"},
                {"from": "human", "value": f"second {i}"},
                {"from": "gpt", "value": f"more {i}"},
            ],
        }
        for i in range(12)
    ]
    mix[1]["conversations"][0]["value"] = "q1 Zürich?\n<image>"
    mix += [
        {
            "id": f"t{i}",
            "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}],
        }
        for i in range(4)
    ]
    save(root / "mix.json", mix)
    rows = [
        {
            "question_id": i,
            "image_id": picture(f"train_images/p{i}.jpg", i).removesuffix(".jpg"),
            "question": f"what is {i}?",
            "answers": ["rare", *["often"] * 5, *["some"] * 4],
        }
        for i in range(5)
    ]
    save(
        root / "textvqa.json", {"dataset_type": "train", "data": rows, "version": [1, {"a": "}]"}]}
    )
    rows = [
        {
            "questionId": i,
            "question": f"doc {i}?",
            "image": f"documents/{i}.png",
            "answers": ["x", "y"],
        }
        for i in range(5)
    ]
    for row in rows:
        picture(row["image"], 3)
    save(root / "docvqa.json", {"dataset_name": "docvqa", "data": rows})
    for part in ("human", "augmented"):
        rows = [
            {"imgname": f"{part}{i}.png", "query": f"{part} {i}", "label": f"{i}%"}
            for i in range(3)
        ]
        for row in rows:
            picture(f"png/{row['imgname']}", 4)
        save(root / f"chart_{part}.json", rows)
    lines = [
        " ",
        " = Title = ",
        " ",
        *[f" word{i} of a paragraph , number {i} . " for i in range(40)],
    ]
    (root / "wiki.raw").write_text("\n".join(lines))
    (root / "wiki.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    return root


def command(data: Path, out: Path, *options: object) -> int:
    return main([str(each) for each in ("samples", "--out", out, *options)])


def everything(data: Path) -> list[object]:
    return [
        *("--llava-mix", data / "mix.json", "--images", data / "pictures"),
        *("--textvqa", data / "textvqa.json", "--docvqa", data / "docvqa.json"),
        *("--chartqa", data / "chart_human.json", data / "chart_augmented.json"),
        *("--wikitext", data / "wiki.raw"),
    ]


def entries(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))


def test_a_list_of_all_sources(data, tmp_path, capsys):
    """What each source's row becomes; equal seeds give equal bytes; the list may be moved."""
    out = tmp_path / "calib.json"
    options = [*everything(data), "--count", 15, "--llava-mix-share", 2, "--docvqa-share", 0.5]
    assert command(data, out, *options) == 0
    told = capsys.readouterr()
    assert told.err == ""
    assert f"wrote {out} and {tmp_path / 'calib_pictures'}: 15 samples, seed 0" in told.out
    found = entries(out)
    kinds = [entry["source"].split()[0] for entry in found]
    counts = {kind: kinds.count(kind) for kind in set(kinds)}
    # 15 x (2, 1, 0.5, 1, 1) / 5.5 = 5.45, 2.73, 1.36, 2.73, 2.73.
    assert counts == {"llava-mix": 5, "textvqa": 3, "docvqa": 1, "chartqa": 3, "wikitext": 3}
    assert kinds != sorted(kinds, key=kinds.index)
    assert len({entry["source"] for entry in found}) == 15
    for entry in found:
        kind, name = entry["source"].split()
        if kind == "wikitext":
            expected = [f"word{i} of a paragraph , number {i} ." for i in range(int(name), 40)]
            assert entry["text"] == "\n".join(expected)
            assert "image" not in entry
            continue
        stored = np.asarray(Image.open(tmp_path / entry["image"]))
        if kind == "llava-mix":
            i = int(name)
            assert entry["turns"] == [f"q{i} Zürich?", f"a{i}"]
            np.testing.assert_array_equal(stored, np.asarray(draw_picture(i)))
        elif kind == "textvqa":
            assert entry["turns"] == [f"what is {name}?{SHORT}", "often"]
        elif kind == "docvqa":
            assert entry["turns"] == [f"doc {name}?{SHORT}", "x"]
        else:
            part, i = name[:-5], name[-5]
            assert entry["turns"] == [f"{part} {i}{SHORT}", f"{i}%"]
    again = tmp_path / "moved" / "calib.json"
    assert command(data, again, *options) == 0
    assert again.read_bytes() == out.read_bytes()
    assert digest(read_samples(again)) == digest(read_samples(out))
    other = tmp_path / "other" / "calib.json"
    assert command(data, other, *options, "--seed", 1) == 0
    assert entries(other) != found
    # The other sources have no say in what a source gives.
    alone = tmp_path / "alone" / "calib.json"
    assert command(data, alone, *everything(data)[:4], "--count", 5) == 0
    drawn = {entry["source"] for entry in entries(alone)}
    assert drawn == {e["source"] for e in found if e["source"].startswith("llava-mix")}


def test_how_much_of_a_row_is_taken(data, tmp_path):
    mix = [*everything(data)[:4], "--count", 12]
    command(data, tmp_path / "all.json", *mix, "--exchanges", 0)
    whole = {entry["source"]: entry["turns"] for entry in entries(tmp_path / "all.json")}
    assert whole["llava-mix 000004"] == ["q4 Zürich?", "a4", "second 4", "more 4"]
    command(data, tmp_path / "asked.json", *mix, "--exchanges", 2, "--no-answers")
    asked = {entry["source"]: entry["turns"] for entry in entries(tmp_path / "asked.json")}
    assert asked == {name: turns[:3] for name, turns in whole.items()}
    command(data, tmp_path / "texts.json", *mix[:4], "--count", 16, "--text-only")
    texts = entries(tmp_path / "texts.json")
    assert sum("image" not in entry for entry in texts) == 4
    lines = ["--wikitext", data / "wiki.jsonl", "--max-characters", 50, "--count", 40]
    assert command(data, tmp_path / "lines.json", *lines) == 0
    for entry in entries(tmp_path / "lines.json"):
        first = int(entry["source"].split()[1])
        running = "\n".join(f"word{i} of a paragraph , number {i} ." for i in range(first, 40))
        assert f"{running[:51]} ".startswith(f"{entry['text']} ")
        assert len(entry["text"]) > 30
    draft = Draft(origin="", where="", turns=("ab cd", "ef gh", "i"))
    assert draft.shortened(100) == draft
    assert draft.shortened(9).turns == ("ab cd", "ef")
    assert draft.shortened(5).turns == ("ab cd",)
    assert draft.shortened(1).turns == ("a",)


def test_shares():
    assert allot(128, [1] * 5) == [26, 26, 26, 25, 25]
    assert allot(1, [1, 1, 0]) == [1, 0, 0]
    assert allot(10, [0, 3, 1]) == [0, 8, 2]
    for shares in ([-1, 2], [0, 0], [float("nan")]):
        with pytest.raises(QuotaError, match="share"):
            allot(3, shares)


@pytest.mark.parametrize("piece", [1, 7, 64, 2**20])
def test_rows_are_those_of_json(tmp_path, monkeypatch, piece):
    """Pieces that end anywhere, inside escapes and characters of several bytes too."""
    monkeypatch.setattr(json_rows, "PIECE", piece)
    draw = random.Random(piece)
    texts = ["Zürich", "日本 \u0085", 'a"]}{[', "\\", "\n\t", "", "𝔸"]
    rows = [
        {draw.choice(texts): draw.choice([1.5e3, -7, None, True, [draw.choice(texts)] * 3, {}])}
        | {"image": draw.choice([None, "p.png"])}
        for _ in range(30)
    ]
    for indent, ascii_only, bom in ((None, True, ""), (2, False, "\ufeff"), (None, False, "")):
        path = tmp_path / "rows.json"
        text = json.dumps(rows, indent=indent, ensure_ascii=ascii_only)
        path.write_text(bom + text, encoding="utf-8")
        found = JsonRows.open(path)
        assert [found[i] for i in range(len(found))] == rows
        path.write_text(
            json.dumps({"ä": 12, "info": rows[:2], "data": rows, "last": 1}, indent=indent)
        )
        found = JsonRows.open(path, name="data", keep=lambda row: bool(row["image"]))
        assert [found[i] for i in range(len(found))] == [row for row in rows if row["image"]]
        assert rows[int(found.where(1).rpartition(" ")[2])] == found[1]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[1]",
        "[{}",
        "[{},]",
        "[{} {}]",
        "[{}] x",
        '{"data": {}}',
        '[{"a": tru}]',
        "[" * 9999,
    ],
)
def test_broken_lists_are_one_line(tmp_path, text):
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(QuotaError, match=r"rows\.json: ") as caught:
        JsonRows.open(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(QuotaError, match=r"rows\.json: "):
        JsonRows.open(path, name="data")


def turn(kind: str, value: object) -> dict:
    return {"from": kind, "value": value}


PAIR = [turn("human", "<image>\nq"), turn("gpt", "a")]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": "no.png", "conversations": PAIR}, "row 0: no picture"),
        ({"image": "../out.png", "conversations": PAIR}, "is no name of a picture inside"),
        ({"image": "/etc/hostname", "conversations": PAIR}, "is no name of a picture inside"),
        ({"image": "link.png", "conversations": PAIR}, "leads out of the folder"),
        ({"image": "broken.png", "conversations": PAIR}, "row 0: "),
        ({"image": ["a.png", "a.png"], "conversations": PAIR}, "name of one picture"),
        ({"image": "a.png"}, "'conversations' must be a list"),
        ({"image": "a.png", "conversations": []}, "must alternate"),
        ({"image": "a.png", "conversations": PAIR + PAIR[1:]}, "must alternate"),
        ({"image": "a.png", "conversations": [turn("narrator", "q")]}, "'from' must be one of"),
        ({"image": "a.png", "conversations": [turn("human", 3)]}, "'value' must be a text"),
        ({"image": "a.png", "conversations": [turn("human", "<image>")]}, "question is empty"),
        (
            {"image": "a.png", "conversations": [turn("human", "<image> <image>")]},
            "holds '<image>'",
        ),
        ({"conversations": PAIR}, "llava-mix: 0 rows of use; 1 were asked for"),
    ],
)
def test_bad_rows_are_one_line_and_leave_nothing(tmp_path, capsys, row, message):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for path in (tmp_path / "out.png", pictures / "a.png"):
        draw_picture(1).save(path)
    os.symlink(tmp_path / "out.png", pictures / "link.png")
    (pictures / "broken.png").write_bytes(draw_picture(2).tobytes()[:50])
    save(tmp_path / "mix.json", [row])
    before = sorted(tmp_path.rglob("*"))
    options = ("--llava-mix", tmp_path / "mix.json", "--images", pictures, "--count", 1)
    assert command(tmp_path, tmp_path / "calib.json", *options) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "no source: name files with --llava-mix"),
        ("--llava-mix nowhere.json", "nowhere.json: cannot be read"),
        ("--wikitext nowhere.raw", "nowhere.raw: cannot be read"),
        ("--wikitext {0}/wiki.raw --count 41", "wikitext: 40 rows of use; 41 were asked for"),
        ("--wikitext {0}/wiki.raw --count 0", "count must be at least 1"),
        ("--wikitext {0}/wiki.raw --docvqa-share 1", "--docvqa-share needs --docvqa"),
        ("--wikitext {0}/wiki.raw --wikitext-share -1", "shares must not be negative"),
        ("--wikitext {0}/wiki.raw --images x", "--images needs --llava-mix"),
        ("--textvqa {0}/mix.json", "expected an object with a list 'data'"),
        ("--llava-mix {0}/docvqa.json", "docvqa.json: expected a list"),
        ("--docvqa {0}/textvqa.json --count 1", "'image' is missing"),
    ],
)
def test_bad_options_are_one_line(data, tmp_path, capsys, options, message):
    assert command(data, tmp_path / "calib.json", *options.format(data).split()) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_missing_pictures_may_be_passed_over_and_nothing_is_overwritten(data, tmp_path, capsys):
    rows = json.loads((data / "mix.json").read_text(encoding="utf-8"))[:12]
    for row in rows[::3]:
        row["image"] = "gone.png"
    save(tmp_path / "mix.json", rows)
    options = [
        "--llava-mix",
        tmp_path / "mix.json",
        "--images",
        data / "pictures",
        "--skip-missing",
    ]
    assert command(data, tmp_path / "a.json", *options, "--count", 8) == 0
    names = {entry["source"].split()[1] for entry in entries(tmp_path / "a.json")}
    assert names == {row["id"] for row in rows if row["image"] != "gone.png"}
    assert command(data, tmp_path / "b.json", *options, "--count", 9) == 2
    err = capsys.readouterr().err
    assert "12 rows of use, 4 without picture; 9 were asked for" in err
    assert command(data, tmp_path / "a.json", *options, "--count", 8) == 2
    assert "a.json exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"turns": []}, "'turns' must be a list of strings"),
        ({"turns": ["a", " "]}, "'turns' must be a list of strings"),
        ({"turns": "ab"}, "'turns' must be a list of strings"),
        ({"turns": ["a"], "text": "a"}, "'text' and 'turns' exclude each other"),
        ({"text": "a", "image": "../b.png"}, "no picture .*b.png"),
    ],
)
def test_bad_lists_are_refused(tmp_path, entry, message):
    (tmp_path / "lists").mkdir()
    with pytest.raises(QuotaError, match=f"sample 0: .*{message}"):
        read_samples(save(tmp_path / "lists" / "calib.json", [entry]))


def test_pictures_may_lie_anywhere(tmp_path):
    (tmp_path / "lists").mkdir()
    draw_picture(0).save(tmp_path / "a.png")
    rows = [{"text": "a", "image": name} for name in ("../a.png", str(tmp_path / "a.png"))]
    first, second = read_samples(save(tmp_path / "lists" / "calib.json", rows))
    assert Path(first.image).samefile(second.image)


@pytest.mark.parametrize("write", [write_tiny_llava, write_tiny_qwen])
def test_turns_become_the_models_conversation(write, tmp_path):
    """The tokens are those of the processor's own conversation, with the answer at its end."""
    convert(write(tmp_path / "hf"), tmp_path / "ckpt")
    checkpoint = open_checkpoint(tmp_path / "ckpt")
    processor = Processor.from_folder(checkpoint.assets_dir, checkpoint.config)
    picture, question, answer = draw_picture(3), "what is a car ?", "red"
    content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]

    def tokens(batch):
        return np.asarray(batch.tokens)[0, : int(batch.lengths[0])].tolist()

    for turns, asks in (((question, answer), False), ((question,), True)):
        expected = processor.chat([messages[: len(turns)]], add_generation_prompt=asks)
        found = make_batches(processor, [Sample(turns=turns, image=picture)], 1).batches[0]
        assert tokens(found) == tokens(expected)
    plain = make_batches(processor, [Sample(turns=(question, answer))], 1).batches[0]
    messages[0]["content"] = question
    assert tokens(plain) == tokens(processor.chat([messages], add_generation_prompt=False))
    same = [Sample(turns=("a", "b")), Sample(turns=("a",)), Sample(text="a"), Sample(text="ab")]
    assert len({digest([sample]) for sample in same}) == 4
