"""One training step of GRACE: teacher, student, losses, update."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from quota_jax.batch import Batch
from quota_jax.config import ModelConfig
from quota_jax.models.build import nest
from quota_jax.models.decoder import Decoder
from quota_jax.models.params import build_model
from quota_jax.prune.select import Sequence
from quota_jax.quant.grace_data import Targets
from quota_jax.quant.grace_losses import (
    control,
    cross_entropy,
    decoupled,
    gated_mean,
    gates,
    relational,
)
from quota_jax.quant.grace_options import GraceOptions
from quota_jax.quant.grace_student import Kept, Learned, Student
from quota_jax.quantization import QuantizationConfig
from quota_jax.recipe import Recipe

METRICS = ("loss", "ce", "gdkd", "rcka", "beta", "gate")
"""What a step reports: the whole loss and its parts (without weights), beta as the step used it,
and the mean gate."""


class State(NamedTuple):
    """What a step changes. beta and average belong to the controller."""

    learned: Learned
    optimizer: Any
    beta: jax.Array
    average: jax.Array
    step: jax.Array


class Seen(NamedTuple):
    """What the losses read of a model: logits at the targets [B, M, V], and the states of the
    penultimate decoder layer with their tokens (None where they were not asked for)."""

    logits: jax.Array
    inner: tuple[jax.Array, Sequence] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What is static about a run."""

    config: ModelConfig
    student: Student
    options: GraceOptions
    recipe: Recipe

    def see(
        self,
        params: Mapping[str, Any],
        batch: Batch,
        targets: Targets,
        quantization: QuantizationConfig,
        recipe: Recipe,
    ) -> Seen:
        """Runs a model; targets keep their places when visual tokens are pruned."""
        model: Any = build_model(self.config, quantization, params)
        layers = self.config.text.num_layers
        x, tokens, vision = model.decoder_input(batch, recipe)
        inner = None
        if self.options.relational_weight:
            short = dataclasses.replace(self.config.text, num_layers=layers - 1)
            lower = Decoder(nest(params)["decoder"], short, quantization)
            x, tokens, _ = lower.prefill(x, tokens, recipe, vision)
            inner = x, tokens
            x, _ = lower.layer(x, tokens, jnp.int32(layers - 1))
        else:
            x, tokens, _ = model.decoder.prefill(x, tokens, recipe, vision)
        here = tokens.source[:, None, :] == targets.places[:, :, None]
        real = jnp.arange(x.shape[1]) < tokens.lengths[:, None]
        here = here & (real & ~tokens.is_visual)[:, None]
        states = jnp.take_along_axis(x, jnp.argmax(here, axis=-1)[..., None], axis=1)
        return Seen(model.decoder.logits(states), inner)

    def loss(
        self,
        learned: Learned,
        kept: Kept,
        teacher: Seen,
        batch: Batch,
        targets: Targets,
        beta: jax.Array,
        step: jax.Array,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss of a batch, and its parts."""
        options = self.options
        quantization = self.student.quantization
        params = self.student.params(learned, kept)
        student = self.see(params, batch, targets, quantization, self.recipe)
        ce = cross_entropy(student.logits, targets.labels, targets.weights)
        gate = gates(teacher.logits)
        if not options.gated:
            gate = jnp.ones_like(gate)
        distance = decoupled(
            teacher.logits,
            student.logits,
            targets.labels,
            temperature=options.temperature,
            target_weight=options.target_weight,
            rest_weight=options.rest_weight,
        )
        gdkd = gated_mean(distance, gate, targets.weights)
        rcka = jnp.zeros(())
        if teacher.inner is not None and student.inner is not None:
            (known, _), (found, tokens) = teacher.inner, student.inner
            known = jnp.take_along_axis(known, tokens.source[..., None], axis=1)
            real = jnp.arange(found.shape[1]) < tokens.lengths[:, None]
            # Rows that only fill up a batch have no targets.
            counts = targets.weights.sum(1)[:, None] > 0
            rcka = relational(known, found, tokens.is_visual & real & counts)
        rise = jnp.minimum(1.0, (step + 1) / max(1, options.relational_warmup))
        whole = ce + beta * gdkd + options.relational_weight * rise * rcka
        mean_gate = (gate * targets.weights).sum() / jnp.maximum(targets.weights.sum(), 1)
        return whole, {"ce": ce, "gdkd": gdkd, "rcka": rcka, "gate": mean_gate}


@functools.partial(jax.jit, static_argnames="task", donate_argnums=0)
def train_step(
    state: State,
    kept: Kept,
    teacher: Mapping[str, jax.Array],
    batch: Batch,
    targets: Targets,
    *,
    task: Task,
) -> tuple[State, dict[str, jax.Array]]:
    """One step; the metrics are those before it."""
    options = task.options
    unpruned = Recipe.none(task.config.text.num_layers)
    seen = task.see(teacher, batch, targets, QuantizationConfig.none, unpruned)
    grad = jax.value_and_grad(task.loss, has_aux=True)
    (loss, parts), gradients = grad(
        state.learned, kept, seen, batch, targets, state.beta, state.step
    )
    updates, optimizer = options.optimizer().update(gradients, state.optimizer, state.learned)
    beta, average = control(
        state.beta,
        state.average,
        parts["gdkd"],
        state.step == 0,
        rate=options.beta_rate,
        target=options.beta_target,
        bounds=options.beta_bounds,
        decay=options.average_decay,
    )
    learned = optax.apply_updates(state.learned, updates)
    after = State(learned, optimizer, beta, average, state.step + 1)  # pyrefly: ignore
    return after, {"loss": loss, **parts, "beta": state.beta}


@functools.partial(jax.jit, static_argnames="task")
def simulated_params(learned: Learned, kept: Kept, *, task: Task) -> dict[str, jax.Array]:
    """Parameters of the simulated student as it stands."""
    return task.student.params(learned, kept)
