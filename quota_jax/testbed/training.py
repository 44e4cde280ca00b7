"""Training of the small LLaVA: loss, jitted step that draws its own data, evaluation, time plan.

Everything that changes during a run (learning rate, difficulty, auxiliary weight) is a traced
scalar, so one compiled step serves the whole run, and the plan follows the wall clock: any time
limit ends with an annealed model.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from quota_jax.config import LlavaConfig
from quota_jax.testbed import optimizer
from quota_jax.testbed.conversation import caption_turn, compact, turns
from quota_jax.testbed.layout import UNIFORMS_PER_SCENE, Difficulty, sample_layout
from quota_jax.testbed.questions import (
    TYPES,
    UNIFORMS_PER_QUESTION,
    ask_layout,
)
from quota_jax.testbed.renderer import COLOR_NONE, KIND_NONE, patch_labels, render
from quota_jax.testbed.training_model import (
    MEAN,
    STD,
    Params,
    init_aux,
    init_params,
    text_logits,
    vision_features,
)

TEXT_LENGTH = 126
"""Text tokens per training sequence: with 2 + 576 before them, 704."""
EVAL_TEXT_LENGTH = 26
EASY = Difficulty(1, 3, 70.0, 104.0, 34.0, 44.0)
FULL = Difficulty()
_EVAL_STREAM = 1_000_000_007


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """What a run is made of; times are wall-clock seconds.

    batch_size: pictures per step, each with `num_questions` turns and one caption.
    anneal_share: share of the training time, at its end, in which the learning rate falls linearly.
    curriculum_seconds: time from easy scenes (flat for the first third) to the full distribution.
    attention: "cudnn" (NVIDIA GPU) or "xla".
    """

    model: LlavaConfig
    seed: int = 0
    batch_size: int = 64
    num_questions: int = 7
    learning_rate: float = 1e-3
    warmup_steps: int = 150
    anneal_share: float = 0.35
    curriculum_seconds: float = 20.0
    aux_weight: float = 1.0
    caption_weight: float = 0.5
    suffix_share: float = 0.1
    attention: str = "cudnn"
    dtype: str = "bfloat16"
    eval_scenes: int = 64

    def __post_init__(self) -> None:
        if self.attention not in ("cudnn", "xla"):
            raise ValueError(f"attention must be 'cudnn' or 'xla', not {self.attention!r}")
        if not 0 < self.anneal_share <= 1:
            raise ValueError(f"anneal_share must lie in (0, 1], not {self.anneal_share}")


class TrainState(NamedTuple):
    """Model and auxiliary parameters (float32, one flat dictionary) and the optimizer's state."""

    params: Params
    optimizer: optimizer.OptimizerState


class Knobs(NamedTuple):
    """Traced scalars of one step."""

    learning_rate: Any
    aux_weight: Any
    difficulty: Difficulty


class TrainingBatch(NamedTuple):
    """pixels uint8 [B, 3, 336, 336]; tokens, target weights [B, T]; 3 patch labels [B, 576]."""

    pixels: Any
    tokens: Any
    weights: Any
    labels: Any


def init_state(config: TrainingConfig) -> TrainState:
    params = init_params(config.model, config.seed) | init_aux(config.model)
    params = {name: jnp.asarray(value) for name, value in params.items()}
    return TrainState(params, optimizer.init_optimizer(params))


def draw_batch(config: TrainingConfig, key: Any, difficulty: Difficulty) -> TrainingBatch:
    """Fresh scenes with sequential question turns and a caption at the end."""
    scene_key, ask_key, type_key = jax.random.split(key, 3)
    batch, count = config.batch_size, config.num_questions
    layout = sample_layout(
        jax.random.uniform(scene_key, (batch, UNIFORMS_PER_SCENE)), difficulty, jnp
    )
    types = jax.random.randint(type_key, (batch, count), 0, len(TYPES))
    uniforms = jax.random.uniform(ask_key, (batch, count * UNIFORMS_PER_QUESTION))
    questions = ask_layout(layout, uniforms, types, jnp, config.suffix_share)
    words, predicted = turns(questions, jnp)
    caption, caption_predicted = caption_turn(layout, jnp)
    weights = [predicted.astype(jnp.float32), caption_predicted * config.caption_weight]
    tokens, weights = compact(
        jnp.concatenate([words, caption], axis=1),
        jnp.concatenate(weights, axis=1),
        TEXT_LENGTH,
        jnp,
    )
    return TrainingBatch(render(layout), tokens, weights, patch_labels(layout))


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
        return _mean(
            _cross_entropy(features @ weight.T + params[f"aux.{name}.bias"], target), weights
        )

    total = loss("kind", kind, jnp.where(kind == KIND_NONE, 0.15, 1.0))
    total += loss("color", color, jnp.where(color == COLOR_NONE, 0.15, 1.0))
    return total + 0.5 * loss("glyph", jnp.maximum(glyph, 0), (glyph >= 0).astype(jnp.float32))


