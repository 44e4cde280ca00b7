"""MMBench: choices as a table with pictures inside; every question in all rotations of its options.

Rotation r of question i has index i + r * 1 000 000 and the options moved on by r places; a
question counts when all its rows are answered right.
"""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Callable, Mapping

from quota_jax.testbed.benchmarks.drawing import Item, Quota, draw_items
from quota_jax.testbed.benchmarks.family import Bundle, generator
from quota_jax.testbed.world.layout import Difficulty

NAME = "mmbench"
FILE = "mmbench_dev_en.tsv"
PER_PICTURE = 3
ROTATION = 1_000_000
COLUMNS = (
    "index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source",
    "l2-category", "comment", "split",
)  # fmt: skip
# Topic -> category and L2 category, in MMBench's names.
_CATEGORIES = {
    "color": ("attribute_recognition", "finegrained_perception (instance-level)"),
    "binding": ("attribute_recognition", "finegrained_perception (instance-level)"),
    "shape": ("object_localization", "finegrained_perception (instance-level)"),
    "position": ("object_localization", "finegrained_perception (instance-level)"),
    "count": ("object_localization", "finegrained_perception (instance-level)"),
    "reading": ("ocr", "finegrained_perception (instance-level)"),
    "neighbor": ("spatial_relationship", "finegrained_perception (cross-instance)"),
    "neighbor_color": ("attribute_comparison", "finegrained_perception (cross-instance)"),
    "two_hop": ("physical_relation", "relation_reasoning"),
    "sign_neighbor": ("structuralized_imagetext_understanding", "logic_reasoning"),
    "owner_of_color": ("function_reasoning", "attribute_reasoning"),
}
_WEIGHTS = {
    "color": 50, "binding": 50, "shape": 40, "position": 60, "count": 60, "reading": 90,
    "neighbor": 60, "neighbor_color": 60, "two_hop": 50, "sign_neighbor": 40, "owner_of_color": 40,
}  # fmt: skip


def _quotas() -> list[Quota]:
    """Four options for three quarters of the questions, three or two for the rest."""
    quotas = []
    for topic, count in _WEIGHTS.items():
        if topic == "owner_of_color":
            quotas.append(Quota(topic=topic, form="choice", count=count))
            continue
        for options, share in ((4, 0.75), (3, 0.15), (2, 0.1)):
            number = round(count * share)
            quotas.append(Quota(topic=topic, form="choice", count=number, num_options=options))
    return quotas


def _rows(number: int, item: Item) -> list[dict[str, str]]:
    """All rotations of one question; `image` names the picture."""
    options = list(item.options)
    truth = options["ABCDE".index(item.answer)]
    category, l2 = _CATEGORIES[item.topic]
    rows = []
    for turn in range(len(options)):
        turned = options[turn:] + options[:turn]
        letters = dict(zip("ABCD", turned, strict=False))
        row = dict.fromkeys(COLUMNS, "") | letters
        row |= {
            "index": str(number + turn * ROTATION),
            "question": item.question,
            "hint": item.hint,
            "answer": "ABCD"[turned.index(truth)],
            "category": category,
            "image": f"{item.scene:06d}.png",
            "source": "quota_jax world",
            "l2-category": l2,
            "split": "dev",
        }
        rows.append(row)
    return rows


def _table(rows: list[dict[str, str]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, delimiter="\t", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def build(split: str, limit: int | None) -> Bundle:
    """The family; the first `limit` questions with all their rotations."""
    rng = generator(NAME, split)
    # Five owners do not fit the four columns.
    draft = draw_items(rng, Difficulty(min_signs=1), _quotas(), PER_PICTURE)
    items = [item for item in draft.items if len(item.options) <= 4][:limit]
    rows = [row for number, item in enumerate(items) for row in _rows(number, item)]
    # First all first rotations, then all second ones, as the official file has them.
    rows.sort(key=lambda row: int(row["index"]))
    pictures = {row["image"]: int(row["image"].removesuffix(".png")) for row in rows}

    def assemble(picture: Callable[[str], bytes]) -> Mapping[str, bytes]:
        encoded = {name: base64.b64encode(picture(name)).decode() for name in pictures}
        return {FILE: _table([row | {"image": encoded[row["image"]]} for row in rows])}

    return Bundle(
        files={},
        pictures=pictures,
        uniforms=draft.uniforms,
        difficulty=draft.difficulty,
        questions=len(rows),
        assemble=assemble,
        extra_hashed={FILE: _table(rows)},
    )
