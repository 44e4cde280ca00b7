"""Benchmark files: frozen, true, balanced, in words the models know, read by the task readers."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from world_truth import truth

from quota_jax.errors import QuotaError
from quota_jax.evaluate.tasks import TASKS
from quota_jax.testbed.benchmarks import FAMILIES, SPLITS, build_family, write_benchmarks
from quota_jax.testbed.benchmarks.__main__ import main
from quota_jax.testbed.benchmarks.family import Bundle, is_unseen
from quota_jax.testbed.benchmarks.writer import STYLES, _draw, frozen_hashes, question_digest
from quota_jax.testbed.scenes import Scene, describe_scene
from quota_jax.testbed.world.conversation import LETTER, SEVERAL, SINGLE_WORD, YES_OR_NO
from quota_jax.testbed.world.layout import sample_layout
from quota_jax.testbed.world.vocabulary import ID, UNK, build_tokenizer


@pytest.fixture(scope="module")
def bundles() -> dict[tuple[str, str], Bundle]:
    return {(split, name): build_family(name, split) for split in SPLITS for name in FAMILIES}


def _questions(name: str, bundle: Bundle) -> list[tuple[str, str, str, tuple[str, ...], str]]:
    """(picture, question, hint, options, answer) of every row, read from the files' bytes."""
    content = {**bundle.files, **bundle.extra_hashed}
    rows: list[tuple[str, str, str, tuple[str, ...], str]] = []
    if name == "pope":
        for data in content.values():
            for record in map(json.loads, data.decode().splitlines()):
                rows.append((record["image"], record["text"], "", (), record["label"]))
    elif name == "mme":
        for path, data in content.items():
            image = path.replace("questions_answers_YN", "images").replace(".txt", ".png")
            for line in data.decode().splitlines():
                question, answer = line.split("\t")
                question = question.removesuffix(" Please answer yes or no.")
                rows.append((image, question, "", (), answer.lower()))
    elif name == "gqa":
        for q in json.loads(content["testdev_balanced_questions.json"]).values():
            rows.append((q["imageId"] + ".png", q["question"], "", (), q["answer"]))
    elif name == "textvqa":
        for q in json.loads(content["TextVQA_0.5.1_val.json"])["data"]:
            assert len(q["answers"]) == 10
            rows.append((q["image_id"] + ".png", q["question"], "", (), q["answers"][3]))
    elif name == "seedbench":
        for q in json.loads(content["SEED-Bench.json"])["questions"]:
            options = tuple(q[f"choice_{letter}"] for letter in "abcd")
            rows.append((q["data_id"], q["question"], "", options, q["answer"]))
    elif name == "scienceqa":
        for key, q in json.loads(content["problems.json"]).items():
            options = tuple(choice.lower() for choice in q["choices"])
            image = f"images/test/{key}/image.png"
            rows.append((image, q["question"], q["hint"], options, "ABCDE"[q["answer"]]))
    else:
        table = io.StringIO(content["mmbench_dev_en.tsv"].decode())
        for q in csv.DictReader(table, delimiter="\t"):
            options = tuple(q[letter] for letter in "ABCD" if q[letter])
            options = tuple(o.lower() for o in options)
            rows.append((q["image"], q["question"], q["hint"], options, q["answer"]))
    return rows