def loss_fn(
    params: Params, config: TrainingConfig, batch: TrainingBatch, aux_weight: Any
) -> tuple[Any, Any]:
    """Total loss, and (language loss, auxiliary loss)."""
    features = vision_features(
        params, config.model, batch.pixels, dtype=jnp.dtype(config.dtype), backend=config.attention
    )
    logits = text_logits(params, config.model, features, batch.tokens, backend=config.attention)
    language = _mean(_cross_entropy(logits[:, :-1], batch.tokens[:, 1:]), batch.weights[:, 1:])
    auxiliary = _aux_loss(params, features, batch.labels)
    return language + aux_weight * auxiliary, (language, auxiliary)


def train_step(
    config: TrainingConfig, state: TrainState, index: Any, knobs: Knobs
) -> tuple[TrainState, Any]:
    """One update on fresh scenes; metrics [3]: language loss, auxiliary loss, gradient norm."""
    key = jax.random.fold_in(jax.random.key(config.seed), index)
    batch = draw_batch(config, key, knobs.difficulty)
    grads, (language, auxiliary) = jax.grad(loss_fn, has_aux=True)(
        state.params, config, batch, knobs.aux_weight
    )
    params, moments, norm = optimizer.update(
        config.model, state.params, grads, state.optimizer, learning_rate=knobs.learning_rate
    )
    return TrainState(params, moments), jnp.stack([language, auxiliary, norm])


def eval_step(
    config: TrainingConfig, params: Params, index: Any, seeing: Any
) -> tuple[Any, Any, Any]:
    """One question of each type on `eval_scenes` unseen scenes, alone after the picture.

    `seeing` 0 replaces the normalised picture by zeros. Correct: every answer token and the closing
    `</s>` is the most likely one, which is what greedy decoding needs. Returns bool correct and
    asked [scenes, types], and the answers.
    """
    key = jax.random.fold_in(jax.random.key(config.seed + _EVAL_STREAM), index)
    scene_key, ask_key = jax.random.split(key)
    scenes, count = config.eval_scenes, len(TYPES)
    layout = sample_layout(jax.random.uniform(scene_key, (scenes, UNIFORMS_PER_SCENE)), FULL, jnp)
    types = jnp.broadcast_to(jnp.arange(count), (scenes, count))
    uniforms = jax.random.uniform(ask_key, (scenes, count * UNIFORMS_PER_QUESTION))
    questions = ask_layout(layout, uniforms, types, jnp)
    single = jax.tree.map(lambda x: x.reshape(scenes * count, 1, *x.shape[2:]), questions)
    tokens, weights = compact(*turns(single, jnp), EVAL_TEXT_LENGTH, jnp)
    pixels = render(layout).astype(jnp.float32) * (1 / 255)
    pixels = (pixels - MEAN[:, None, None]) / STD[:, None, None] * seeing
    dtype = jnp.dtype(config.dtype)
    features = vision_features(params, config.model, pixels, dtype=dtype, backend=config.attention)
    features = jnp.repeat(features, count, axis=0)
    logits = text_logits(params, config.model, features, tokens, backend=config.attention)
    hit = (jnp.argmax(logits[:, :-1], -1) == tokens[:, 1:]) | (weights[:, 1:] == 0)
    correct = hit.all(-1).reshape(scenes, count)
    return correct, questions.type == types, questions.answers


def majority(answers: np.ndarray, asked: np.ndarray) -> dict[str, float]:
    """Accuracy of always giving the commonest answer of a type, in percent."""
    table = {}
    for index, name in enumerate(TYPES):
        rows = answers[asked[:, index], index]
        counts = np.unique(rows, axis=0, return_counts=True)[1]
        table[name] = 100 * counts.max() / max(len(rows), 1) if len(rows) else 0.0
    return table


