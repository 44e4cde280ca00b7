"""Drawn sample lists: true answers, the training's words, the calibration reader's format."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from PIL import Image
from world_truth import truth

from quota_jax.errors import QuotaError
from quota_jax.quant.calibration_data import read_samples
from quota_jax.testbed import samples
from quota_jax.testbed.scenes import describe_scene
from quota_jax.testbed.world.conversation import prompt_words
from quota_jax.testbed.world.layout import (
    UNIFORMS_PER_SCENE,
    Difficulty,
    sample_layout,
    scene_uniforms,
)
from quota_jax.testbed.world.questions import (
    UNIFORMS_PER_QUESTION,
    ask_layout,
    draw_requests,
)
from quota_jax.testbed.world.vocabulary import build_tokenizer
from quota_jax.testbed.world.words import HOLE


def test_prompts_are_the_words_of_training():
    rng = np.random.default_rng(3)
    count, number = 64, 6
    layout = sample_layout(scene_uniforms(rng, count), Difficulty())
    topics, forms = draw_requests(rng.random((count, number), dtype=np.float32))
    uniforms = rng.random((count, number * UNIFORMS_PER_QUESTION), dtype=np.float32)
    questions = ask_layout(layout, uniforms, topics, forms)
    variants = rng.random((count, number, 4), dtype=np.float32)
    expected = prompt_words(questions, variants)
    tokenizer = build_tokenizer()
    for row in range(count):
        for column in range(number):
            text = samples.word_prompt(questions, row, column, variants[row, column])
            ids = expected[row, column]
            found = tokenizer.encode(text, add_special_tokens=False).ids
            assert found == ids[ids != HOLE].tolist(), text


def _parts(prompt: str) -> tuple[str, str, tuple[str, ...]]:
    """Question, hint and options of a prompt, read back."""
    lines = prompt.split("\n")[:-1]
    options = tuple(line[3:] for line in lines if re.match(r"[A-E]\. ", line))
    lines = [line for line in lines[: len(lines) - len(options)] if "several options" not in line]
    hint = lines[0].removeprefix("Context: ") if len(lines) > 1 else ""
    return lines[-1], hint, options


@pytest.mark.parametrize("family", ["llava", pytest.param("qwen2_5_vl", marks=pytest.mark.slow)])
def test_answers_are_true_of_the_picture(family, monkeypatch):
    layouts = []

    def spy(uniforms, difficulty, **how):
        layouts.append(sample_layout(uniforms, difficulty, **how))
        return layouts[-1]

    monkeypatch.setattr(samples, "sample_layout", spy)
    sizes = samples.SIZES[family]
    drawn = list(samples.draw_samples(8, seed=4, family=family))
    for sample in drawn:
        size = sizes[sample.index % len(sizes)]
        assert sample.pixels.shape == (*size, 3)
        layout = layouts[sample.index % len(sizes)]
        scene = describe_scene(layout, sample.index // len(sizes))
        assert scene.size == size
        for question in sample.questions:
            asked, hint, options = _parts(question.prompt)
            assert truth(scene, asked, hint, options) == question.answer, question


def test_list_reads_back_and_is_repeatable(tmp_path):
    first = samples.write_samples(tmp_path / "a" / "calib.json", 3, seed=1, questions=2)
    assert samples.main([str(tmp_path / "b.json"), "--count", "5", "--seed", "1"]) == 0
    found, longer = read_samples(first), json.loads((tmp_path / "b.json").read_text())
    assert len(found) == 3
    assert [len(sample.turns) for sample in found] == [4] * 3
    assert [len(entry["turns"]) for entry in longer] == [8] * 5
    for sample, entry in zip(found, longer, strict=False):
        with Image.open(sample.image) as a, Image.open(tmp_path / entry["image"]) as b:
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    other = next(samples.draw_samples(1, seed=2))
    with Image.open(found[0].image) as a:
        assert not np.array_equal(np.asarray(a), other.pixels)


def test_seeds_are_not_those_of_the_benchmarks():
    """Scene streams of benchmarks and of plain scenes begin with other numbers."""
    from quota_jax.testbed import scenes
    from quota_jax.testbed.benchmarks import family

    assert samples._STREAM not in (family._STREAM, scenes._STREAM)
    ours = np.random.default_rng([samples._STREAM, 1, 0]).random(UNIFORMS_PER_SCENE)
    theirs = family.generator("gqa", "dev").random(UNIFORMS_PER_SCENE)
    assert not np.allclose(ours, theirs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["calib.json", "--family", "clip"], "no family 'clip'"),
        (["calib.json", "--count", "0"], "count must be at least 1"),
        (["calib.json", "--seed", "-1"], "seed must be at least 0"),
        (["calib.json", "--questions", "0"], "questions must be at least 1"),
        (["calib"], "must end in .json"),
        (["there.json"], "exists already"),
    ],
)
def test_refusals(tmp_path, capsys, arguments, message):
    (tmp_path / "there.json").write_text("[]")
    name, *rest = arguments
    assert samples.main([str(tmp_path / name), *rest]) == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there.json"]


def test_bad_family_raises():
    with pytest.raises(QuotaError, match="no family"):
        samples.draw_samples(1, family="vit")
