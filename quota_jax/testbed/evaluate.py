"""Questions about fresh drawn scenes to a loaded model, and how many it answers correctly.

Goes through the public path of the library: chat template, processor, prefill and decoding. An
answer counts when its text equals the truth exactly, upper and lower case aside.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from PIL import Image

from quota_jax.batch import Batch, Patches
from quota_jax.config import ModelConfig
from quota_jax.errors import QuotaError
from quota_jax.figures.pictures import token_cells
from quota_jax.generation import Cache, decode_chunk, prefill, room_for, start
from quota_jax.recipe import Recipe
from quota_jax.sampling import Sampling
from quota_jax.testbed.samples import SIZES, word_prompt
from quota_jax.testbed.scenes import describe_scene
from quota_jax.testbed.world.layout import (
    UNIFORMS_PER_SCENE,
    Difficulty,
    sample_layout,
)
from quota_jax.testbed.world.questions import (
    FORMS,
    MIX,
    TOPICS,
    UNIFORMS_PER_QUESTION,
    Questions,
    ask_layout,
)
from quota_jax.testbed.world.words import join_words

KINDS: tuple[str, ...] = (
    "presence/open", "count/open", "two_hop/open", "reading/open", "color/open", "position/claim",
    "relation/open", "binding/open", "sign_color/open", "neighbor/open", "reading/choice",
    "more/open", "neighbor_color/choice", "sign_neighbor/open", "size/open", "inventory/choice",
)  # fmt: skip
"""What is asked unless told otherwise: topics and forms of the benchmarks. Left out are the few
that the shipped models never learned (sums, hints)."""
MAX_ANSWER_TOKENS = 8
_STREAM = 41
_KNOWN = tuple(f"{topic}/{form}" for topic, form, _ in MIX)
_PLAIN = np.ones(4)
"""The plainest wording of a prompt (see `prompt_words`)."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Item:
    """A question about picture number `picture`; `kind` is its topic and form.

    question: for people, with the options of a choice. prompt: the user's turn. answer: the truth.
    """

    picture: int
    image: Image.Image
    kind: str
    question: str
    prompt: str
    answer: str


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Answer:
    """A question, the model's text and whether it is right.

    kept: bool [rows, columns], the visual tokens that the last layers still had.
    """

    item: Item
    text: str
    kept: np.ndarray

    @property
    def correct(self) -> bool:
        return self.text.strip().lower() == self.item.answer.lower()


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """Questions asked and answered correctly."""

    asked: int
    correct: int

    @property
    def percent(self) -> float:
        return 100 * self.correct / self.asked if self.asked else float("nan")


def make_items(
    pictures: int,
    seed: int,
    *,
    kinds: Sequence[str] = KINDS,
    questions: int = 4,
    family: str = "llava",
) -> list[Item]:
    """Up to ``questions`` questions about each of ``pictures`` fresh scenes.

    Kinds take turns over the pictures; one that a scene does not allow is passed over there.

    Raises:
        QuotaError: a bad argument.
    """
    for kind in kinds:
        if kind not in _KNOWN:
            raise QuotaError(f"unknown kind of question {kind!r}; known: {', '.join(_KNOWN)}")
    if family not in SIZES:
        raise QuotaError(f"no family {family!r}; known: {', '.join(SIZES)}")
    for name, value, least in (
        ("pictures", pictures, 1), ("questions", questions, 1), ("seed", seed, 0),
    ):  # fmt: skip
        if isinstance(value, bool) or value < least:
            raise QuotaError(f"{name} must be at least {least}, got {value}")
    topics = np.array([[TOPICS.index(kind.split("/")[0]) for kind in kinds]])
    forms = np.array([[FORMS.index(kind.split("/")[1]) for kind in kinds]])
    items, turn = [], 0
    for index in range(pictures):
        rng = np.random.default_rng([_STREAM, seed, index])
        size = SIZES[family][index % len(SIZES[family])]
        uniforms = rng.random((1, UNIFORMS_PER_SCENE), dtype=np.float32)
        layout = sample_layout(uniforms, Difficulty(), size=size)
        uniforms = rng.random((1, len(kinds) * UNIFORMS_PER_QUESTION), dtype=np.float32)
        asked = ask_layout(layout, uniforms, topics, forms)
        allowed = (asked.topic == topics)[0] & (asked.form == forms)[0]
        order = [(turn + place) % len(kinds) for place in range(len(kinds))]
        chosen = [place for place in order if allowed[place]][:questions]
        turn = (turn + questions) % len(kinds)
        image = describe_scene(layout, 0).image() if chosen else None
        for place in chosen:
            assert image is not None
            items.append(
                Item(
                    picture=index,
                    image=image,
                    kind=kinds[place],
                    question=_readable(asked, place),
                    prompt=word_prompt(asked, 0, place, _PLAIN),
                    answer=join_words(asked.answers[0, place]),
                )
            )
    return items


