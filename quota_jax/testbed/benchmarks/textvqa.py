"""TextVQA: read a sign; words outside any list, numbers, letters from 10 pixels."""

from __future__ import annotations

from quota_jax.testbed.benchmarks.drawing import Quota, draw_items
from quota_jax.testbed.benchmarks.family import Bundle, generator, json_bytes
from quota_jax.testbed.world.layout import IMAGE_SIZE, Difficulty

NAME = "textvqa"
COUNT = 1500
DRAWS = 3
"""Readings drawn per picture, of which different questions are kept."""


def build(split: str, limit: int | None) -> Bundle:
    """The family; the first `limit` questions."""
    quotas = [Quota(topic="reading", count=COUNT // DRAWS)] * DRAWS
    draft = draw_items(generator(NAME, split), Difficulty(min_signs=2), quotas, DRAWS)
    data, pictures = [], {}
    for number, item in enumerate(draft.items[:limit]):
        image = f"{item.scene:016x}"
        pictures[f"train_images/{image}.png"] = item.scene
        data.append(
            {
                "question": item.question,
                "image_id": image,
                "image_classes": ["Sign"],
                "flickr_original_url": "",
                "flickr_300k_url": "",
                "image_width": IMAGE_SIZE,
                "image_height": IMAGE_SIZE,
                "answers": [item.answer] * 10,
                # No recognizer has read the pictures: prompts that quote one quote nothing.
                "ocr_tokens": [],
                "question_tokens": item.question.lower().rstrip("?").split(),
                "question_id": 34_602 + number,
                "set_name": "val",
            }
        )
    content = {
        "dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1", "data": data,
    }  # fmt: skip
    return Bundle(
        files={"TextVQA_0.5.1_val.json": json_bytes(content)},
        pictures=pictures,
        uniforms=draft.uniforms,
        difficulty=draft.difficulty,
        questions=len(data),
    )
