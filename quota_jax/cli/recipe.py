"""``quota-jax recipe``: which visual tokens leave at which decoder layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Literal

from quota_jax.cli.console import CheckpointPath, table
from quota_jax.errors import QuotaError

if TYPE_CHECKING:
    from quota_jax.config import ModelConfig
    from quota_jax.recipe import Recipe

SelectorName = Literal[
    "quota", "text_attention", "fastv", "pyramid_drop", "div_prune", "random", "stride"
]
DEFAULT_LAYERS = {"llava": range(2, 7), "qwen2_5_vl": range(7, 12)}
"""Candidate layers of the paper (0-based) for each model family."""


@dataclass(frozen=True, kw_only=True)
class ShowRecipe:
    """Show the visual tokens per decoder layer, of the stored recipe or of a new one.

    --keep drops tokens in equal steps at the given layers until that fraction is left; --write
    stores the new recipe in the checkpoint, --none removes the stored one.

    For example:
      quota-jax recipe llava-7b --keep 0.3 --layers 2 3 4 5 6 --write
    """

    checkpoint: CheckpointPath
    """Checkpoint, full precision or quantized."""
    keep: float | None = None
    """Fraction of the visual tokens that is left after the last stage."""
    layers: tuple[int, ...] = ()
    """Decoder layers that drop tokens, from 0; default 2 to 6 (LLaVA), 7 to 11 (Qwen2.5-VL)."""
    selector: SelectorName = "text_attention"
    """How tokens are chosen: by QUOTA's score, by its attention from the text alone, as a peer
    does, at random, or evenly spaced."""
    redistribute: bool = False
    """With the selector quota: share out the weight of a metric that is not there (the residual,
    where inputs are not quantized)."""
    point: Literal["input", "before_attention", "after_attention"] | None = None
    """Where in the layer they leave; default: where the selector stands."""
    positions: Literal["keep", "renumber"] = "keep"
    """Whether kept tokens keep their rotary positions."""
    seed: int = 0
    """For the selector random."""
    write: bool = False
    """Store the new recipe in the checkpoint."""
    none: bool = False
    """Remove the stored recipe: all tokens stay."""

    def run(self) -> int:
        from quota_jax.checkpoint import open_checkpoint, set_recipe
        from quota_jax.recipe import Recipe, Selector

        checkpoint = open_checkpoint(self.checkpoint)
        depth = checkpoint.config.text.num_layers
        if self.none and (self.keep is not None or self.layers or self.write):
            raise QuotaError("--none removes the stored recipe; it takes no other option")
        if self.keep is None and (self.layers or self.write):
            raise QuotaError("a new recipe needs --keep, for example --keep 0.3")
        if self.none:
            recipe = Recipe.none(depth)
        elif self.keep is None:
            recipe = checkpoint.recipe
        else:
            bits = checkpoint.quantization
            quantized = bits.quantizes("decoder") and bits.activation_bits < 16
            if self.selector == "quota" and not (quantized or self.redistribute):
                raise QuotaError(
                    "the decoder's inputs are not quantized, so the score of selector quota has no "
                    "residual: add --redistribute"
                )
            recipe = Recipe.uniform(
                num_layers=depth,
                layers=self.layers or default_layers(checkpoint.config),
                keep=self.keep,
                selector=Selector(
                    name=self.selector, seed=self.seed, redistribute=self.redistribute
                ),
                point=self.point,
                positions=self.positions,
            )
        print(describe_recipe(recipe, checkpoint.config))
        if self.write or self.none:
            command = {"recipe_command": self.command()}
            set_recipe(self.checkpoint, recipe, command)
            print(f"wrote {self.checkpoint / 'recipe.json'}")
        return 0

    def command(self) -> str:
        """The options that made the recipe, for its provenance."""
        if self.none:
            return "recipe --none"
        layers = " ".join(map(str, self.layers or ("default",)))
        return (
            f"recipe --keep {self.keep} --layers {layers} --selector {self.selector} "
            f"--point {self.point or 'default'} --positions {self.positions} --seed {self.seed}"
            + (" --redistribute" if self.redistribute else "")
        )


def default_layers(config: ModelConfig) -> tuple[int, ...]:
    """The paper's candidate layers, as far as the decoder has them."""
    depth = config.text.num_layers
    layers = tuple(layer for layer in DEFAULT_LAYERS[config.model_type] if layer < depth)
    if not layers:
        raise QuotaError(f"the decoder has only {depth} layers: name some with --layers")
    return layers


def describe_recipe(recipe: Recipe, config: ModelConfig) -> str:
    """A table of the tokens of the reference picture per layer; equal layers share a row."""
    picture, tokens = config.reference_picture
    counts = recipe.tokens_per_layer(tokens)
    stages = {layer: [] for layer in range(recipe.num_layers)}
    for stage in recipe.stages:
        name = stage.selector.name + (
            f" (seed {stage.selector.seed})" if stage.selector.name == "random" else ""
        )
        stages[stage.layer].append(f"keep {stage.keep:.3g} by {name}, {stage.point}")
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
