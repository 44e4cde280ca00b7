"""The co-calibrated variant: weights and recipe fitted to the pruned low-bit execution itself.

Each round calibrates the blocks, measures sensitivities on the execution that results, and then
chooses the recipe by what is deployed: the divergence from full precision on the calibration
samples (`prune.divergence`). Round 0 calibrates on all tokens, as the collaborative variant does;
later rounds on the tokens that the recipe of the round before keeps, fed by the quantized blocks.
The round whose model and recipe diverge least is the result, so that no round can make it worse on
these samples.

A recipe is chosen step by step from the derived schedule (Eq. 2-4) with all four metrics of the
score: drops are spread equally instead, or one metric is left out (its weight going to the others),
whichever lowers the divergence most, until nothing does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quota_jax.checkpoint import Checkpoint, open_checkpoint, set_recipe
from quota_jax.prune.divergence import measure_divergences, with_weights
from quota_jax.prune.sensitivity import (
    Sensitivities,
    SensitivityOptions,
    measure_sensitivities,
)
from quota_jax.quant.calibration_data import Sample
from quota_jax.recipe import Recipe

DTYPE = "float32"
"""Of both models while they are compared."""

Make = Callable[[Path, Recipe | None, str | None], Path]
"""Calibrates a checkpoint at a place, on the graph of a recipe, fed as named (None: as the options
say); does nothing where it is there."""
Derive = Callable[[Sensitivities], tuple[Recipe, dict[str, Any]]]
"""The schedule that follows from sensitivities, and what is told of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tried:
    """A recipe, by its schedule's name and the weights of its score, and its divergence in nats."""

    recipe: Recipe
    schedule: str
    divergence: float

    @property
    def told(self) -> dict[str, Any]:
        weights = self.recipe.stages[0].selector.weights
        return {
            "schedule": self.schedule,
            "weights": dataclasses.asdict(weights),
            "divergence": self.divergence,
        }


def co_calibrate(
    reference: Checkpoint,
    out: Path,
    samples: Sequence[Sample],
    rounds: int,
    *,
    equal: Recipe,
    make: Make,
    derive: Derive,
) -> dict[str, Any]:
    """Makes ``out``; rounds stand beside it until the best one takes its place.

    Args:
      rounds: calibrations after the first.
      equal: equal drops at the candidate layers, scored by all metrics.

    Returns:
      What is stored as the checkpoint's ``derivation``.
    """
    best: tuple[float, Path, Recipe, dict[str, Any]] | None = None
    graph, told = None, []
    for number in range(rounds + 1):
        place = make(out.with_name(f"round-{number}"), graph, "quantized" if number else None)
        quantized = open_checkpoint(place)
        measured = _sensitivities(quantized, reference, samples, graph)
        derived, derivation = derive(measured)
        tried = search(
            {"sensitivity": derived, "equal": equal},
            _measure(quantized, reference, samples),
        )
        chosen = min(tried, key=lambda each: each.divergence)
        told.append({**derivation, "tried": [each.told for each in tried], "chosen": chosen.told})
        if best is None or chosen.divergence < best[0]:
            best = chosen.divergence, place, chosen.recipe, {**told[-1], "round": number}
        graph = chosen.recipe
    assert best is not None
    _, place, recipe, derivation = best
    derivation["divergences"] = [each["chosen"]["divergence"] for each in told]
    set_recipe(place, recipe, {"derivation": derivation})
    place.rename(out)
    return derivation


def search(
    schedules: dict[str, Recipe], measure: Callable[[int, Sequence[Recipe]], Sequence[float]]
) -> list[Tried]:
    """All recipes that were tried, from ``schedules`` with their own weights on.

    Args:
      schedules: by name; the first one is where the search begins.
      measure: the divergence of each recipe, for the step of that number.
    """
    tried: dict[Recipe, Tried] = {}

    def look(step: int, given: list[tuple[str, Recipe]]) -> bool:
        """Whether one of these is better than all before."""
        new = {recipe: name for name, recipe in given if recipe not in tried}
        before = min((each.divergence for each in tried.values()), default=float("inf"))
        found = measure(step, list(new)) if new else ()
        for (recipe, name), value in zip(new.items(), found, strict=True):
            tried[recipe] = Tried(recipe=recipe, schedule=name, divergence=value)
        return any(value < before for value in found)

    look(0, list(schedules.items())[:1])
    step = 1
    while True:
        best = min(tried.values(), key=lambda each: each.divergence)
        weights = best.recipe.stages[0].selector.weights
        near = [(name, with_weights(recipe, weights)) for name, recipe in schedules.items()]
        if len(weights.used) > 1:
            near += [
                (best.schedule, with_weights(best.recipe, weights.without(metric)))
                for metric in weights.used
            ]
        if not look(step, near):
            return list(tried.values())
        step += 1


def _measure(
    quantized: Checkpoint, reference: Checkpoint, samples: Sequence[Sample]
) -> Callable[[int, Sequence[Recipe]], Sequence[float]]:
    """Divergences; each step of a search has a journal beside the checkpoint."""
    place = quantized.path

    def measure(step: int, recipes: Sequence[Recipe]) -> Sequence[float]:
        journal = place.with_name(f"{place.name}.divergences-{step}")
        return measure_divergences(quantized, reference, samples, recipes, journal, dtype=DTYPE)

    return measure


def _sensitivities(
    quantized: Checkpoint, reference: Checkpoint, samples: Sequence[Sample], graph: Recipe | None
) -> Sensitivities:
    """Measured once; a killed call finds them."""
    place = quantized.path
    file = place.with_name(f"{place.name}.sensitivities.json")
    if not file.exists():
        measure_sensitivities(
            quantized,
            reference,
            samples,
            file.with_suffix(".journal"),
            options=SensitivityOptions(dtype=DTYPE),
            recipe=graph,
        ).write(file)
    return Sensitivities.read(file)
