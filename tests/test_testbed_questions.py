"""Questions about scenes: an independent reader of their English text confirms every answer."""

from __future__ import annotations

import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quota_jax.errors import QuotaError
from quota_jax.testbed import TYPES, Scene, SceneObject, allowed_types, ask, draw_scenes
from quota_jax.testbed.conversation import caption_turn, compact, turns
from quota_jax.testbed.layout import UNIFORMS_PER_SCENE, Difficulty, sample_layout
from quota_jax.testbed.questions import (
    UNIFORMS_PER_QUESTION,
    ask_layout,
)
from quota_jax.testbed.vocabulary import COLORS, KINDS, WORDS, plural


@pytest.fixture(scope="module")
def scenes() -> tuple[Scene, ...]:
    return draw_scenes(21, 40)


def _matching(scene: Scene, phrase: str) -> list[SceneObject]:
    """Objects that a phrase like "red circle", "circles" or "blue objects" describes."""
    words = phrase.split()
    color = words[0] if words[0] in COLORS else None
    noun = words[-1]
    kinds = [k for k in KINDS if noun in (k, plural(k))]
    assert kinds or noun in ("object", "objects"), phrase
    return [o for o in scene.objects if color in (None, o.color) and (not kinds or o.kind in kinds)]


def _the(scene: Scene, phrase: str) -> SceneObject:
    found = _matching(scene, phrase)
    assert len(found) == 1, f"{phrase!r} is ambiguous: {found}"
    return found[0]


def _beside(side: str, thing: SceneObject, other: SceneObject) -> float:
    """How many pixels `thing` lies on that side of `other`."""
    return {
        "left of": other.x - thing.x,
        "right of": thing.x - other.x,
        "above": other.y - thing.y,
        "below": thing.y - other.y,
    }[side]


def _parts(pattern: str, text: str) -> list[str]:
    found = re.fullmatch(pattern, text)
    assert found, text
    return [text, *found.groups()]


def _truth(scene: Scene, kind: str, text: str) -> str:
    """The answer by reading the question, knowing nothing of how it was made."""
    if kind == "presence":
        phrase = _parts(r"Is there an? (.+?)( in the image)?\?", text)[1]
        return "yes" if _matching(scene, phrase) else "no"
    if kind == "color":
        return _the(scene, _parts(r"What color is the (.+)\?", text)[1]).color
    if kind == "position":
        thing = _the(scene, _parts(r"Where is the (.+)\?", text)[1])
        row = "top" if thing.y < 112 else "middle" if thing.y < 224 else "bottom"
        column = "left" if thing.x < 112 else "center" if thing.x < 224 else "right"
        return f"{row} {column}"
    if kind == "count":
        return str(len(_matching(scene, _parts(r"How many (.+) are there\?", text)[1])))
    if kind == "relation":
        parts = _parts(r"Is the (.+) (left of|right of|above|below) the (.+)\?", text)
        distance = _beside(parts[2], _the(scene, parts[1]), _the(scene, parts[3]))
        assert abs(distance) > 24, "too close to call"
        return "yes" if distance > 0 else "no"
    if kind == "neighbor":
        parts = _parts(r"What is (left of|right of|above|below) the (.+)\?", text)
        other = _the(scene, parts[2])
        across = "left" in parts[1] or "right" in parts[1]
        cone = []
        for thing in scene.objects:
            dx, dy = abs(thing.x - other.x), abs(thing.y - other.y)
            inside = dx >= dy if across else dx < dy
            if thing != other and inside and _beside(parts[1], thing, other) > 24:
                cone.append(thing)
        assert len(cone) == 1, f"{text}: {cone}"
        return cone[0].kind
    if kind == "shape":
        return _the(scene, _parts(r"What is the (\w+ object)\?", text)[1]).kind
    assert kind == "reading"
    assert text == "What does the sign say?"
    assert scene.sign is not None
    return scene.sign.text


@pytest.mark.parametrize("kind", TYPES)
def test_answers_are_true(scenes, kind):
    asked = 0
    for scene in scenes:
        for seed in range(12):
            if kind in allowed_types(scene, seed):
                question = ask(scene, seed, type=kind)
                assert question.type == kind
                assert question.answer == _truth(scene, kind, question.text), question
                asked += 1
    assert asked > 200


def test_text_is_plain_english(scenes):
    for scene in scenes:
        question = ask(scene, 3)
        assert re.fullmatch(r"[A-Z][a-z ]+\?", question.text), question.text
        assert question.prompt == f"USER: <image>\n{question.text} ASSISTANT:"
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", question.text), question.text


