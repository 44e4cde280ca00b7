"""Drawn scenes for evaluation, tests and the demo: pictures, exact metadata, questions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from quota_jax.errors import QuotaError
from quota_jax.testbed.layout import (
    UNIFORMS_PER_SCENE,
    Difficulty,
    Layout,
    sample_layout,
)
from quota_jax.testbed.questions import (
    HOLE,
    TYPES,
    UNIFORMS_PER_QUESTION,
    Questions,
    ask_layout,
    sign_words,
)
from quota_jax.testbed.renderer import render_nhwc
from quota_jax.testbed.vocabulary import COLORS, KINDS, WORDS, prompt

_SCENE_STREAM, _QUESTION_STREAM = 11, 12


@dataclass(frozen=True, kw_only=True, slots=True)
class SceneObject:
    """One drawn object; centre and size (edge of its square) in pixels, y down."""

    kind: str
    color: str
    x: float
    y: float
    size: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Sign:
    """The sign of a scene: its text in lower case, centre and letter height in pixels."""

    text: str
    x: float
    y: float
    height: float


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Scene:
    """A picture (uint8 [336, 336, 3]) and what it shows; `layout` is the same with batch size 1."""

    seed: int
    index: int
    image: np.ndarray
    objects: tuple[SceneObject, ...]
    sign: Sign | None
    layout: Layout

    @property
    def pil(self) -> Image.Image:
        """The picture for an image processor."""
        return Image.fromarray(self.image)


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A question in natural English, its type (one of TYPES) and the exact expected answer."""

    type: str
    text: str
    answer: str

    @property
    def prompt(self) -> str:
        """The text a model gets: one picture, this question."""
        return prompt(self.text)


def join_words(ids: np.ndarray) -> str:
    """Words of a row of ids as text: holes skipped, digit pieces and punctuation attached."""
    text = ""
    for index in ids:
        if index == HOLE:
            continue
        word = WORDS[int(index)]
        if word.startswith("##"):
            text += word.removeprefix("##")
        elif word in (".", ",", "?") or not text:
            text += word
        else:
            text += " " + word
    return text


def _sentence(ids: np.ndarray) -> str:
    text = join_words(ids)
    return text[:1].upper() + text[1:]


def _seed(seed: int) -> int:
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise QuotaError(f"seed must be an integer of at least 0, got {seed!r}")
    return int(seed)


def _scene(seed: int, index: int, difficulty: Difficulty) -> Scene:
    rng = np.random.default_rng([_SCENE_STREAM, seed, index])
    layout = sample_layout(rng.random((1, UNIFORMS_PER_SCENE), dtype=np.float32), difficulty)
    objects = tuple(
        SceneObject(
            kind=KINDS[layout.kind[0, i]],
            color=COLORS[layout.color[0, i]],
            x=float(layout.x[0, i]),
            y=float(layout.y[0, i]),
            size=float(layout.size[0, i]),
        )
        for i in np.flatnonzero(layout.present[0])
    )
    sign = None
    if layout.sign_present[0]:
        sign = Sign(
            text=join_words(sign_words(layout)[0]),
            x=float(layout.sign_x[0]),
            y=float(layout.sign_y[0]),
            height=float(layout.sign_height[0]),
        )
    image = np.array(render_nhwc(layout)[0])
    return Scene(seed=seed, index=index, image=image, objects=objects, sign=sign, layout=layout)


def draw_scenes(
    seed: int, count: int, *, difficulty: Difficulty | None = None
) -> tuple[Scene, ...]:
    """`count` scenes of a seed, by default of the distribution the small models were trained on.

    Scene i depends on (seed, i) alone. Metadata are the same everywhere; pixels on one platform.
    """
    seed = _seed(seed)
    if count < 0:
        raise QuotaError(f"the number of scenes must be at least 0, got {count!r}")
    difficulty = Difficulty() if difficulty is None else difficulty
    return tuple(_scene(seed, index, difficulty) for index in range(count))


def ask(scene: Scene, seed: int, *, type: str | None = None) -> Question:
    """One question about a scene.

    Without `type` it is drawn from those that the scene allows (a scene without a sign has
    nothing to read); a type the scene does not allow, or an unknown one, is a QuotaError.
    """
    if type is not None and type not in TYPES:
        raise QuotaError(f"unknown question type {type!r}; known: {', '.join(TYPES)}")
    rng, questions, allowed = _questions(scene, seed)
    chosen = allowed[int(rng.integers(len(allowed)))] if type is None else type
    if chosen not in allowed:
        raise QuotaError(f"scene {scene.index} of seed {scene.seed} allows no {type} question")
    index = TYPES.index(chosen)
    return Question(
        type=chosen,
        text=_sentence(questions.words[0, index]),
        answer=join_words(questions.answers[0, index]),
    )


def allowed_types(scene: Scene, seed: int) -> tuple[str, ...]:
    """The question types that `ask(scene, seed, type=...)` has an answer for."""
    return _questions(scene, seed)[2]


def _questions(scene: Scene, seed: int) -> tuple[np.random.Generator, Questions, tuple[str, ...]]:
    """One question per type about a scene, which types are allowed, and the generator's rest."""
    rng = np.random.default_rng([_QUESTION_STREAM, _seed(seed), scene.seed, scene.index])
    uniforms = rng.random((1, len(TYPES) * UNIFORMS_PER_QUESTION), dtype=np.float32)
    questions = ask_layout(scene.layout, uniforms, np.arange(len(TYPES))[None])
    allowed = tuple(name for i, name in enumerate(TYPES) if questions.possible[0, i, i])
    return rng, questions, allowed
