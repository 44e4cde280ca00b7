"""World questions: an independent reader of their English confirms every answer."""

from __future__ import annotations

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from world_truth import truth

from quota_jax.testbed.benchmarks.drawing import hint_text, make_item, true_text
from quota_jax.testbed.scenes import describe_scene
from quota_jax.testbed.world.conversation import (
    caption_turn,
    compact,
    prompt_words,
    turns,
)
from quota_jax.testbed.world.layout import Difficulty, sample_layout, scene_uniforms
from quota_jax.testbed.world.questions import (
    FORMS,
    MIX,
    TOPICS,
    UNIFORMS_PER_QUESTION,
    ask_layout,
    draw_requests,
)
from quota_jax.testbed.world.vocabulary import COLORS, ID, UNK, WORDS, build_tokenizer
from quota_jax.testbed.world.words import HOLE, join_words

SCENES = 240
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def _ask(count: int, form: int, *, seed: int = 5, size=(336, 336), num_options=None):
    rng = np.random.default_rng(seed)
    layout = sample_layout(scene_uniforms(rng, count), Difficulty(number_share=0.6), size=size)
    topics = np.broadcast_to(np.arange(len(TOPICS)), (count, len(TOPICS)))
    uniforms = rng.random((count, len(TOPICS) * UNIFORMS_PER_QUESTION), dtype=np.float32)
    forms = np.full(topics.shape, form)
    return layout, ask_layout(layout, uniforms, topics, forms, num_options=num_options)


@pytest.mark.parametrize("form", range(len(FORMS)))
def test_answers_are_true(form):
    size = [(336, 336), (224, 448), (504, 336)][form]
    layout, questions = _ask(SCENES, form, size=size)
    asked: Counter[tuple[str, str]] = Counter()
    for row in range(SCENES):
        scene = describe_scene(layout, row)
        for column in range(len(TOPICS)):
            item = make_item(questions, row, column, row)
            answer = truth(scene, item.question, item.hint, item.options)
            assert item.answer == answer, (item, scene.objects, scene.signs)
            asked[item.topic, item.form] += 1
            assert (item.topic == TOPICS[column]) == questions.possible[row, column, column] or (
                item.topic == "presence"
            )
    for topic, wanted, _ in MIX:
        if FORMS.index(wanted) == form:
            assert asked[topic, wanted] > 20, (topic, wanted, asked)


def test_answers_are_balanced():
    for form in range(len(FORMS)):
        _, questions = _ask(1200, form, seed=6)
        for index, name in enumerate(TOPICS):
            rows = np.flatnonzero(questions.topic[:, index] == index)
            answers = Counter(
                (int(questions.num_options[i, index]), join_words(questions.answers[i, index]))
                for i in rows
            )
            yes, no = answers[0, "yes"], answers[0, "no"]
            if yes + no > 300:
                assert abs(yes - no) / (yes + no) < 0.14, (name, FORMS[form], yes, no)
            if questions.num_options[rows].any():
                for letters in range(2, 6):
                    counts = [answers[letters, letter] for letter in "ABCDE"[:letters]]
                    spread = 5 * (sum(counts) / letters) ** 0.5 + 1
                    assert max(counts) - min(counts) <= spread + 1, (name, counts)
            if name in ("color", "neighbor_color", "binding") and form == 0:
                assert max(answers.values()) < 1.5 * len(rows) / len(COLORS)


def test_no_option_of_a_reading_stands_out():
    """The truth is no more alike to the other options than they are to one another."""
    _, questions = _ask(1200, 2, seed=8, num_options=4)
    hits = total = 0.0
    index = TOPICS.index("reading")
    for row in map(int, np.flatnonzero(questions.topic[:, index] == index)):
        item = make_item(questions, row, index, row)
        words = [option.ljust(6) for option in item.options]
        likeness = [
            sum(a == b for other in words for a, b in zip(word, other, strict=True))
            for word in words
        ]
        best = [i for i, value in enumerate(likeness) if value == max(likeness)]
        hits += (words.index(true_text(item).ljust(6)) in best) / len(best)
        total += 1
    assert 0.2 < hits / total < 0.3