def test_same_seed_same_question(scenes):
    assert [ask(s, 5) for s in scenes] == [ask(s, 5) for s in scenes]
    assert [ask(s, 5) for s in scenes] != [ask(s, 6) for s in scenes]


def test_random_type_covers_all_types(scenes):
    assert {ask(s, seed).type for s in scenes for seed in range(8)} == set(TYPES)


def test_reading_needs_a_sign(scenes):
    bare = next(scene for scene in scenes if scene.sign is None)
    assert "reading" not in allowed_types(bare, 0)
    with pytest.raises(QuotaError, match="allows no reading question"):
        ask(bare, 0, type="reading")


def _many(count: int = 3000):
    rng = np.random.default_rng(9)
    uniforms = rng.random((count, UNIFORMS_PER_SCENE), dtype=np.float32)
    layout = sample_layout(uniforms, Difficulty())
    types = np.broadcast_to(np.arange(len(TYPES)), (count, len(TYPES)))
    uniforms = rng.random((count, len(TYPES) * UNIFORMS_PER_QUESTION), dtype=np.float32)
    return layout, uniforms, types


def test_yes_and_no_are_balanced():
    layout, uniforms, types = _many()
    questions = ask_layout(layout, uniforms, types)
    for name in ("presence", "relation"):
        index = TYPES.index(name)
        rows = questions.type[:, index] == index
        yes = questions.answers[rows, index, 0] == WORDS.index("yes")
        assert abs(yes.mean() - 0.5) < 0.03, name


def test_no_answer_dominates():
    layout, uniforms, types = _many()
    questions = ask_layout(layout, uniforms, types)
    limits = {"color": 0.2, "position": 0.2, "count": 0.6, "shape": 0.1, "reading": 0.1}
    for name, limit in limits.items():
        index = TYPES.index(name)
        rows = questions.type[:, index] == index
        answers = Counter(map(tuple, questions.answers[rows, index]))
        assert answers.most_common(1)[0][1] / rows.sum() < limit, name


def test_impossible_types_become_presence_questions():
    layout, uniforms, types = _many(400)
    questions = ask_layout(layout, uniforms, types)
    index = TYPES.index("reading")
    np.testing.assert_array_equal(questions.type[:, index] == 0, ~layout.sign_present)
    assert (questions.words[questions.type == 0][:, 0] == WORDS.index("is")).all()


def test_host_and_device_ask_the_same():
    layout, uniforms, types = _many(64)
    host = ask_layout(layout, uniforms, types, np, 0.2)
    device = jax.jit(lambda scene, u, t: ask_layout(scene, u, t, jnp, 0.2))(layout, uniforms, types)
    for name, first, second in zip(host._fields, host, device, strict=True):
        np.testing.assert_array_equal(first, np.asarray(second), err_msg=name)


def test_training_turns_spell_out_the_conversation():
    layout, uniforms, types = _many(3)
    questions = ask_layout(layout, uniforms, types)
    words, predicted = turns(questions)
    tokens, weights = compact(words, predicted.astype(np.float32), 160)
    text = " ".join(WORDS[t] for t in tokens[0])
    first = " ".join(WORDS[t] for t in questions.words[0, 0] if t >= 0)
    assert text.startswith(first + " assistant: ")
    assert text.count("assistant:") == len(TYPES)
    assert text.count("user:") == len(TYPES) - 1
    targets = [WORDS[t] for t, w in zip(tokens[0], weights[0], strict=True) if w]
    assert targets.count("</s>") == len(TYPES)
    assert "assistant:" not in targets
    for index in range(len(TYPES)):
        answer = [WORDS[t] for t in questions.answers[0, index] if t >= 0]
        assert targets[: len(answer)] == answer
        targets = targets[len(answer) + 1 :]
    assert not targets


def test_caption_lists_every_object_in_reading_order(scenes):
    for scene in scenes[:10]:
        words, predicted = caption_turn(scene.layout)
        tokens, weights = compact(words, predicted.astype(np.float32), 64)
        text = " ".join(WORDS[t] for t, w in zip(tokens[0], weights[0], strict=True) if w)
        entries = [entry.split() for entry in text.removesuffix(" </s>").split(" , ")]
        found = Counter(tuple(entry[:2]) for entry in entries if entry[0] in COLORS)
        assert found == Counter((o.color, o.kind) for o in scene.objects)
        cells = [
            ("top", "middle", "bottom").index(entry[2]) * 3
            + ("left", "center", "right").index(entry[3])
            for entry in entries
            if entry[0] in COLORS
        ]
        assert cells == sorted(cells)
        assert ("sign" in text) == (scene.sign is not None)