def _readable(questions: Questions, place: int) -> str:
    text = join_words(questions.words[0, place])
    text = text[:1].upper() + text[1:]
    options = questions.options[0, place, : questions.num_options[0, place]]
    named = [
        f"{letter} {join_words(option)}" for letter, option in zip("ABCDE", options, strict=False)
    ]
    return f"{text} {', '.join(named)}" if named else text


def answer_items(
    vlm: Any,
    items: Sequence[Item],
    *,
    batch_size: int = 8,
    blind: bool = False,
    recipe: Recipe | None = None,
    clock: list[float] | None = None,
) -> list[Answer]:
    """Greedy answers of ``vlm`` (what `quota_jax.load` returns).

    All batches have one shape, so one program answers them. ``blind`` replaces the normalised
    pictures by zeros; ``recipe`` None takes the model's own. ``clock`` gets the seconds of each
    batch; the first one's contain the compilation.
    """
    from quota_jax.quant.calibration_data import Sample, make_batches

    if batch_size < 1:
        raise QuotaError(f"batch_size must be at least 1, got {batch_size}")
    samples = [Sample(turns=(item.prompt,), image=item.image) for item in items]
    made = make_batches(vlm.processor, samples, batch_size)
    sampling = Sampling.make(batch_size, stop_ids=vlm.processor.stop_ids, max_new=MAX_ANSWER_TOKENS)
    answers: list[Answer] = []
    for batch, count in zip(made.batches, made.counts, strict=True):
        begun = time.perf_counter()
        logits, cache = prefill(
            vlm.model,
            _blind(batch) if blind else batch,
            recipe=vlm.recipe if recipe is None else recipe,
            max_new_tokens=MAX_ANSWER_TOKENS,
        )
        kept = _kept(vlm.config, batch, cache)
        room = room_for(MAX_ANSWER_TOKENS)
        state = start(logits, cache, sampling, room=room, sampled=False)
        state = decode_chunk(vlm.model, state, jnp.int32(MAX_ANSWER_TOKENS))
        texts = vlm.processor.decode(np.asarray(state.tokens), np.asarray(state.count))
        if clock is not None:
            clock.append(time.perf_counter() - begun)
        part = items[len(answers) : len(answers) + count]
        answers += [
            Answer(item=item, text=text, kept=grid)
            for item, text, grid in zip(part, texts, kept, strict=False)
        ]
    return answers


def _kept(config: ModelConfig, batch: Batch, cache: Cache) -> list[np.ndarray]:
    """For each row the visual tokens left after the last stage, as a map of the picture."""
    grids = []
    for cells, places, count in zip(
        token_cells(config, batch),
        np.asarray(cache.kept_source),
        np.asarray(cache.kept_length),
        strict=True,
    ):
        grid = np.zeros(cells[:, 1:].max(0) + 1, bool)
        left = cells[places[:count]]
        left = left[left[:, 1] >= 0]
        grid[left[:, 1], left[:, 2]] = True
        grids.append(grid)
    return grids


def _blind(batch: Batch) -> Batch:
    if isinstance(batch.pixels, Patches):
        dark = dataclasses.replace(batch.pixels, values=jnp.zeros_like(batch.pixels.values))
    else:
        dark = jnp.zeros_like(batch.pixels)
    return dataclasses.replace(batch, pixels=dark)


def score(answers: Sequence[Answer]) -> Score:
    """All answers together."""
    return Score(asked=len(answers), correct=sum(answer.correct for answer in answers))


def score_by_kind(answers: Sequence[Answer]) -> dict[str, Score]:
    """By kind of question, in the order in which kinds first occur."""
    kinds = dict.fromkeys(answer.item.kind for answer in answers)
    return {kind: score([each for each in answers if each.item.kind == kind]) for kind in kinds}
