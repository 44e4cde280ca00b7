"""SEED-Bench, image part: four choices, question types 1 to 9."""

from __future__ import annotations

from quota_jax.testbed.benchmarks.drawing import Quota, draw_items
from quota_jax.testbed.benchmarks.family import Bundle, generator, json_bytes
from quota_jax.testbed.world.layout import Difficulty

NAME = "seedbench"
PER_PICTURE = 3
QUESTION_TYPES: dict[str, int] = {
    "Scene Understanding": 1, "Instance Identity": 2, "Instance Attributes": 3,
    "Instance Location": 4, "Instances Counting": 5, "Spatial Relation": 6,
    "Instance Interaction": 7, "Visual Reasoning": 8, "Text Understanding": 9,
    "Action Recognition": 10, "Action Prediction": 11, "Procedure Understanding": 12,
}  # fmt: skip
# Topic -> question type and number of questions.
_TOPICS = {
    "inventory": (1, 160), "shape": (2, 152), "color": (3, 80), "binding": (3, 100),
    "position": (4, 172), "count": (5, 172), "neighbor": (6, 180), "two_hop": (7, 180),
    "neighbor_color": (8, 100), "sign_neighbor": (8, 60), "sign_color": (9, 60),
    "reading": (9, 164),
}  # fmt: skip


def build(split: str, limit: int | None) -> Bundle:
    """The family; the first `limit` questions."""
    quotas = [
        Quota(topic=topic, form="choice", count=count, num_options=4)
        for topic, (_, count) in _TOPICS.items()
    ]
    draft = draw_items(generator(NAME, split), Difficulty(min_signs=1), quotas, PER_PICTURE)
    questions, pictures = [], {}
    for number, item in enumerate(draft.items[:limit]):
        image = f"{item.scene:06d}.png"
        pictures[f"SEED-Bench-image/{image}"] = item.scene
        options = dict(zip("abcd", item.options, strict=True))
        questions.append(
            {
                "answer": item.answer,
                **{f"choice_{letter}": text for letter, text in options.items()},
                "data_id": image,
                "data_type": "image",
                "question": item.question,
                "question_id": f"{101_000 + number}",
                "question_type_id": _TOPICS[item.topic][0],
            }
        )
    content = {"questions": questions, "question_type": QUESTION_TYPES}
    return Bundle(
        files={"SEED-Bench.json": json_bytes(content)},
        pictures=pictures,
        uniforms=draft.uniforms,
        difficulty=draft.difficulty,
        questions=len(questions),
    )
