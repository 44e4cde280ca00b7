"""Chooses scenes and questions for the benchmarks so that blind answers stay at chance.

Questions come from the same generator as in training, with seeds of their own. Every quota of
questions is filled up answer by answer, so no answer of a quota is much more frequent than others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from quota_jax.testbed.world.layout import (
    Difficulty,
    sample_layout,
    scene_uniforms,
)
from quota_jax.testbed.world.questions import (
    FORMS,
    TOPICS,
    UNIFORMS_PER_QUESTION,
    Questions,
    ask_layout,
)
from quota_jax.testbed.world.words import join_words

_BATCH = 256
_MAX_BATCHES = 400
MAX_COUNT = 5
"""Counting questions have answers 0 to 5, equally often."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One question: `scene` indexes the family's scenes; options are empty unless it is a choice.

    For choices `answer` is the option's letter.
    """

    scene: int
    topic: str
    form: str
    hint: str
    question: str
    options: tuple[str, ...]
    answer: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Quota:
    """How many questions of a topic and form; `num_options` only for choices without a hint."""

    topic: str
    count: int
    form: str = "open"
    num_options: int | None = None


@dataclass(frozen=True, kw_only=True)
class Draft:
    """Questions and, by scene index, the uniforms that make each scene."""

    items: tuple[Item, ...]
    uniforms: np.ndarray
    difficulty: Difficulty


def sentence(text: str) -> str:
    """First letter in upper case."""
    return text[:1].upper() + text[1:]


def hint_text(ids: np.ndarray) -> str:
    """Hint words as sentences: every one begins with a name."""
    return " ".join(sentence(part.strip()) + "." for part in join_words(ids).split(".") if part)


def make_item(questions: Questions, row: int, column: int, scene: int) -> Item:
    """One entry of a batch of questions as text."""
    options = questions.options[row, column, : questions.num_options[row, column]]
    letter = join_words(questions.answers[row, column])
    return Item(
        scene=scene,
        topic=TOPICS[questions.topic[row, column]],
        form=FORMS[questions.form[row, column]],
        hint=hint_text(questions.hint[row, column]),
        question=sentence(join_words(questions.words[row, column])),
        options=tuple(join_words(option) for option in options),
        answer=letter,
    )


def true_text(item: Item) -> str:
    """The answer in words, for choices too."""
    return item.options["ABCDE".index(item.answer)] if item.options else item.answer


def _caps(quota: Quota) -> tuple[int, int]:
    """Most questions with one answer, and with one true text."""
    if quota.topic in ("presence", "relation", "more") or quota.form == "claim":
        return quota.count // 2, quota.count
    spread = {
        "color": 10, "binding": 10, "neighbor_color": 10, "sign_color": 10, "position": 9,
        "count": MAX_COUNT + 1, "sum": 60, "reading": 500,
    }.get(quota.topic, 30)  # fmt: skip
    slack = 1.0 if spread < 9 else 1.25
    text = max(2, -int(-quota.count * slack // spread))
    if quota.form != "choice":
        return text, text
    if quota.num_options is None:
        return quota.count, quota.count
    return -(-quota.count // quota.num_options), text


def draw_items(
    rng: np.random.Generator, difficulty: Difficulty, quotas: Sequence[Quota], per_scene: int
) -> Draft:
    """Fills all quotas, `per_scene` questions about each scene (fewer about the last ones)."""
    left = [quota.count for quota in quotas]
    total = sum(left)
    used = [(Counter[str](), Counter[str]()) for _ in quotas]
    caps = [_caps(quota) for quota in quotas]
    topics = np.array([TOPICS.index(quota.topic) for quota in quotas])
    forms = np.array([FORMS.index(quota.form) for quota in quotas])
    numbers = sorted({quota.num_options for quota in quotas}, key=lambda n: n or 0)
    items: list[Item] = []
    kept: list[np.ndarray] = []
    for _ in range(_MAX_BATCHES):
        if not any(left):
            break
        uniforms = scene_uniforms(rng, _BATCH)
        layout = sample_layout(uniforms, difficulty)
        shape = (_BATCH, len(quotas))
        asked = rng.random((_BATCH, len(quotas) * UNIFORMS_PER_QUESTION), dtype=np.float32)
        drawn = {
            number: ask_layout(
                layout,
                asked,
                np.broadcast_to(topics, shape),
                np.broadcast_to(forms, shape),
                num_options=number,
            )
            for number in numbers
        }
        for row in range(_BATCH):
            fitting: list[tuple[int, Item]] = []
            # Quotas that are furthest behind come first.
            order = sorted(range(len(quotas)), key=lambda q: -left[q] / quotas[q].count)
            for q in order:
                if not left[q] or len(fitting) == per_scene:
                    continue
                questions = drawn[quotas[q].num_options]
                if questions.topic[row, q] != topics[q]:
                    continue
                item = make_item(questions, row, q, len(kept))
                text = true_text(item)
                if item.topic == "count" and item.form != "claim" and int(text) > MAX_COUNT:
                    continue
                answers, texts = used[q]
                if answers[item.answer] >= caps[q][0] or texts[text] >= caps[q][1]:
                    continue
                if any(item.question == other.question for _, other in fitting):
                    continue
                fitting.append((q, item))
            # The last, rare answers may have a scene for themselves.
            if len(fitting) < (per_scene if 20 * sum(left) > total else 1):
                continue
            for q, item in fitting:
                left[q] -= 1
                used[q][0][item.answer] += 1
                used[q][1][true_text(item)] += 1
                items.append(item)
            kept.append(uniforms[row])
    if any(left):
        short = [f"{quota.topic}: {n}" for quota, n in zip(quotas, left, strict=True) if n]
        raise RuntimeError(f"quotas not filled after {_MAX_BATCHES} batches: {', '.join(short)}")
    return Draft(items=tuple(items), uniforms=np.stack(kept), difficulty=difficulty)