def _scenes(bundle: Bundle) -> dict[str, Scene]:
    layout = sample_layout(bundle.uniforms, bundle.difficulty)
    scenes = {i: describe_scene(layout, i) for i in set(bundle.pictures.values())}
    named = {path: scenes[i] for path, i in bundle.pictures.items()}
    return named | {path.rsplit("/", 1)[-1]: scene for path, scene in named.items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_questions_are_frozen_true_and_known(bundles, name):
    tokenizer = build_tokenizer()
    seen: dict[str, set[bytes]] = {}
    for split in SPLITS:
        bundle = bundles[split, name]
        assert question_digest(bundle) == frozen_hashes()[split][name]
        assert bundle.questions >= 1500
        rows = _questions(name, bundle)
        assert len(rows) == bundle.questions
        scenes = _scenes(bundle)
        for image, question, hint, options, answer in rows:
            assert truth(scenes[image], question, hint, options) == answer, (question, options)
        texts = {" ".join((question, hint, *options)) for _, question, hint, options, _ in rows}
        for encoding in tokenizer.encode_batch(sorted(texts)):
            assert ID[UNK] not in encoding.ids, encoding.tokens
        seen[split] = {row.tobytes() for row in bundle.uniforms}
    assert not seen["dev"] & seen["test"]


def test_what_harnesses_write_around_questions_is_known():
    tokenizer = build_tokenizer()
    for text in (
        SINGLE_WORD, YES_OR_NO, LETTER, SEVERAL, "Context: ", "Context: N/A\nQuestion: \nOptions: ",
        "(A) (B) (C) (D) (E)", "Answer:", "Answer the question with Yes or No.",
        "Your response must be concise.", "Reference OCR token: , ", "Hint: ", "Question: ",
        "Answer this question briefly", "USER: <image>\n ASSISTANT:",
        "Please select the correct answer from the options above.",
    ):  # fmt: skip
        encoding = tokenizer.encode(text)
        assert ID[UNK] not in encoding.ids, (text, encoding.tokens)


def test_answers_without_the_picture_are_at_chance(bundles):
    """The best constant answer by question form, which is more than a blind model can know."""
    for split in SPLITS:
        for name in ("pope", "mme"):
            answers = Counter(row[-1] for row in _questions(name, bundles[split, name]))
            assert answers["yes"] == answers["no"]
        for file, data in bundles[split, "pope"].files.items():
            by_kind: dict[str, Counter[str]] = defaultdict(Counter)
            for record in map(json.loads, data.decode().splitlines()):
                by_kind[record["text"].split()[-4]][record["label"]] += 1
            best = sum(max(c.values()) for c in by_kind.values())
            assert best / data.count(b"\n") < 0.6, file
        topics: dict[str, Counter[str]] = defaultdict(Counter)
        records = json.loads(bundles[split, "gqa"].files["testdev_balanced_questions.json"])
        for record in records.values():
            topics[record["types"]["detailed"]][record["answer"]] += 1
        assert sum(max(c.values()) for c in topics.values()) < 0.18 * len(records)
        letters = Counter(row[-1] for row in _questions("seedbench", bundles[split, "seedbench"]))
        assert len(set(letters.values())) == 1
        rows = _questions("scienceqa", bundles[split, "scienceqa"])
        letters = Counter((len(row[3]), row[-1]) for row in rows)
        best = sum(max(letters[n, letter] for letter in "ABCDE") for n in range(2, 6))
        assert best < 1.25 * sum(1 / len(row[3]) for row in rows)
        words = Counter(row[-1] for row in _questions("textvqa", bundles[split, "textvqa"]))
        assert max(words.values()) <= 6


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("benchmarks") / "set"
    assert main([str(out), "--split", "dev", "--limit", "2"]) == 0
    return out


def test_task_readers_take_the_files(written, bundles):
    counts = {"pope": 6, "gqa": 2, "mme": 16, "seedbench": 2, "scienceqa": 2, "textvqa": 2}
    for name, task in TASKS.items():
        instances = task.read(written)
        if name == "mmbench":
            assert len({i.key for i in instances}) == len(instances) >= 4
        else:
            assert len(instances) == counts[name], name
        for instance in instances:
            assert instance.pictures[0].load().size == (336, 336)
    manifest = json.loads((written / "manifest.json").read_text())
    assert set(manifest["families"]) == set(FAMILIES)
    assert (manifest["split"], manifest["limit"]) == ("dev", 2)


def test_three_pictures_of_ten_are_drawn_in_the_style_that_training_never_shows(bundles):
    for (split, name), bundle in bundles.items():
        parts: dict[str, list[bool]] = defaultdict(list)
        for path in bundle.pictures:
            topic = path.split("/")[0] if name == "mme" else name  # MME: a folder for each topic
            parts[topic].append(path in bundle.unseen())
        for topic, unseen in parts.items():
            share = sum(unseen) / len(unseen)
            # A topic of MME has 30 pictures or more.
            spread = 0.2 if name == "mme" else 0.06
            assert abs(share - 0.3) <= spread, (split, name, topic, share)
    bundle = bundles["dev", "gqa"]
    scenes = sorted(set(bundle.pictures.values()))[:10]
    drawn = {style: dict(_draw(bundle, scenes, style)) for style in STYLES}
    assert 1 <= sum(map(is_unseen, scenes)) < len(scenes)
    for scene in scenes:
        own, other = ("held-out", "training") if is_unseen(scene) else ("training", "held-out")
        np.testing.assert_array_equal(drawn["mixed"][scene], drawn[own][scene])
        assert (drawn["mixed"][scene] != drawn[other][scene]).any()


def _again(out: Path) -> None:
    write_benchmarks(out, split="dev", limit=2, families=("gqa",), progress=False)


def test_the_same_command_checks_and_completes(written, capsys):
    picture = written / "gqa" / "images" / "w000000.png"
    good = picture.read_bytes()
    before = (written / "manifest.json").read_bytes()
    _again(written)
    assert (written / "manifest.json").read_bytes() == before
    pixels = np.array(Image.open(picture))
    pixels[0, 0] ^= 1
    Image.fromarray(pixels).save(picture)
    assert main([str(written), "--split", "dev", "--limit", "2", "--families", "gqa"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert "w000000.png is damaged" in error
    picture.write_bytes(good)
    _again(written)
    # A run that was killed: pictures in the unfinished folder stay, nothing else is missing.
    (written / "gqa").rename(written / ".gqa.partial")
    manifest = json.loads(before)
    kept = (written / ".gqa.partial" / "images" / "w000000.png").stat().st_mtime_ns
    del manifest["families"]["gqa"]
    (written / "manifest.json").write_text(json.dumps(manifest))
    _again(written)
    assert picture.stat().st_mtime_ns == kept
    assert not list(written.glob(".*.partial"))
    assert json.loads((written / "manifest.json").read_text()) == json.loads(before)


def test_other_sets_and_bad_arguments_are_refused(written, tmp_path):
    with pytest.raises(QuotaError, match="another set: split is 'dev', not 'test'"):
        write_benchmarks(written, split="test", limit=2)
    with pytest.raises(QuotaError, match="another set: style"):
        write_benchmarks(written, split="dev", limit=2, style="held-out")
    with pytest.raises(QuotaError, match="no split 'train'"):
        write_benchmarks(tmp_path, split="train")
    with pytest.raises(QuotaError, match="limit must be at least 1, got 0"):
        write_benchmarks(tmp_path, split="dev", limit=0)
    with pytest.raises(QuotaError, match="no family 'vqa'"):
        write_benchmarks(tmp_path, split="dev", families=("vqa",))
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(QuotaError, match="holds no benchmarks"):
        write_benchmarks(tmp_path, split="dev", limit=1)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
