"""POPE: is an object in the picture? Random, popular and adversarial negatives.

random: an object of a kind that is not in the picture. popular: the same among the kinds most
frequent in the set, for yes and no alike. adversarial: kind and color are both in the picture, but
not together. Two of three questions bind a color in the first two files, all in the third, for yes
and no alike. Six questions a picture, three of them yes.
"""

from __future__ import annotations

import json

import numpy as np

from quota_jax.testbed.benchmarks.family import Bundle, generator
from quota_jax.testbed.scenes import Scene, describe_scene
from quota_jax.testbed.world.facts import find_facts
from quota_jax.testbed.world.layout import Difficulty, sample_layout, scene_uniforms
from quota_jax.testbed.world.vocabulary import COLORS, KINDS

NAME = "pope"
PICTURES = 200
POPULAR_KINDS = 15
FILES = ("random", "popular", "adversarial")


def _phrases(
    scene: Scene, kinds: list[str], file: str, rng: np.random.Generator
) -> list[tuple[str, str]]:
    """Six (phrase, label) of one picture; `kinds` are the popular ones. Empty: scene is unfit."""
    pairs = {(o.color, o.kind) for o in scene.objects}
    here = sorted({kind for _, kind in pairs})
    colors = sorted({color for color, _ in pairs})

    def pick(values: list[str]) -> str:
        return values[int(rng.integers(len(values)))]

    if file == "popular":
        pairs = {(color, kind) for color, kind in pairs if kind in kinds}
        here = [kind for kind in here if kind in kinds]
    if not pairs:
        return []
    bound = [f"{color} {kind}" for color, kind in sorted(pairs)]
    absent = [k for k in (kinds if file == "popular" else KINDS) if k not in here]
    if file == "adversarial":
        crossed = [f"{c} {k}" for c in colors for k in here if (c, k) not in pairs]
        if len(bound) < 3 or len(crossed) < 3:
            return []
        positive = list(rng.permutation(bound)[:3])
        negative = list(rng.permutation(crossed)[:3])
    else:
        if len(bound) < 3 or len(absent) < 3:
            return []
        plain = pick(here)
        others = [phrase for phrase in bound if phrase.split()[1] != plain]
        if len(others) < 2:
            return []
        positive = [plain, *rng.permutation(others)[:2]]
        chosen = list(rng.permutation(absent)[:3])
        negative = [chosen[0], *(f"{pick(list(COLORS))} {kind}" for kind in chosen[1:])]
    labelled = [(str(p), "yes") for p in positive] + [(str(p), "no") for p in negative]
    return [labelled[i] for i in (0, 3, 1, 4, 2, 5)]


def build(split: str, limit: int | None) -> Bundle:
    """The family; `limit` questions in each of the three files."""
    rng = generator(NAME, split)
    difficulty = Difficulty(min_objects=6)
    uniforms = scene_uniforms(rng, 4 * PICTURES)
    layout = sample_layout(uniforms, difficulty)
    frequency = find_facts(layout).kinds.astype(bool).sum(0)
    popular = sorted(KINDS, key=lambda kind: -frequency[KINDS.index(kind)])[:POPULAR_KINDS]
    lines: dict[str, list[str]] = {file: [] for file in FILES}
    pictures: dict[str, int] = {}
    kept = []
    for index, row in enumerate(uniforms):
        if len(kept) == PICTURES:
            break
        scene = describe_scene(layout, index)
        phrases = {file: _phrases(scene, popular, file, rng) for file in FILES}
        if not all(phrases.values()):
            continue
        image = f"COCO_val2014_{len(kept) + 1:012d}.png"
        kept.append(row)
        for file, labelled in phrases.items():
            for phrase, label in labelled:
                if limit is not None and len(lines[file]) >= limit:
                    continue
                pictures[image] = len(kept) - 1
                article = "an" if phrase[0] in "aeiou" else "a"
                record = {
                    "question_id": len(lines[file]) + 1,
                    "image": image,
                    "text": f"Is there {article} {phrase} in the image?",
                    "label": label,
                }
                lines[file].append(json.dumps(record))
    if len(kept) < PICTURES:
        raise RuntimeError(f"only {len(kept)} of {PICTURES} scenes allow every question")
    files = {f"coco_pope_{f}.json": ("\n".join(rows) + "\n").encode() for f, rows in lines.items()}
    return Bundle(
        files=files,
        pictures={f"images/{image}": scene for image, scene in pictures.items()},
        uniforms=np.stack(kept),
        difficulty=difficulty,
        questions=sum(map(len, lines.values())),
    )
