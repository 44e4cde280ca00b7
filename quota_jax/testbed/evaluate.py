"""Accuracy of a loaded model on fresh drawn scenes, with and without the picture.

Goes through the public path of the library: processor, `generate`, decoding. An answer counts
when its text equals the truth exactly (upper and lower case aside).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from quota_jax.errors import QuotaError
from quota_jax.generation import generate
from quota_jax.recipe import Recipe
from quota_jax.testbed.questions import TYPES
from quota_jax.testbed.scenes import Question, Scene, allowed_types, ask, draw_scenes

MAIN_TYPES: tuple[str, ...] = ("presence", "color", "position")
MAX_ANSWER_TOKENS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """Questions asked and answered correctly of one type."""

    asked: int
    correct: int

    @property
    def percent(self) -> float:
        return 100 * self.correct / self.asked if self.asked else float("nan")


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """A question, the model's text and whether it is right."""

    scene: Scene
    question: Question
    text: str

    @property
    def correct(self) -> bool:
        return self.text.strip().lower() == self.question.answer


def make_items(scenes: int, seed: int, types: Sequence[str]) -> list[tuple[Scene, Question]]:
    """One question of each allowed type about each of `scenes` scenes drawn from `seed`."""
    for name in types:
        if name not in TYPES:
            raise QuotaError(f"unknown question type {name!r}; known: {', '.join(TYPES)}")
    return [
        (scene, ask(scene, seed, type=name))
        for scene in draw_scenes(seed, scenes)
        for name in types
        if name in allowed_types(scene, seed)
    ]


def answer_items(
    vlm: Any,
    items: Sequence[tuple[Scene, Question]],
    *,
    batch_size: int = 16,
    blind: bool = False,
    recipe: Recipe | None = None,
) -> list[Answer]:
    """Greedy answers of `vlm` (what `quota_jax.load` returns); `recipe` None takes the model's own.

    The last batch is filled up with copies of its first item, so every batch has one shape. `blind`
    replaces the normalised picture by zeros.
    """
    if batch_size < 1:
        raise QuotaError(f"batch_size must be at least 1, got {batch_size}")
    answers: list[Answer] = []
    for start in range(0, len(items), batch_size):
        part = list(items[start : start + batch_size])
        filled = part + [part[0]] * (batch_size - len(part))
        batch = vlm.processor(
            images=[[scene.pil] for scene, _ in filled],
            prompts=[question.prompt for _, question in filled],
        )
        if blind:
            batch = dataclasses.replace(batch, pixels=jnp.zeros_like(batch.pixels))
        out = generate(
            vlm.model,
            batch,
            recipe=vlm.recipe if recipe is None else recipe,
            max_new_tokens=MAX_ANSWER_TOKENS,
        )
        texts = vlm.processor.decode(out.tokens, out.lengths)
        answers += [
            Answer(scene=scene, question=question, text=text)
            for (scene, question), text in zip(part, texts, strict=False)
        ]
    return answers


def score(answers: Sequence[Answer]) -> dict[str, Score]:
    """Scores by question type, in the order of TYPES; types never asked are left out."""
    table = {}
    for name in TYPES:
        rows = [answer for answer in answers if answer.question.type == name]
        if rows:
            table[name] = Score(asked=len(rows), correct=sum(row.correct for row in rows))
    return table


def evaluate(
    vlm: Any,
    *,
    scenes: int = 64,
    seed: int = 2026,
    types: Sequence[str] = MAIN_TYPES,
    batch_size: int = 16,
    blind: bool = False,
    recipe: Recipe | None = None,
) -> dict[str, Score]:
    """Accuracy by question type on `scenes` fresh scenes, one question of each type per scene."""
    items = make_items(scenes, seed, types)
    return score(answer_items(vlm, items, batch_size=batch_size, blind=blind, recipe=recipe))