def test_host_and_device_ask_the_same_and_training_tokens_are_what_prompts_give():
    """Every topic and form: jitted, spelled out as turns, and through the tokenizer."""
    rng = np.random.default_rng(3)
    batch, count = 64, 6
    inputs = (
        scene_uniforms(rng, batch),
        rng.random((batch, count), dtype=np.float32),
        rng.random((batch, count * UNIFORMS_PER_QUESTION), dtype=np.float32),
        rng.random((batch, count, 4), dtype=np.float32),
    )

    def make(scenes, mix, asked, variant, difficulty, xp):
        layout = sample_layout(scenes, difficulty, xp)
        topics, forms = draw_requests(mix, xp)
        questions = ask_layout(layout, asked, topics, forms, xp)
        prompts = prompt_words(questions, variant, xp, 0.7)
        words, predicted = turns(prompts, questions.answers, xp)
        caption, caption_predicted = caption_turn(layout, xp)
        tokens, weights = compact(
            xp.concatenate([words, caption], axis=1),
            xp.concatenate([predicted, caption_predicted], axis=1).astype(np.float32),
            400,
            xp,
        )
        return layout, questions, prompts, tokens, weights

    host = make(*inputs, Difficulty(), np)
    # The difficulty is traced; the program runs once, so it is not worth optimizing.
    device = jax.jit(lambda a, b, c, d, e: make(a, b, c, d, e, jnp), compiler_options=QUICK)(
        *inputs, Difficulty(*map(np.float32, Difficulty()))
    )
    for first, second in zip(jax.tree.leaves(host), jax.tree.leaves(device), strict=True):
        if np.asarray(first).dtype == np.float32:
            np.testing.assert_allclose(first, second, rtol=1e-5, atol=1e-3)
        else:
            np.testing.assert_array_equal(first, second)

    layout, questions, prompts, tokens, weights = host
    tokenizer = build_tokenizer()
    several = [ID[w] for w in ("there", "are", "several", "options", ":")]
    for row in range(batch):
        for column in range(count):
            item = make_item(questions, row, column, row)
            ids = [int(i) for i in prompts[row, column] if i != HOLE]
            text = join_words(prompts[row, column])
            assert tokenizer.encode(text, add_special_tokens=False).ids == ids, text
            options = (f"{a}. {b}" for a, b in zip("ABCDE", item.options, strict=False))
            written = tokenizer.encode("\n".join([item.question, *options])).ids[1:]
            rest = ids[ids.index(ID["."]) if item.hint else 0 :]
            assert _contains(_without(rest, several), written), (text, item)
            hint = tokenizer.encode(
                hint_text(questions.hint[row, column]), add_special_tokens=False
            )
            assert hint.ids == [i for i in questions.hint[row, column] if i != HOLE]
            assert ID[UNK] not in ids
        targets = [WORDS[t] for t, w in zip(tokens[row], weights[row], strict=True) if w]
        assert targets.count("</s>") == count + 1
        assert "assistant:" not in targets
        caption = " ".join(targets)[" ".join(targets)[:-5].rindex("</s>") + 5 :]
        scene = describe_scene(layout, row)
        assert caption.count(",") == len(scene.objects) + len(scene.signs)
        for o in scene.objects:
            assert f"{o.color} {o.kind} " in caption


def _contains(ids: list[int], part: list[int]) -> bool:
    return any(ids[start : start + len(part)] == part for start in range(len(ids)))


def _without(ids: list[int], part: list[int]) -> list[int]:
    """ids with the first occurrence of part cut out."""
    for start in range(len(ids) - len(part) + 1):
        if ids[start : start + len(part)] == part:
            return ids[:start] + ids[start + len(part) :]
    return ids
