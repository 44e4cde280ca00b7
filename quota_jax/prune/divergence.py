"""How far a pruned low-bit model's answers are from those of full precision.

A prompt is answered greedily by the full-precision model on all tokens. Then both models read the
prompt and are given that answer token by token, the deployed one under its recipe and with its own
cache; the divergence is the mean over the answer's tokens of KL(full precision || deployed).
The questions of a conversation are prompts of their own: with several, or with answers, in one
prompt their attention would choose tokens that no single question keeps.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from quota_jax import __version__
from quota_jax.batch import Batch
from quota_jax.checkpoint import Checkpoint
from quota_jax.errors import QuotaError
from quota_jax.generation import generate
from quota_jax.models.decoder import cache_groups
from quota_jax.models.vision_language import VisionLanguageModel
from quota_jax.processing import Processor
from quota_jax.prune.calibration_pass import Journal
from quota_jax.prune.sensitivity import check_pair
from quota_jax.prune.weights import METRICS, QuotaWeights
from quota_jax.quant.calibration_data import Sample, digest, make_batches
from quota_jax.recipe import Recipe

ANSWER = 8
"""Tokens of an answer that are compared."""
PROMPTS = 256
"""Prompts that are asked at most."""


def measure_divergences(
    quantized: Checkpoint,
    reference: Checkpoint,
    samples: Sequence[Sample],
    recipes: Sequence[Recipe],
    journal: Path,
    *,
    batch_size: int = 4,
    dtype: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Float[np.ndarray, "prompts recipes"]:
    """The divergence in nats of each of the samples' ``questions``, for each of ``recipes``.

    Both models are on the device at once. Recipes that differ in the weights of QUOTA's score only
    share a program. ``journal`` keeps the values of each batch: the same call goes on from it, and
    one that is complete computes nothing. dtype: both models are loaded in it; None takes what is
    stored. progress: called with (prompts done, prompts in all) after each batch.

    Raises:
      QuotaError: the checkpoints are not the two forms of one model, or there are no samples.
    """
    check_pair(quantized, reference)
    if not samples:
        raise QuotaError("divergences need calibration samples")
    identity = {
        "kind": "divergences",
        "checkpoint": quantized.fingerprint,
        "reference": reference.fingerprint,
        "quantization": quantized.quantization.to_json(),
        "data": digest(samples),
        "samples": len(samples),
        "recipes": [recipe.to_json() for recipe in recipes],
        "batch_size": batch_size,
        "answer": ANSWER,
        "prompts": PROMPTS,
        "dtype": dtype,
        "version": __version__,
    }
    notes, asked = Journal(journal, identity), questions(samples)
    done = len(notes.rows)
    if done * batch_size < len(asked):
        processor = Processor.from_folder(reference.assets_dir, reference.config)
        data = make_batches(processor, asked, batch_size)
        low, full = (each.load_model(dtype) for each in (quantized, reference))
        unpruned = Recipe.none(reference.config.text.num_layers)
        programs = _programs([recipe.canonical() for recipe in recipes])
        for batch, count in list(zip(data.batches, data.counts, strict=True))[done:]:
            answer = generate(full, batch, max_new_tokens=ANSWER, stop_ids=processor.stop_ids)
            tokens = jnp.asarray(answer.tokens)
            given = jnp.arange(ANSWER) < jnp.asarray(answer.lengths)[:, None]
            expected = answer_logits(full, batch, tokens, unpruned)
            found = [
                divergence(expected, answer_logits(low, batch, tokens, *each), given)
                for each in programs
            ]
            notes.append({"divergence": np.stack(found, axis=1)[:count]})
            if progress is not None:
                progress(min(len(notes.rows) * batch_size, len(asked)), len(asked))
    return notes.values()["divergence"]


def questions(samples: Sequence[Sample], limit: int = PROMPTS) -> list[Sample]:
    """The first ``limit`` prompts: the first question of each sample, then the second ones."""
    found: list[Sample] = []
    for turn in range(max((len(sample.turns) for sample in samples), default=0) // 2 + 1):
        for sample in samples:
            asked = sample.turns[2 * turn : 2 * turn + 1]
            if asked or (turn == 0 and not sample.turns):
                found.append(dataclasses.replace(sample, turns=asked))
    return found[:limit]


def _programs(recipes: Sequence[Recipe]) -> list[tuple[Recipe, dict[str, float] | None]]:
    """Recipes with the weights of QUOTA's score apart, where all stages have the same."""
    own = [_weights(recipe) for recipe in recipes]
    # A metric that no recipe uses stays out: it may not exist (residual of unquantized inputs).
    names = [name for name in METRICS if any(each and name in each.used for each in own)]
    return [
        (recipe, None)
        if each is None
        else (with_weights(recipe, QuotaWeights()), {name: getattr(each, name) for name in names})
        for recipe, each in zip(recipes, own, strict=True)
    ]


def _weights(recipe: Recipe) -> QuotaWeights | None:
    chosen = [stage.selector for stage in recipe.stages]
    plain = all(each.name == "quota" and not each.redistribute for each in chosen)
    return chosen[0].weights if plain and len({each.weights for each in chosen}) == 1 else None


def with_weights(recipe: Recipe, weights: QuotaWeights) -> Recipe:
    """The recipe with these weights of the score in all stages."""
    stages = tuple(
        dataclasses.replace(stage, selector=dataclasses.replace(stage.selector, weights=weights))
        for stage in recipe.stages
    )
    return dataclasses.replace(recipe, stages=stages)


@functools.partial(jax.jit, static_argnames="recipe")
def answer_logits(
    model: VisionLanguageModel,
    batch: Batch,
    answer: Int[Array, "B N"],
    recipe: Recipe,
    weights: Mapping[str, Any] | None = None,
) -> Float[Array, "B N vocab"]:
    """Logits of each of the answer's tokens, those before it given; ``weights`` of the score in
    place of the recipe's."""
    decoder: Any = model.decoder
    x, sequence, vision = model.decoder_input(batch, recipe)
    position = sequence.next_position
    x, final, caches = decoder.prefill(x, sequence, recipe, vision, weights)
    last = jnp.maximum(final.lengths - 1, 0)[:, None, None]
    first = decoder.logits(jnp.take_along_axis(x, last, axis=1)[:, 0])
    groups = cache_groups(
        caches,
        room=answer.shape[1],
        bits=decoder.kv_bits,
        next_position=position,
        keep_positions=decoder.layers.cache.by_channel,
    )
    active = jnp.ones(position.shape, bool)

    def step(carry, token):
        position, groups = carry
        logits, groups = decoder.step(token, position, groups, active)
        return (position + 1, groups), logits

    _, rest = jax.lax.scan(step, (position, groups), answer[:, :-1].T)
    return jnp.concatenate([first[:, None], rest.swapaxes(0, 1)], axis=1)


@jax.jit
def divergence(
    expected: Float[Array, "B N vocab"],
    found: Float[Array, "B N vocab"],
    given: Bool[Array, "B N"],
) -> Float[Array, " B"]:
    """KL(expected || found) of the distributions, in float32; the mean of each row's ``given``."""
    known, other = (
        jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1) for logits in (expected, found)
    )
    each = (jnp.exp(known) * (known - other)).sum(-1)
    return (each * given).sum(1) / jnp.maximum(given.sum(1), 1)
