"""Tables about recipes: tokens per layer, and what final fractions cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from quota_jax.cli.console import table

if TYPE_CHECKING:
    from quota_jax.config import ModelConfig
    from quota_jax.recipe import Recipe, Stage

TEXT_TOKENS = 25
"""Text of a prompt in the FLOPs of a sweep, as in the paper's tables."""


def describe_recipe(recipe: Recipe, config: ModelConfig) -> str:
    """A table of the tokens of the reference picture per layer; equal layers share a row."""
    picture, tokens = config.reference_picture
    counts = recipe.tokens_per_layer(tokens)
    stages = {layer: [] for layer in range(recipe.num_layers)}
    for stage in recipe.stages:
        stages[stage.layer].append(describe_stage(stage))
    rows: list[Sequence[object]] = []
    for (count, what), run in groupby(
        range(recipe.num_layers), key=lambda layer: (counts[layer], "; ".join(stages[layer]))
    ):
        layers = list(run)
        label = f"{layers[0]}" if len(layers) == 1 else f"{layers[0]}-{layers[-1]}"
        share = f"{100 * count / tokens:.1f} %" if tokens else "-"
        rows.append((label, what, count, share))
    mean = sum(counts) / len(counts)
    return "\n".join(
        [
            table(("layer", "stage", "visual tokens", "of all"), rows, left=2),
            f"{mean:.0f} of {tokens} visual tokens of {picture} per layer on average, positions: "
            f"{recipe.positions}",
        ]
    )


def describe_stage(stage: Stage) -> str:
    """What a stage keeps, by which rule, where in its layer."""
    from quota_jax.recipe import PAPER_WEIGHTS

    selector, name = stage.selector, stage.selector.name
    if name == "random":
        name += f" (seed {selector.seed})"
    if selector.weights != PAPER_WEIGHTS:
        values = dataclasses.asdict(selector.weights).items()
        name += f" ({', '.join(f'{metric} {value:.4g}' for metric, value in values if value)})"
    return f"keep {stage.keep:.3g} by {name}, {stage.point}"


def tokens_left(recipe: Recipe, visual_tokens: int) -> list[int]:
    """Visual tokens that each layer leaves to the next."""
    keep = recipe.stages[-1].keep if recipe.stages else 1.0
    last = recipe.target(visual_tokens, keep)
    return [*recipe.tokens_per_layer(visual_tokens)[1:], last]


def sweep_table(recipes: dict[str, Recipe], config: ModelConfig) -> str:
    """Tokens that each stage leaves of the reference picture, and what a prefill costs."""
    from quota_jax.flops import executed_flops, paper_flops
    from quota_jax.recipe import Recipe

    picture, tokens = config.reference_picture

    def costs(recipe: Recipe) -> tuple[int, int]:
        recipe = recipe.canonical()
        paper = paper_flops(config.text, recipe, visual_tokens=tokens, text_tokens=TEXT_TOKENS)
        made = executed_flops(config, recipe, visual_tokens=tokens, text_tokens=TEXT_TOKENS)
        return paper.total, made.total

    whole = costs(Recipe.none(config.text.num_layers))
    places = sorted({stage.layer for recipe in recipes.values() for stage in recipe.stages})
    rows: list[Sequence[object]] = []
    for label, recipe in recipes.items():
        keep = {stage.layer: stage.keep for stage in recipe.stages}
        left = [recipe.target(tokens, keep[layer]) if layer in keep else "" for layer in places]
        counts = tokens_left(recipe, tokens)
        shares = [f"{100 * a / b:.2f} %" for a, b in zip(costs(recipe), whole, strict=True)]
        rows.append((label, *left, f"{sum(counts) / len(counts):.1f}", *shares))
    header = ("kept", *(f"layer {layer}" for layer in places), "mean", "LLM FLOPs", "executed")
    return "\n".join(
        [
            table(header, rows),
            f"visual tokens that stages leave of {tokens} ({picture}), and layers on average; "
            f"FLOPs of the unpruned, with {TEXT_TOKENS} text tokens, by the "
            "papers' count (language model) and as executed (everything)",
        ]
    )
