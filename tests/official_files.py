"""The benchmarks' official files in small, for the tests of their readers."""

from __future__ import annotations

import base64
import csv
import io
import json
from pathlib import Path

from PIL import Image

from quota_jax.evaluate.task import Instance
from quota_jax.evaluate.tasks import TASKS

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
COLUMNS = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image"]
COLUMNS += ["source", "l2-category", "comment", "split"]


def png(color: tuple[int, int, int], mode: str = "RGB") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (5, 4), color).convert(mode).save(out, "PNG")
    return out.getvalue()


def put(path: Path, content: bytes | str | dict | list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, dict | list):
        content = json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def pope_line(number: int, label: str = "yes") -> str:
    image = f"COCO_val2014_{number // 2}.jpg"
    text = f"Is there a dog in picture {number}?"
    return json.dumps({"question_id": number, "image": image, "text": text, "label": label})


def table_rows() -> list[dict[str, str]]:
    """Two questions: one in two rotations, one in three; hints, quotes, line breaks, nan."""
    pictures = {key: base64.b64encode(png((key, 0, 0)) + bytes(200_000)).decode() for key in (3, 5)}
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


def write_table(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_official_files(root: Path) -> Path:
    """All seven tasks in their official files, a few questions each."""
    for split in ("random", "popular", "adversarial"):
        lines = [pope_line(number) for number in (1, 2, 3)]
        put(root / f"pope/coco_pope_{split}.json", "\n".join(lines) + "\n\n")
    for number in range(2):
        put(root / f"pope/val2014/COCO_val2014_{number}.jpg", png((number, 1, 1)))

    question = {"question": "What is it?", "answer": "cat", "imageId": "n1"}
    types = {"structural": "query", "semantic": "obj", "detailed": "objThis"}
    questions = {"201": {**question, "types": types}, "202": {**question, "imageId": "n2"}}
    put(root / "gqa/testdev_balanced_questions.json", questions)
    put(root / "gqa/images/n1.jpg", png((1, 2, 3)))
    put(root / "gqa/images/n2.png", png((1, 2, 4), "LA"))

    ask = "Is it {}? {}Please answer yes or no.\t{}"
    for image in ("0001", "0002"):
        lines = [ask.format("red", "", "Yes"), ask.format("blue", " ", "No")]
        put(root / f"mme/color/questions_answers_YN/{image}.txt", "\r\n".join(lines) + "\r\n")
        put(root / f"mme/color/images/{image}.png", png((9, 0, 0)))
        put(root / f"mme/OCR/{image}.txt", "\n".join(lines))
        put(root / f"mme/OCR/{image}.jpg", png((9, 0, 1)))

    write_table(root / "mmbench/mmbench_dev_en.tsv", table_rows())

    seed = {f"choice_{letter}": f"{letter}!" for letter in "abcd"} | {"choice_d": 4}
    seed |= {"question": "How many?", "answer": "D", "question_type_id": 5}
    rows = [
        {**seed, "question_id": "v", "data_id": "x.mp4", "data_type": "video"},
        {**seed, "question_id": "11", "data_id": "p_1", "data_type": "image"},
    ]
    put(root / "seedbench/SEED-Bench.json", {"questions": rows, "question_type": {}})
    put(root / "seedbench/SEED-Bench-image/p_1", png((0, 7, 0)))

    problem = {"question": "Which?  Say.", "choices": ["in", "on", "at"], "answer": 2, "hint": ""}
    problem |= {"image": "image.png", "subject": "language science", "grade": "grade2"}
    problems = {
        "4": problem,
        "5": {**problem, "image": None},
        "6": {**problem, "hint": "It is  far."},
        "7": problem,
    }
    put(root / "scienceqa/problems.json", problems)
    put(root / "scienceqa/pid_splits.json", {"train": ["7"], "test": ["6", "5", "4"]})
    for key in ("4", "6"):
        put(root / f"scienceqa/images/test/{key}/image.png", png((0, 0, int(key))))

    row = {"question": "what is IBM?", "image_id": "i1", "question_id": 34, "answers": ["a"] * 10}
    put(root / "textvqa/TextVQA_0.5.1_val.json", {"data": [row]})
    words = {"data": [{"image_id": "i1", "ocr_tokens": ["I", "BM"]}]}
    put(root / "textvqa/TextVQA_Rosetta_OCR_v0.2_val.json", words)
    put(root / "textvqa/train_images/i1.jpg", png((3, 3, 3)))
    return root


def read(folder: Path, name: str, **options) -> dict[str, Instance]:
    return {each.key: each for each in TASKS[name].read(folder, **options)}


POPE, GQA = "pope/coco_pope_popular.json", "gqa/testdev_balanced_questions.json"
MME, SEED = "mme/color/questions_answers_YN/0002.txt", "seedbench/SEED-Bench.json"
SCIENCE, SPLITS = "scienceqa/problems.json", "scienceqa/pid_splits.json"
TEXT, TABLE = "textvqa/TextVQA_0.5.1_val.json", "mmbench/mmbench_dev_en.tsv"
POPE_2 = pope_line(2)
