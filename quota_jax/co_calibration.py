"""The co-calibrated variant: weights and recipe fitted to the pruned low-bit execution itself.

Each round calibrates the blocks, measures sensitivities on the execution that results, and then
chooses the recipe by what is deployed: the divergence from full precision on the calibration
samples (`prune.divergence`). Round 0 calibrates on all tokens, as the collaborative variant does;
later rounds on the tokens that the recipe of the round before keeps, fed by the quantized blocks.
The result is round 0 unless a later one is better, so that no round can make it worse.

A recipe is chosen step by step from the derived schedule (Eq. 2-4) with all four metrics of the
score: drops are spread equally instead, or one metric is left out (its weight going to the others),
whichever lowers the divergence most, until nothing does.

Better means a mean that is lower by twice the standard error of the paired differences: a few
wrong answers are most of a divergence, and smaller gains are noise.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from quota_jax.checkpoint import Checkpoint, open_checkpoint, set_recipe
from quota_jax.programs import release_many_programs
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
ERRORS = 2.0
"""Standard errors by which a better mean is lower."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FirstRound:
    """What round 0 would make, where it is there already: a checkpoint calibrated on all tokens
    with the same samples and options, and its sensitivities."""

    checkpoint: Path
    sensitivities: Sensitivities

    def lay(self, place: Path) -> None:
        """Copies both to where round 0 looks for them, unless its checkpoint is there."""
        if place.exists():
            return
        self.sensitivities.write(_sensitivities_of(place))
        copied = place.with_name("copy")
        shutil.rmtree(copied, ignore_errors=True)
        shutil.copytree(self.checkpoint, copied)
        copied.rename(place)


@dataclass(frozen=True, kw_only=True, slots=True)
class Tried:
    """A recipe, by its schedule's name and the weights of its score, and the divergence in nats of
    each prompt."""

    recipe: Recipe
    schedule: str
    values: tuple[float, ...]

    @property
    def divergence(self) -> float:
        return float(np.mean(self.values))

    def beats(self, other: Tried) -> bool:
        """Whether its divergence is lower beyond doubt, on the same prompts."""
        gain = np.subtract(other.values, self.values)
        error = np.std(gain, ddof=1) / np.sqrt(len(gain)) if len(gain) > 1 else 0.0
        return bool(gain.mean() > ERRORS * error)

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
    first: FirstRound | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> None:
    """Makes ``out``; rounds stand beside it until the best one takes its place.

    Args:
      rounds: calibrations after the first.
      equal: equal drops at the candidate layers, scored by all metrics.
      first: what round 0 need not make again.
      progress: called with (what is done, prompts done, prompts in all) while answers are compared.
    """
    best: tuple[Tried, Path, dict[str, Any]] | None = None
    graph, told = None, []
    if first is not None:
        first.lay(out.with_name("round-0"))
    for number in range(rounds + 1):
        place = make(out.with_name(f"round-{number}"), graph, "quantized" if number else None)
        quantized = open_checkpoint(place)
        measured = deployed_sensitivities(quantized, reference, samples, graph)
        derived, derivation = derive(measured)
        chosen, tried = search(
            {"sensitivity": derived, "equal": equal},
            _measure(quantized, reference, samples, progress),
        )
        told.append({**derivation, "tried": [each.told for each in tried], "chosen": chosen.told})
        if best is None or chosen.beats(best[0]):
            best = chosen, place, {**told[-1], "round": number}
        graph = chosen.recipe
    assert best is not None
    chosen, place, derivation = best
    derivation["divergences"] = [each["chosen"]["divergence"] for each in told]
    set_recipe(place, chosen.recipe, {"derivation": derivation})
    place.rename(out)


Measure = Callable[[int, Sequence[Recipe]], np.ndarray]
"""Divergences ``[prompts, recipes]``, for the step of that number."""


def search(schedules: dict[str, Recipe], measure: Measure) -> tuple[Tried, list[Tried]]:
    """The chosen recipe, and all that were tried, in their order.

    Args:
      schedules: by name; the search begins at the first one, with its own weights.
    """
    tried: dict[Recipe, Tried] = {}

    def look(step: int, given: Sequence[tuple[str, Recipe]]) -> list[Tried]:
        """What had not been tried before."""
        new = {recipe: name for name, recipe in given if recipe not in tried}
        if new:
            columns = measure(step, list(new)).T.tolist()
            for (recipe, name), values in zip(new.items(), columns, strict=True):
                tried[recipe] = Tried(recipe=recipe, schedule=name, values=tuple(values))
        return [tried[recipe] for recipe in new]

    (best,) = look(0, list(schedules.items())[:1])
    step = 1
    while True:
        weights = best.recipe.stages[0].selector.weights
        near = [(name, with_weights(recipe, weights)) for name, recipe in schedules.items()]
        if len(weights.used) > 1:
            near += [
                (best.schedule, with_weights(best.recipe, weights.without(metric)))
                for metric in weights.used
            ]
        better = [each for each in look(step, near) if each.beats(best)]
        if not better:
            return best, list(tried.values())
        best = min(better, key=lambda each: each.divergence)
        step += 1


def _measure(
    quantized: Checkpoint,
    reference: Checkpoint,
    samples: Sequence[Sample],
    progress: Callable[[str, int, int], None] | None,
) -> Measure:
    """Each step of a search has a journal beside the checkpoint."""
    place = quantized.path

    def measure(step: int, recipes: Sequence[Recipe]) -> np.ndarray:
        def tell(done: int, total: int) -> None:
            if progress is not None:
                progress(f"{place.name}, comparing answers, step {step}", done, total)

        release_many_programs()
        journal = place.with_name(f"{place.name}.divergences-{step}")
        return measure_divergences(
            quantized, reference, samples, recipes, journal, dtype=DTYPE, progress=tell
        )

    return measure


def deployed_sensitivities(
    quantized: Checkpoint,
    reference: Checkpoint,
    samples: Sequence[Sample],
    graph: Recipe | None = None,
) -> Sensitivities:
    """Measured once, into a file beside the checkpoint; a killed call finds them. ``graph``: the
    recipe of the execution, None keeps all tokens."""
    file = _sensitivities_of(quantized.path)
    if not file.exists():
        release_many_programs()
        measure_sensitivities(
            quantized,
            reference,
            samples,
            file.with_suffix(".journal"),
            options=SensitivityOptions(dtype=DTYPE),
            recipe=graph,
        ).write(file)
    return Sensitivities.read(file)


def _sensitivities_of(place: Path) -> Path:
    return place.with_name(f"{place.name}.sensitivities.json")
