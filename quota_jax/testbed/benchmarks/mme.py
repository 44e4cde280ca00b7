"""MME: two questions a picture, one yes and one no about the same thing, by category."""

from __future__ import annotations

from collections import Counter

import numpy as np

from quota_jax.testbed.benchmarks.drawing import MAX_COUNT, make_item, true_text
from quota_jax.testbed.benchmarks.family import Bundle, generator
from quota_jax.testbed.world.layout import Difficulty, sample_layout, scene_uniforms
from quota_jax.testbed.world.questions import CLAIM, OPEN, TOPICS, UNIFORMS_PER_QUESTION, ask_layout

NAME = "mme"
IMAGES = 100
"""Pictures per category; two questions each."""
CATEGORIES: dict[str, tuple[str, ...]] = {
    "existence": ("presence",),
    "count": ("count",),
    "position": ("relation",),
    "color": ("color", "binding"),
    "scene": ("position", "neighbor"),
    "OCR": ("reading",),
    "commonsense_reasoning": ("neighbor_color", "more", "two_hop"),
    "numerical_calculation": ("sum",),
}
"""Official category -> topics, in turn."""
_BATCH = 256
# The coin that decides between yes and no: of claims, and of the topics that are yes/no by nature.
_CLAIM_COIN = 32
_COINS = {"presence": 1, "relation": 9, "more": 15}


def _category(
    category: str, rng: np.random.Generator, difficulty: Difficulty
) -> tuple[list[tuple[str, str]], list[np.ndarray]]:
    """(yes question, no question) of each picture, and the scenes' uniforms."""
    topics = CATEGORIES[category]
    pairs: list[tuple[str, str]] = []
    kept: list[np.ndarray] = []
    used: Counter[str] = Counter()
    while len(pairs) < IMAGES:
        uniforms = scene_uniforms(rng, _BATCH)
        layout = sample_layout(uniforms, difficulty)
        shape = (_BATCH, len(topics))
        index = np.broadcast_to([TOPICS.index(topic) for topic in topics], shape)
        asked = rng.random((*shape, UNIFORMS_PER_QUESTION), dtype=np.float32)
        both = []
        for coin in (0.2, 0.8):
            for column, topic in enumerate(topics):
                asked[:, column, _COINS.get(topic, _CLAIM_COIN)] = coin
            flat = asked.reshape(_BATCH, -1)
            both.append(ask_layout(layout, flat, index, np.full(shape, CLAIM)))
        truth = ask_layout(layout, asked.reshape(_BATCH, -1), index, np.full(shape, OPEN))
        for row in range(_BATCH):
            column = len(pairs) % len(topics)
            if len(pairs) == IMAGES:
                break
            if truth.topic[row, column] != index[row, column]:
                continue
            if topics[column] == "count":
                number = true_text(make_item(truth, row, column, 0))
                if int(number) > MAX_COUNT or used[number] >= -(-IMAGES // (MAX_COUNT + 1)):
                    continue
                used[number] += 1
            two = {
                item.answer: item.question for item in (make_item(q, row, column, 0) for q in both)
            }
            if len(two) != 2:
                continue
            pairs.append((two["yes"], two["no"]))
            kept.append(uniforms[row])
    return pairs, kept


def build(split: str, limit: int | None) -> Bundle:
    """The family; `limit` questions in each category, rounded up to whole pictures."""
    rng = generator(NAME, split)
    images = IMAGES if limit is None else min(IMAGES, -(-limit // 2))
    files: dict[str, bytes] = {}
    pictures: dict[str, int] = {}
    scenes: list[np.ndarray] = []
    difficulty = Difficulty()
    for category in CATEGORIES:
        pairs, kept = _category(category, rng, difficulty)
        for number, (yes, no) in enumerate(pairs[:images]):
            name = f"{number + 1:04d}"
            rows = [f"{yes} Please answer yes or no.\tYes", f"{no} Please answer yes or no.\tNo"]
            if rng.random() < 0.5:
                rows.reverse()
            files[f"{category}/questions_answers_YN/{name}.txt"] = ("\n".join(rows) + "\n").encode()
            pictures[f"{category}/images/{name}.png"] = len(scenes)
            scenes.append(kept[number])
    return Bundle(
        files=files,
        pictures=pictures,
        uniforms=np.stack(scenes),
        difficulty=difficulty,
        questions=2 * len(scenes),
    )
