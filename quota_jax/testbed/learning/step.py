"""One training step and one evaluation, and the plan of a run over time.

Everything that changes during a run (learning rate, difficulty, auxiliary weight) is a traced
scalar, so one program per picture size serves the whole run, and the plan follows the clock: any
time limit ends with an annealed model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from quota_jax.config import ModelConfig, QwenVisionConfig, QwenVlConfig
from quota_jax.errors import QuotaError
from quota_jax.testbed import optimizer
from quota_jax.testbed.learning import llava, qwen
from quota_jax.testbed.learning.data import (
    FULL,
    Quiz,
    Text,
    draw_quiz,
    draw_scenes,
    draw_text,
    normalise,
)
from quota_jax.testbed.learning.decoder import text_logits
from quota_jax.testbed.learning.dialect import dialect_of, token_positions
from quota_jax.testbed.learning.layers import Params
from quota_jax.testbed.learning.models import init_params
from quota_jax.testbed.optimizer import OptimizerState, init_optimizer
from quota_jax.testbed.world.layout import EASY, Difficulty, Layout
from quota_jax.testbed.world.renderer import COLOR_NONE, KIND_NONE, patch_labels, render

_EVAL_STREAM = 1_000_000_007


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """What a run is made of.

    sizes: (height, width) of the pictures in pixels, taken in turn from step to step.
    batch_size: pictures per step, each with `num_questions` turns and a caption, in `text_length`
        tokens after the picture.
    anneal_share, curriculum_share: shares of the training time, at its end with a falling learning
        rate, and at its start from easy scenes (flat for the first third) to the full ones.
    suffix_share: how many open questions ask for a short answer, as the benchmarks do.
    hint_share: share of the questions with a hint; None: that of the usual mix.
    start: what the parameters start from, by checksum; "" is a start from scratch.
    attention: "cudnn" (NVIDIA GPU) or "xla".
    """

    model: ModelConfig
    sizes: tuple[tuple[int, int], ...] = ((336, 336),)
    seed: int = 0
    batch_size: int = 64
    num_questions: int = 8
    text_length: int = 382
    learning_rate: float = 1e-3
    warmup_steps: int = 150
    anneal_share: float = 0.35
    curriculum_share: float = 0.1
    aux_weight: float = 1.0
    caption_weight: float = 0.5
    suffix_share: float = 0.85
    hint_share: float | None = None
    start: str = ""
    attention: str = "cudnn"
    dtype: str = "bfloat16"
    eval_scenes: int = 32

    def __post_init__(self) -> None:
        if self.attention not in ("cudnn", "xla"):
            raise QuotaError(f"attention must be 'cudnn' or 'xla', not {self.attention!r}")
        if not 0 < self.anneal_share <= 1:
            raise QuotaError(f"anneal_share must lie in (0, 1], not {self.anneal_share}")
        if self.hint_share is not None and not 0 <= self.hint_share < 1:
            raise QuotaError(f"hint_share must lie in [0, 1), not {self.hint_share}")
        for name in ("batch_size", "num_questions", "eval_scenes"):
            if getattr(self, name) < 1:
                raise QuotaError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.sizes:
            raise QuotaError("at least one picture size is needed")
        for size in self.sizes:
            self._check_size(size)

    def _check_size(self, size: tuple[int, int]) -> None:
        vision = self.model.vision
        if isinstance(self.model, QwenVlConfig):
            edge = self.model.vision.patch_size * self.model.vision.spatial_merge_size
            if any(side < edge or side % edge for side in size):
                raise QuotaError(f"picture size {size}: sides must be multiples of {edge}")
            return
        side = getattr(vision, "image_size", 0)
        if size != (side, side):
            raise QuotaError(f"picture size {size}: this model takes {side} x {side} pixels")


class TrainState(NamedTuple):
    """Model and auxiliary parameters (float32, one flat dictionary) and the optimizer's state."""

    params: Params
    optimizer: OptimizerState


class Knobs(NamedTuple):
    """Traced scalars of one step."""

    learning_rate: Any
    aux_weight: Any
    difficulty: Difficulty


def init_state(config: TrainingConfig, params: Params | None = None) -> TrainState:
    """The first state; ``params`` None: random ones of the configuration's seed."""
    if params is None:
        params = init_params(config.model, config.seed)
    params = {name: jnp.asarray(value) for name, value in params.items()}
    return TrainState(params, init_optimizer(params))


def plan(config: TrainingConfig, step: int, progress: float) -> Knobs:
    """Learning rate and difficulty at a step, ``progress`` (0 to 1) of the training time gone."""
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    left = (1 - progress) / config.anneal_share
    rate = config.learning_rate * warm * min(1.0, max(0.02, left))
    share = progress / max(config.curriculum_share, 1e-9)
    share = min(1.0, max(0.0, (share - 1 / 3) * 1.5))
    mixed = [np.float32(a + (b - a) * share) for a, b in zip(EASY, FULL, strict=True)]
    return Knobs(np.float32(rate), np.float32(config.aux_weight), Difficulty(*mixed))


