"""Fresh questions about drawn scenes: true answers, kinds in turn, and how answers are counted."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from untrained import write_untrained
from world_truth import truth

import quota_jax as qj
from converters import convert
from quota_jax.errors import QuotaError
from quota_jax.recipe import Recipe
from quota_jax.testbed import evaluate
from quota_jax.testbed.evaluate import (
    KINDS,
    Answer,
    answer_items,
    make_items,
    score,
    score_by_kind,
)
from quota_jax.testbed.samples import SIZES
from quota_jax.testbed.scenes import describe_scene
from quota_jax.testbed.world.layout import sample_layout


@pytest.mark.parametrize("family", list(SIZES))
def test_items_are_true_and_take_turns(family: str, monkeypatch):
    scenes = []

    def spy(*args, **how):
        layout = sample_layout(*args, **how)
        scenes.append(describe_scene(layout, 0))
        return layout

    monkeypatch.setattr(evaluate, "sample_layout", spy)
    items = make_items(6, 3, questions=5, family=family)
    assert len(items) == 30
    assert len({item.kind for item in items}) >= 13
    for item in items:
        scene = scenes[item.picture]
        assert item.image.size == scene.size[::-1]
        assert scene.size == SIZES[family][item.picture % len(SIZES[family])]
        lines = item.prompt.split("\n")
        options = tuple(line[3:] for line in lines[1:-1])
        assert truth(scene, lines[0], "", options) == item.answer, item
        assert item.question.startswith(lines[0])
        assert all(option in item.question for option in options)
    again = make_items(4, 3, questions=5, family=family)
    assert [item.prompt for item in again] == [item.prompt for item in items[:20]]
    assert make_items(1, 4)[0].prompt != items[0].prompt


def test_bad_arguments_are_named():
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"pictures": 0}, "pictures must be at least 1"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"questions": 0}, "questions must be at least 1"),
        ({"kinds": ["smell/open"]}, "unknown kind of question 'smell/open'"),
        ({"family": "vit"}, "no family 'vit'"),
    )
    for how, message in wrong:
        with pytest.raises(QuotaError, match=message):
            make_items(how.pop("pictures", 1), how.pop("seed", 0), **how)


def test_scores_count_exact_answers():
    items = make_items(2, 9)
    empty = np.zeros((1, 1), bool)
    right = [Answer(item=item, text=f" {item.answer.upper()} ", kept=empty) for item in items]
    assert score(right).percent == 100
    wrong = [Answer(item=item, text=f"{item.answer} {item.answer}", kept=empty) for item in items]
    assert score(wrong[:2] + right[2:]).correct == len(items) - 2
    table = score_by_kind(wrong[:1] + right)
    assert table[items[0].kind].correct < table[items[0].kind].asked
    assert sum(found.asked for found in table.values()) == len(items) + 1
    assert set(table) <= set(KINDS)


@pytest.mark.parametrize("family", ["llava", pytest.param("qwen2_5_vl", marks=pytest.mark.slow)])
def test_untrained_answers(family: str, tmp_path: Path):
    """Batches, blindness and what is kept, on random weights."""
    folder = write_untrained(tmp_path / "hf", family, num_layers=2)
    vlm = qj.load(convert(folder, tmp_path / "full"), dtype="float32")
    items = make_items(3, 1, questions=1, kinds=["reading/open", "color/open"], family=family)
    assert len(items) == 3
    plain = answer_items(vlm, items, batch_size=2)
    assert [a.item for a in plain] == items
    cell = 14 if family == "llava" else 28
    for answer in plain:
        width, height = answer.item.image.size
        assert answer.kept.shape == (height // cell, width // cell)
        assert answer.kept.all()
    recipe = Recipe.uniform(num_layers=2, layers=[1], keep=0.25)
    pruned = answer_items(vlm, items, batch_size=2, recipe=recipe)
    for answer in pruned:
        assert answer.kept.sum() == -(-answer.kept.size // 4)
    # Blind, the same question gets the same answer about any picture.
    same = [items[0], *make_items(1, 2, questions=1, kinds=["reading/open"], family=family)]
    asked = [dataclasses.replace(each, prompt=items[0].prompt) for each in same]
    first, second = answer_items(vlm, asked, batch_size=2, blind=True)
    assert first.text == second.text
    with pytest.raises(QuotaError, match="batch_size"):
        answer_items(vlm, items, batch_size=0)
