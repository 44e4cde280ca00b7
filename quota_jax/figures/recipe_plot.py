"""Visual tokens per decoder layer under one or several recipes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from quota_jax.figures.canvas import BLUE, GREEN, ORANGE, PINK, RED, SKY, figure, whole_layers
from quota_jax.recipe import Recipe

CYCLE = (BLUE, ORANGE, GREEN, PINK, SKY, RED)
DASHES = ("-", "--", "-.", ":")


def draw_tokens_per_layer(
    recipes: Mapping[str, tuple[Recipe, Sequence[int]]],
    visual_tokens: int,
    path: Path,
    title: str,
) -> None:
    """Steps of the visual tokens that each layer leaves to the next; a dot at every stage, with its
    number if there is one recipe.

    ``recipes``: by what is left in the end, the recipe and those tokens.
    """
    with figure(path, 6.4, 3.4) as made:
        axis = made.subplots()
        for place, (label, (recipe, left)) in enumerate(recipes.items()):
            color, depth = CYCLE[place % len(CYCLE)], recipe.num_layers
            edges = [layer - 0.5 for layer in range(depth + 1)]
            axis.stairs(
                left,
                edges,
                baseline=None,
                color=color,
                linestyle=DASHES[place // len(CYCLE) % len(DASHES)],
                linewidth=1.8,
                label=label,
            )
            stages = sorted({stage.layer for stage in recipe.stages})
            axis.plot(stages, [left[layer] for layer in stages], "o", color=color)
            if len(recipes) == 1:
                for layer in stages:
                    axis.annotate(
                        f"{left[layer]}",
                        (layer, left[layer]),
                        textcoords="offset points",
                        xytext=(5, 4),
                        fontsize=8,
                    )
            whole_layers(axis, depth)
        axis.set_ylim(0, 1.08 * max(visual_tokens, 1))
        axis.set_ylabel(f"visual tokens left, of {visual_tokens}")
        axis.set_title(title)
        if len(recipes) > 1:
            axis.legend(loc="upper right", title="kept in the end", alignment="left")
