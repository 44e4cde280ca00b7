"""Which visual tokens each pruning stage keeps."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Int

from quota_jax.batch import Batch
from quota_jax.generation import check_recipe
from quota_jax.models.vision_language import VisionLanguageModel
from quota_jax.recipe import Recipe, Stage


@dataclass(frozen=True, kw_only=True)
class KeptTokens:
    """What one stage leaves: for each sample the places in its input sequence of the visual tokens
    kept, ascending. A merged token stands at the place of the token it grew from; one that grew
    from none (VisionZip's class token) is left out."""

    stage: Stage
    places: tuple[Int[np.ndarray, " K"], ...]


def kept_tokens(
    model: VisionLanguageModel, batch: Batch, recipe: Recipe | None = None
) -> list[KeptTokens]:
    """The visual tokens that remain after each stage of the canonical recipe.

    Runs the decoder's own prefill once and reads the sets off its caches: trimmed by their own
    stages, caches hold exactly what was kept, and trimming changes nothing else. The last set is
    what ``prefill`` reports as ``kept_source``.
    """
    recipe = check_recipe(model, recipe)
    if not recipe.stages:
        return []
    found = jax.device_get(_kept(model, batch, recipe=recipe))
    return [
        KeptTokens(
            stage=stage,
            places=tuple(
                np.sort(row[mask & (row >= 0)]) for row, mask in zip(source, visual, strict=True)
            ),
        )
        for stage, (source, visual) in zip(recipe.stages, found, strict=True)
    ]


@functools.partial(jax.jit, static_argnames="recipe")
def _kept(model: VisionLanguageModel, batch: Batch, *, recipe: Recipe):
    x, sequence, vision = model.decoder_input(batch, recipe)
    stages = tuple(dataclasses.replace(stage, trim_own_cache=True) for stage in recipe.stages)

    def sequences(count: int):
        """What each layer's cache holds under the first ``count`` stages."""
        first = dataclasses.replace(recipe, stages=stages[:count])
        _, _, caches = model.decoder.prefill(x, sequence, first, vision)
        return [
            cache.sequence
            for cache in caches
            for _ in range(jax.tree.leaves(cache.stored)[0].shape[0])
        ]

    whole, found = sequences(len(stages)), []
    for count, stage in enumerate(stages, start=1):
        # A stage that another one follows in the same layer has no cache of its own.
        hidden = count < len(stages) and stages[count].layer == stage.layer
        left = (sequences(count) if hidden else whole)[stage.layer]
        found.append((left.source, left.is_visual))
    return found
