"""GQA: open questions on attributes, relations and counts, answered by one word."""

from __future__ import annotations

from quota_jax.testbed.benchmarks.drawing import Quota, draw_items
from quota_jax.testbed.benchmarks.family import Bundle, generator, json_bytes
from quota_jax.testbed.world.layout import Difficulty

NAME = "gqa"
PER_PICTURE = 4
QUOTAS = (
    Quota(topic="color", count=120), Quota(topic="binding", count=200),
    Quota(topic="neighbor", count=210), Quota(topic="neighbor_color", count=200),
    Quota(topic="two_hop", count=150), Quota(topic="relation", count=180),
    Quota(topic="more", count=120), Quota(topic="size", count=120),
    Quota(topic="count", count=120), Quota(topic="shape", count=90),
    Quota(topic="sign_color", count=90),
)  # fmt: skip
# Topic -> GQA's structural and semantic types.
_TYPES = {
    "color": ("query", "attr"), "binding": ("query", "attr"), "neighbor": ("query", "rel"),
    "neighbor_color": ("query", "rel"), "two_hop": ("query", "rel"), "relation": ("verify", "rel"),
    "more": ("compare", "obj"), "size": ("choose", "attr"), "count": ("query", "obj"),
    "shape": ("query", "obj"), "sign_color": ("query", "attr"),
}  # fmt: skip


def build(split: str, limit: int | None) -> Bundle:
    """The family; the first `limit` questions."""
    draft = draw_items(generator(NAME, split), Difficulty(), QUOTAS, PER_PICTURE)
    records, pictures = {}, {}
    for number, item in enumerate(draft.items[:limit]):
        image = f"w{item.scene:06d}"
        pictures[f"images/{image}.png"] = item.scene
        structural, semantic = _TYPES[item.topic]
        records[f"{20_000_000 + number}"] = {
            "imageId": image,
            "question": item.question,
            "answer": item.answer,
            "fullAnswer": item.answer,
            "isBalanced": True,
            "groups": {"global": None, "local": None},
            "types": {"structural": structural, "semantic": semantic, "detailed": item.topic},
        }
    return Bundle(
        files={"testdev_balanced_questions.json": json_bytes(records)},
        pictures=pictures,
        uniforms=draft.uniforms,
        difficulty=draft.difficulty,
        questions=len(records),
    )
