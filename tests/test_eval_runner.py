"""The runner against answers made one prompt after the other; kills, resumes, refusals."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import jax
import pytest
from PIL import Image

import quota_jax as qj
import quota_jax.evaluate.engine as engine_module
from converters import convert
from quota_jax.checkpoint import Checkpoint, open_checkpoint
from quota_jax.cli import main
from quota_jax.evaluate.engine import Engine, cut
from quota_jax.evaluate.parallel import local_mesh
from quota_jax.evaluate.predictions import Journal, Prediction, parse_lines
from quota_jax.evaluate.runner import Evaluation, user_turn
from quota_jax.evaluate.schedule import Request, encode, plan
from quota_jax.evaluate.throughput import measure_throughput
from quota_jax.processing import Processor
from tests.tiny_models import write_tiny_llava
from tests.tiny_qwen import write_tiny_qwen
from tests.tiny_task import TinyTask, write_questions

# Pictures of each question: none or two, so two buckets.
COUNTS = [2, 0, 2, 2, 0, 2, 2, 2, 0, 2, 2, 2]
RECIPE = qj.Recipe.uniform(num_layers=3, layers=[1], keep=0.5)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("eval")
    folder = write_tiny_llava(root / "hf", num_layers=3, image_size=56)
    convert(folder, root / "ckpt")
    return root / "ckpt"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_questions(tmp_path_factory.mktemp("data"), COUNTS)


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]


def asked(task: TinyTask, data: Path, **options: Any) -> list[Request]:
    return [
        Request(name=each.key, conversation=[user_turn(each)], max_new_tokens=5, **options)
        for each in task.read(data)
    ]


def make_engine(vlm: qj.Vlm, **options: Any) -> Engine:
    """Two rows at a time, on one device."""
    return Engine(
        model=vlm.model,
        processor=vlm.processor,
        recipe=RECIPE,
        mesh=local_mesh(jax.local_devices()[:1]),
        batch_size=2,
        **options,
    )


def test_answers_equal_generate_and_each_bucket_is_one_program(checkpoint: Path, data: Path):
    vlm, task = qj.load(checkpoint), TinyTask()
    engine = make_engine(vlm, workers=3)
    prompts = encode(asked(task, data), vlm.processor)
    groups = plan(prompts, engine.rows)
    answers = {}
    for group, part in engine.answer(prompts, groups):
        answers.update(zip(group.rows, part, strict=True))
    assert [answers[row].tokens > 0 for row in range(len(COUNTS))] == [True] * len(COUNTS)
    assert (engine.programs, len(groups)) == (2, 7)
    times = engine.timings
    assert (times.samples, times.batches) == (12, 7)
    assert 0 < times.busy <= times.answering * 1.0001

    chats = [
        [{"role": "user", "content": [
            *({"type": "image", "image": picture.load()} for picture in each.pictures),
            {"type": "text", "text": each.prompt},
        ]}]
        for each in task.read(data)
    ]  # fmt: skip
    out = qj.generate(
        vlm.model,
        vlm.processor.chat(chats),
        recipe=RECIPE,
        max_new_tokens=5,
        stop_ids=vlm.processor.stop_ids,
    )
    expected = [text.strip() for text in vlm.processor.decode(out.tokens, out.lengths)]
    assert [answers[row].text for row in range(len(COUNTS))] == expected
    assert [answers[row].tokens for row in range(len(COUNTS))] == out.lengths.tolist()
    assert len(set(expected)) > 6

    found = measure_throughput(engine, prompts, ahead=3)
    assert (engine.programs, found.timings.samples, found.timings.compile) == (2, 12, 0.0)
    assert found.share == found.timings.samples_per_second / found.bare > 0


def test_programs_that_are_too_many_are_dropped_and_compiled_again(
    checkpoint: Path, data: Path, monkeypatch: pytest.MonkeyPatch
):
    """With as many as one being too many; what runs already is not disturbed."""
    vlm, found = qj.load(checkpoint), []
    prompts = encode(asked(TinyTask(), data), vlm.processor)
    for crowded in (False, True):
        monkeypatch.setattr(engine_module, "many_programs", lambda crowded=crowded: crowded)
        engine = make_engine(vlm)
        groups = plan(prompts, engine.rows)
        # The buckets in turns, so that a dropped one is needed again.
        groups = groups[::2] + groups[1::2]
        found.append([answers for _, answers in engine.answer(prompts, groups)])
        assert (engine.programs > 2) == crowded
        assert (len(engine._programs) == 1) == crowded
    assert found[0] == found[1]


def test_batches_of_a_bucket_have_one_shape_whatever_the_sizes_of_pictures(tmp_path: Path):
    convert(write_tiny_qwen(tmp_path / "hf"), tmp_path / "ckpt")
    opened = open_checkpoint(tmp_path / "ckpt")
    processor = Processor.from_folder(opened.assets_dir, opened.config)

    @dataclasses.dataclass(frozen=True)
    class Blank:
        size: tuple[int, int]
        name: str = "blank"

        def load(self) -> Image.Image:
            return Image.new("RGB", self.size)

    rng = random.Random(3)
    requests = []
    for place in range(60):
        edge = rng.choice([40, 90, 200])
        pictures = [Blank((rng.randint(30, edge), edge)) for _ in range(rng.randint(0, 3))]
        parts = [{"type": "image", "image": picture} for picture in pictures]
        content = [*parts, {"type": "text", "text": "what is the color " * rng.randint(1, 9)}]
        requests.append(
            Request(
                name=f"r{place}",
                conversation=[{"role": "user", "content": content}],
                max_new_tokens=4,
            )
        )
    prompts = encode(requests, processor)
    groups = plan(prompts, 3)
    assert sorted(row for group in groups for row in group.rows) == list(range(60))
    shapes: dict[Any, set[str]] = {}
    for group in groups:
        rows = [prompts[row] for row in group.filled(3)]
        read = [[processor.pictures.read(p.load(), p.name) for p in row.pictures] for row in rows]
        batch = processor.lay_out([row.ids for row in rows], read, **group.bucket.pins(3))
        shape = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), batch)
        shapes.setdefault(group.bucket, set()).add(str(shape))
    assert len(shapes) < len(groups)
    assert all(len(found) == 1 for found in shapes.values())


def test_a_killed_run_ends_with_the_bytes_of_an_undisturbed_one(
    checkpoint: Path, tmp_path: Path, root: Path
):
    data = write_questions(tmp_path / "data", [1] * 21)
    whole = Evaluation(
        checkpoint=checkpoint, tasks=[TinyTask()], data=data, out=tmp_path / "whole", batch_size=2
    )
    whole.run()
    out = tmp_path / "cut"
    journal = out / "journal-0.jsonl"
    child = subprocess.Popen(
        [sys.executable, "-m", "tests.tiny_task", *map(str, (checkpoint, data, out, 2))],
        cwd=root,
        # A killed process adds nothing to the cache: it may leave a torn entry that others read.
        env={**os.environ, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1e9"},
    )
    stop = random.randint(1, 15)
    deadline = time.monotonic() + 120
    while not journal.exists() or journal.read_bytes().count(b"\n") < stop:
        assert time.monotonic() < deadline
        assert child.poll() is None or (out / "predictions.jsonl").exists()
        if child.poll() is not None:
            break
        time.sleep(0.0005)
    child.send_signal(signal.SIGKILL)
    child.wait()
    if journal.exists():
        with journal.open("ab") as file:
            file.write(b'{"task": "tiny", "key": "q0')  # what a kill in the middle leaves
    seen: list[int] = []
    resumed = dataclasses.replace(whole, out=out)
    _, timings = resumed.run(lambda done, total, what: seen.append(done))
    assert timings.samples < 21
    assert timings.samples == 21 - (seen[0] if seen else 21)
    for name in ("run.json", "predictions.jsonl", "summary.json", "summary.md"):
        expected = (tmp_path / "whole" / name).read_bytes()
        assert (out / name).read_bytes() == expected.replace(b"whole", b"cut"), name
    assert [line["key"] for line in lines(out)] == [f"q{place:02}" for place in range(21)]
    assert not list(out.glob("journal*"))


def test_the_command_compares_with_a_baseline_and_refuses_what_does_not_match(
    checkpoint: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    import quota_jax.cli.eval as command

    monkeypatch.setattr(command, "choose", lambda names: [TinyTask()])
    full, pruned = tmp_path / "full", tmp_path / "pruned"

    def run(*more: object) -> tuple[int, str, str]:
        arguments = ["eval", checkpoint, "--tasks", "tiny", "--data", data, "--limit", 4, *more]
        status = main([str(argument) for argument in arguments])
        out, error = capsys.readouterr()
        return status, out, error

    base = ("--batch-size", 4, "--recipe-none")
    status, text, error = run("--out", full, *base)
    assert (status, error) == (0, "")
    assert "| tiny | accuracy |         4 |" in text
    assert f"wrote {full / 'summary.json'}" in text
    with monkeypatch.context() as patch:
        # Complete: scored again, without the model.
        patch.setattr(Checkpoint, "load_model", None)
        status, text, error = run("--out", full, *base, "--baseline", full)
    assert (status, error) == (0, "")
    assert "+0.00 [+0.00, +0.00]" in text
    found = json.loads((full / "summary.json").read_text())
    assert found["tasks"]["tiny"]["comparison"]["difference"]["value"] == 0.0

    def refused(*more: object) -> str:
        status, _, error = run(*more)
        assert status == 2
        assert error.count("\n") == 1
        return error

    keep = ("--keep", 0.5, "--layers", 1)
    assert "another batch_size (4 there, 2 here)" in refused(
        "--out", full, "--batch-size", 2, "--recipe-none"
    )
    assert "another recipe.stages" in refused("--out", full, "--batch-size", 4, *keep)
    more = refused("--out", pruned, "--limit", 3, "--baseline", full)
    assert "answered other questions of tiny: 4 of them there, 3 here" in more
    assert "is no run" in refused("--out", pruned, "--baseline", tmp_path)
    assert "it is no run" in refused("--out", data)
    assert "unknown chat template 'x'" in refused("--out", pruned, "--template", "x")
    assert "at least 1" in refused("--out", pruned, "--batch-size", 0)
    assert "tiny.jsonl" not in refused("--out", pruned, "--processes", 2)
    assert not pruned.exists()


def test_a_damaged_picture_stops_the_run_by_name_and_the_run_goes_on_later(
    checkpoint: Path, tmp_path: Path
):
    data = write_questions(tmp_path / "data", [1] * 8)
    good = (data / "tiny" / "3.png").read_bytes()
    (data / "tiny" / "3.png").write_bytes(good[: len(good) // 2])
    evaluation = Evaluation(
        checkpoint=checkpoint,
        tasks=[TinyTask()],
        data=data,
        out=tmp_path / "out",
        batch_size=2,
        workers=2,
    )
    before = list(warnings.filters)
    with pytest.raises(qj.QuotaError, match=r"3\.png"):
        evaluation.run()
    assert warnings.filters == before
    (data / "tiny" / "3.png").write_bytes(good)
    evaluation.run()
    assert len(lines(tmp_path / "out")) == 8


def test_long_answers_are_cut_to_the_positions_and_long_prompts_are_refused(checkpoint: Path):
    opened = open_checkpoint(checkpoint)
    processor = Processor.from_folder(opened.assets_dir, opened.config)
    limit = opened.config.text.max_position_embeddings

    def ask(words: int) -> Request:
        message = {"role": "user", "content": "cat " * words}
        return Request(name="the long one", conversation=[message], max_new_tokens=2000)

    (prompt,) = encode([ask(limit - 40)], processor)
    assert len(prompt.ids) + prompt.max_new == limit
    with pytest.raises(qj.QuotaError, match=rf"the long one: .* the model's {limit} positions"):
        encode([ask(limit)], processor)


def test_stop_texts_and_spaces_go() -> None:
    assert cut(" yes \n\nno ", ("\n\n",)) == "yes"
    assert cut("a ASSISTANT: b\n", ("\n", "ASSISTANT:", "")) == "a"
    assert cut("  yes ", ("no",)) == "yes"
    assert cut("no", ("no",)) == ""


def test_the_journal_drops_a_torn_line_and_names_a_damaged_one(tmp_path: Path):
    path = tmp_path / "journal"
    made = [
        Prediction(task="t", key=f"k{n}", prompt="p", answer="é\u2028\n", tokens=n)
        for n in range(3)
    ]
    whole = b"".join(each.line() for each in made)
    for end in range(len(whole) + 1):
        path.write_bytes(whole[:end])
        with Journal(path) as journal:
            kept = journal.read
            assert kept == made[: len(kept)]
            assert len(kept) == whole[:end].count(b"}\n")
            with pytest.raises(qj.QuotaError, match="another process"):
                Journal(path)
            journal.append(made[len(kept) :])
        assert path.read_bytes() == whole
    bad = whole.replace(b'"k1"', b"7")
    with pytest.raises(qj.QuotaError, match="file, line 2: not a prediction: key is 7"):
        parse_lines(bad, "file", torn=True)
    with pytest.raises(qj.QuotaError, match="file, line 3"):
        parse_lines(whole[:-1], "file")