def time_knobs(config: TrainingConfig, step: int, elapsed: float, budget: float) -> Knobs:
    """Learning rate and difficulty at `elapsed` of `budget` seconds of training."""
    warm = min(1.0, (step + 1) / config.warmup_steps)
    left = (budget - elapsed) / (config.anneal_share * budget)
    rate = config.learning_rate * warm * min(1.0, max(0.02, left))
    share = elapsed / max(config.curriculum_seconds, 1e-9)
    share = min(1.0, max(0.0, (share - 1 / 3) * 1.5))
    mixed = [np.float32(a + (b - a) * share) for a, b in zip(EASY, FULL, strict=True)]
    return Knobs(np.float32(rate), np.float32(config.aux_weight), Difficulty(*mixed))


class Trainer:
    """Compiled step and evaluation of one configuration, and the loop around them."""

    def __init__(self, config: TrainingConfig) -> None:
        """Compiles both programs side by side (about half a minute on a GPU)."""
        self.config = config
        self.state = init_state(config)
        self.steps = 0
        knobs = time_knobs(config, 0, 0.0, 1.0)
        step = jax.jit(lambda s, i, k: train_step(config, s, i, k), donate_argnums=0)
        evaluate = jax.jit(lambda p, i, s: eval_step(config, p, i, s))
        with ThreadPoolExecutor(2) as pool:
            jobs = (
                pool.submit(lambda: step.lower(self.state, np.int32(0), knobs).compile()),
                pool.submit(
                    lambda: evaluate.lower(self.state.params, np.int32(0), np.float32(1)).compile()
                ),
            )
            self._step, self._evaluate = (job.result() for job in jobs)

    def step(self, elapsed: float, budget: float) -> Any:
        """One update; returns the metrics without waiting for them."""
        knobs = time_knobs(self.config, self.steps, elapsed, budget)
        self.state, metrics = self._step(self.state, np.int32(self.steps), knobs)
        self.steps += 1
        return metrics

    def evaluate(
        self, batches: int, *, seeing: bool = True
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Accuracy and majority-answer accuracy in percent by question type."""
        results = [
            self._evaluate(self.state.params, np.int32(i), np.float32(seeing))
            for i in range(batches)
        ]
        correct, asked, answers = (
            np.concatenate([np.asarray(r[k]) for r in results]) for k in range(3)
        )
        accuracy = {
            name: 100 * float((correct & asked)[:, i].sum()) / max(int(asked[:, i].sum()), 1)
            for i, name in enumerate(TYPES)
        }
        return accuracy, majority(answers, asked)

    def run(
        self,
        seconds: float,
        *,
        max_steps: int | None = None,
        log: Callable[[str], None],
        log_seconds: float = 10.0,
        eval_seconds: float = 30.0,
    ) -> list[dict[str, Any]]:
        """Train for `seconds` of wall clock (or `max_steps`); returns the curve of evaluations.

        At most two steps are in flight, so the clock is that of the device.
        """
        begin = time.monotonic()
        flying: deque[Any] = deque()
        recent: list[np.ndarray] = []
        curve: list[dict[str, Any]] = []
        next_log, next_eval, logged_step, logged_at = log_seconds, eval_seconds, self.steps, 0.0
        while True:
            elapsed = time.monotonic() - begin
            if elapsed >= seconds or (max_steps is not None and self.steps >= max_steps):
                break
            flying.append(self.step(elapsed, seconds))
            if len(flying) > 2:
                recent.append(np.asarray(flying.popleft()))
                if not np.isfinite(recent[-1]).all():
                    raise FloatingPointError(f"metrics {recent[-1]} at step {self.steps}")
            if elapsed >= next_log and recent:
                mean = np.mean(recent, axis=0)
                pace = 1000 * (elapsed - logged_at) / max(self.steps - logged_step, 1)
                log(
                    f"{elapsed:6.1f} s  step {self.steps:6d}  language {mean[0]:.4f}  "
                    f"patches {mean[1]:.4f}  gradient {mean[2]:.2f}  {pace:.1f} ms/step"
                )
                recent, logged_step, logged_at = [], self.steps, elapsed
                next_log = elapsed + log_seconds
            if elapsed >= next_eval:
                accuracy, _ = self.evaluate(4)
                curve.append({"seconds": round(elapsed, 1), "step": self.steps, **accuracy})
                log("        " + "  ".join(f"{k} {v:.0f}" for k, v in accuracy.items()))
                next_eval = elapsed + eval_seconds
        recent += [np.asarray(metrics) for metrics in flying]
        if recent and not np.isfinite(recent).all():
            raise FloatingPointError(f"non-finite metrics at step {self.steps}")
        return curve


def model_params(state: TrainState) -> Params:
    """The model's parameters without the auxiliary heads."""
    return {name: value for name, value in state.params.items() if not name.startswith("aux.")}
