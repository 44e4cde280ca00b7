"""ScienceQA with pictures: choices that need the hint and the picture together."""

from __future__ import annotations

from quota_jax.testbed.benchmarks.drawing import Quota, draw_items, sentence
from quota_jax.testbed.benchmarks.family import Bundle, generator, json_bytes
from quota_jax.testbed.world.layout import Difficulty

NAME = "scienceqa"
PER_PICTURE = 3
QUOTAS = tuple(
    Quota(topic=topic, form="choice", count=520)
    for topic in ("owner_of_color", "owner_of_kind", "person_at")
)


def build(split: str, limit: int | None) -> Bundle:
    """The family; the first `limit` questions."""
    draft = draw_items(generator(NAME, split), Difficulty(min_objects=6), QUOTAS, PER_PICTURE)
    problems, pictures = {}, {}
    for number, item in enumerate(draft.items[:limit]):
        name = str(number + 1)
        pictures[f"images/test/{name}/image.png"] = item.scene
        problems[name] = {
            "question": item.question,
            "choices": [sentence(option) for option in item.options],
            "answer": "ABCDE".index(item.answer),
            "hint": item.hint,
            "image": "image.png",
            "task": "closed choice",
            "grade": "grade1",
            "subject": "natural science",
            "topic": "drawn scenes",
            "category": item.topic,
            "skill": "Combine a rule with a picture",
            "lecture": "",
            "solution": "",
            "split": "test",
        }
    return Bundle(
        files={
            "problems.json": json_bytes(problems),
            "pid_splits.json": json_bytes({"train": [], "val": [], "test": list(problems)}),
        },
        pictures=pictures,
        uniforms=draft.uniforms,
        difficulty=draft.difficulty,
        questions=len(problems),
    )
