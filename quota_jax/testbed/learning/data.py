"""What a step draws: fresh scenes and conversations about them.

The size of the pictures is traced here, so that one program serves all sizes; drawing the pixels is
part of the training step, which has a program for each size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from quota_jax.config import ModelConfig
from quota_jax.testbed.learning.dialect import dialect_of, write_turns
from quota_jax.testbed.world.conversation import caption_turn, prompt_words, turns
from quota_jax.testbed.world.layout import (
    HELD_OUT,
    UNIFORMS_PER_SCENE,
    Difficulty,
    Layout,
    sample_layout,
)
from quota_jax.testbed.world.questions import (
    FORMS,
    MIX,
    TOPICS,
    UNIFORMS_PER_QUESTION,
    ask_layout,
    draw_requests,
)

FULL = Difficulty()
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)[:, None, None]
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)[:, None, None]
QUESTION_TYPES: tuple[str, ...] = tuple(f"{topic}/{form}" for topic, form, _ in MIX)
"""What is evaluated: each topic in each form that training draws."""
_TYPE_TOPICS = np.array([TOPICS.index(topic) for topic, *_ in MIX], np.int32)
_TYPE_FORMS = np.array([FORMS.index(form) for _, form, _ in MIX], np.int32)
QUIZ_TEXT_LENGTH = 100
"""Holds the longest single question with its answer, in both dialects."""


class Text(NamedTuple):
    """What follows the picture: tokens [B, T], and the weights of the tokens as targets."""

    tokens: Any
    weights: Any


class Quiz(NamedTuple):
    """One question of each type about each of S scenes, as S * types rows of text.

    asked [S, types]: whether the scene allows that question; answers [S, types, slots].
    """

    text: Text
    asked: Any
    answers: Any


def normalise(pixels: Any) -> Any:
    """uint8 pictures [B, 3, H, W] as the processors of both families normalise them; float32."""
    return (pixels.astype(jnp.float32) * (1 / 255) - MEAN) / STD


def draw_scenes(
    key: Any, difficulty: Difficulty, size: Any, *, count: int, held_out: Any = False
) -> Layout:
    """Scenes for pictures of ``size`` (height, width; traced); ``held_out`` (traced) draws them in
    the style that training never shows."""
    layout = sample_layout(
        jax.random.uniform(key, (count, UNIFORMS_PER_SCENE)), difficulty, jnp, size=size
    )
    return layout._replace(
        style=jnp.where(held_out, HELD_OUT, layout.style),
        contrast=jnp.where(held_out, 1.0, layout.contrast),
    )


def draw_text(
    config: ModelConfig,
    key: Any,
    layout: Layout,
    *,
    num_questions: int,
    text_length: int,
    caption_weight: float,
    suffix_share: float,
    hint_share: float | None = None,
) -> Text:
    """Question turns, and a caption as the last turn: first, it would answer them all."""
    keys = jax.random.split(key, 3)
    shape = layout.x.shape[0], num_questions
    topics, forms = draw_requests(jax.random.uniform(keys[0], shape), jnp, hint_share)
    uniforms = jax.random.uniform(keys[1], (shape[0], num_questions * UNIFORMS_PER_QUESTION))
    questions = ask_layout(layout, uniforms, topics, forms, jnp)
    prompts = prompt_words(questions, jax.random.uniform(keys[2], (*shape, 4)), jnp, suffix_share)
    words, predicted = turns(prompts, questions.answers, jnp)
    caption, caption_predicted = caption_turn(layout, jnp)
    weights = [predicted.astype(jnp.float32), caption_predicted * caption_weight]
    return Text(
        *write_turns(
            dialect_of(config),
            jnp.concatenate([words, caption], axis=1),
            jnp.concatenate(weights, axis=1),
            text_length,
        )
    )


def draw_quiz(config: ModelConfig, key: Any, layout: Layout) -> Quiz:
    """One question of each type, worded as the benchmarks word it."""
    keys = jax.random.split(key, 2)
    shape = layout.x.shape[0], len(QUESTION_TYPES)
    topics, forms = (
        jnp.broadcast_to(jnp.asarray(values), shape) for values in (_TYPE_TOPICS, _TYPE_FORMS)
    )
    uniforms = jax.random.uniform(keys[0], (shape[0], shape[1] * UNIFORMS_PER_QUESTION))
    questions = ask_layout(layout, uniforms, topics, forms, jnp)
    prompts = prompt_words(questions, jax.random.uniform(keys[1], (*shape, 4)), jnp)
    alone = prompts.reshape(-1, 1, prompts.shape[-1])
    answers = questions.answers.reshape(-1, 1, questions.answers.shape[-1])
    words, predicted = turns(alone, answers, jnp)
    text = write_turns(dialect_of(config), words, predicted.astype(jnp.float32), QUIZ_TEXT_LENGTH)
    asked = (questions.topic == topics) & (questions.form == forms)
    return Quiz(Text(*text), asked, questions.answers)