def forward(
    config: TrainingConfig, params: Params, pixels: Any, tokens: Any, repeats: int = 1
) -> tuple[Any, Any]:
    """Text logits [B * repeats, T, vocab] and patch features [B, P, D] (in the tower's order).

    pixels: normalised [B, 3, H, W]; ``repeats`` consecutive rows of ``tokens`` share a picture.
    """
    model, backend = config.model, config.attention
    size = pixels.shape[2:]
    options: dict[str, Any] = {"dtype": jnp.dtype(config.dtype), "backend": backend}
    if isinstance(model, QwenVlConfig):
        features = qwen.vision_features(params, model, pixels, **options)
        visual = qwen.visual_tokens(params, model, features, size)
    else:
        features = llava.vision_features(params, model, pixels, **options)
        visual = llava.visual_tokens(params, features)
    logits = text_logits(
        params,
        model.text,
        jnp.repeat(visual, repeats, axis=0),
        dialect_of(model).before,
        tokens,
        token_positions(model, size, tokens.shape[1]),
        backend=backend,
    )
    return logits, features


def _cross_entropy(logits: Any, targets: Any) -> Any:
    """Per-position loss; one-hot product, whose gradient does not scatter."""
    logits = logits.astype(jnp.float32)
    chosen = (logits * jax.nn.one_hot(targets, logits.shape[-1])).sum(-1)
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def _mean(values: Any, weights: Any) -> Any:
    return (values * weights).sum() / jnp.maximum(weights.sum(), 1e-6)


def _aux_loss(params: Params, features: Any, labels: Any) -> Any:
    """Patch classification from the vision features: kind, color and, on signs, the letter."""
    kind, color, glyph = labels

    def loss(name: str, target: Any, weights: Any) -> Any:
        weight = params[f"aux.{name}.weight"].astype(features.dtype)
        logits = features @ weight.T + params[f"aux.{name}.bias"]
        return _mean(_cross_entropy(logits, target), weights)

    total = loss("kind", kind, jnp.where(kind == KIND_NONE, 0.15, 1.0))
    total += loss("color", color, jnp.where(color == COLOR_NONE, 0.15, 1.0))
    return total + 0.5 * loss("glyph", jnp.maximum(glyph, 0), (glyph >= 0).astype(jnp.float32))


def _patch_targets(config: TrainingConfig, layout: Layout, size: tuple[int, int]) -> Any:
    """Labels of the patches, in the order in which the tower has them."""
    labels = patch_labels(layout, size)
    vision = config.model.vision
    if not isinstance(vision, QwenVisionConfig):
        return labels
    coordinates = qwen.picture_grid(vision, size).coordinates
    order = coordinates[:, 0] * (size[1] // vision.patch_size) + coordinates[:, 1]
    return tuple(label[:, order] for label in labels)


def loss_fn(
    params: Params,
    config: TrainingConfig,
    pixels: Any,
    text: Text,
    labels: Any,
    aux_weight: Any,
) -> tuple[Any, Any]:
    """Total loss, and (language loss, auxiliary loss); pixels are normalised."""
    logits, features = forward(config, params, pixels, text.tokens)
    language = _mean(_cross_entropy(logits[:, :-1], text.tokens[:, 1:]), text.weights[:, 1:])
    auxiliary = _aux_loss(params, features, labels)
    return language + aux_weight * auxiliary, (language, auxiliary)


def draw(
    config: TrainingConfig, index: Any, size: Any, difficulty: Difficulty
) -> tuple[Layout, Text]:
    """What step ``index`` learns from; seed and step number decide it. ``size`` is traced."""
    scenes, text = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), index))
    layout = draw_scenes(scenes, difficulty, size, count=config.batch_size)
    return layout, draw_text(
        config.model,
        text,
        layout,
        num_questions=config.num_questions,
        text_length=config.text_length,
        caption_weight=config.caption_weight,
        suffix_share=config.suffix_share,
        hint_share=config.hint_share,
    )


def train_step(
    config: TrainingConfig,
    size: tuple[int, int],
    state: TrainState,
    layout: Layout,
    text: Text,
    knobs: Knobs,
) -> tuple[TrainState, Any]:
    """One update; metrics [3]: language loss, auxiliary loss, gradient norm."""
    grads, (language, auxiliary) = jax.grad(loss_fn, has_aux=True)(
        state.params,
        config,
        normalise(render(layout, size)),
        text,
        _patch_targets(config, layout, size),
        knobs.aux_weight,
    )
    params, moments, norm = optimizer.update(
        config.model, state.params, grads, state.optimizer, learning_rate=knobs.learning_rate
    )
    return TrainState(params, moments), jnp.stack([language, auxiliary, norm])


def draw_evaluation(config: TrainingConfig, index: Any, held_out: Any) -> tuple[Layout, Quiz]:
    """Batch ``index`` of `eval_scenes` scenes that training never sees, at full difficulty."""
    key = jax.random.fold_in(jax.random.key(config.seed + _EVAL_STREAM), index)
    scenes, quiz = jax.random.split(key)
    size = jnp.asarray(config.sizes[0], jnp.float32)
    layout = draw_scenes(scenes, FULL, size, count=config.eval_scenes, held_out=held_out)
    return layout, draw_quiz(config.model, quiz, layout)


def answer_step(
    config: TrainingConfig, params: Params, layout: Layout, text: Text, seeing: Any
) -> Any:
    """Bool [scenes, types]: is each question, alone after its picture, answered correctly?

    ``seeing`` 0 replaces the normalised picture by zeros. Correct: every answer token and what
    closes it is the most likely one, which is what greedy decoding needs.
    """
    scenes = layout.x.shape[0]
    pixels = normalise(render(layout, config.sizes[0])) * seeing
    repeats = text.tokens.shape[0] // scenes
    logits, _ = forward(config, params, pixels, text.tokens, repeats=repeats)
    hit = jnp.argmax(logits[:, :-1], -1) == text.tokens[:, 1:]
    return (hit | (text.weights[:, 1:] == 0)).all(-1).reshape(scenes, repeats)
