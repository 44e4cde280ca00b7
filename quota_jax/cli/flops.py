"""``quota-jax flops``: what a prefill costs, layer by layer, under any recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from quota_jax.cli.console import table
from quota_jax.errors import QuotaError

if TYPE_CHECKING:
    from quota_jax.config import ModelConfig
    from quota_jax.flops import Flops
    from quota_jax.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class ShowFlops:
    """Show the multiply-accumulates of a prefill per decoder layer, and in total.

    Two counts side by side: as executed (vision tower, projector, decoder, head; attention on a
    layer's incoming tokens, feed-forward on the kept ones), and as the pruning papers count (the
    language model alone, one number of tokens per layer). Papers call them FLOPs.

    For example:
      quota-jax flops llava_1_5_7b --keep 0.3 --layers 2 3 4 5 6
    """

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CHECKPOINT|PRESET")]
    """A checkpoint, counted under its stored recipe, or the name of a preset."""
    recipe: Path | None = None
    """Recipe file to count instead: a checkpoint's recipe.json, or a recipe written by hand."""
    keep: float | None = None
    """Count equal drops down to this fraction of the visual tokens instead."""
    layers: tuple[int, ...] = ()
    """Decoder layers that drop tokens, with --keep; default as in quota-jax recipe."""
    visual_tokens: int | None = None
    """Visual tokens of the sample; default: the model's reference picture."""
    text_tokens: int = 25
    """Text tokens of the sample."""
    grid: tuple[int, int] | None = None
    """Rows and columns of visual tokens of the one picture (Qwen2.5-VL), instead of
    --visual-tokens; without it, all its attention windows count as full."""
    matrices: Literal[2, 3] = 3
    """Feed-forward matrices in the papers' count: 3 as computed, 2 as FastV and DivPrune count."""
    counted: Literal["entry", "exit"] = "entry"
    """Papers' count: a layer that drops tokens counts with the kept or with the incoming ones."""

    def run(self) -> int:
        from quota_jax.flops import executed_flops, paper_flops
        from quota_jax.recipe import Recipe

        config, stored = open_model(self.model)
        recipe = self.chosen(config, stored)
        if self.grid is not None and self.visual_tokens is not None:
            raise QuotaError("--grid and --visual-tokens exclude each other")
        visual = self.visual_tokens
        if self.grid is not None:
            visual = self.grid[0] * self.grid[1]
        if visual is None:
            visual = config.reference_picture[1]

        none = Recipe.none(recipe.num_layers)
        executed, whole = (
            executed_flops(
                config,
                each,
                visual_tokens=visual,
                text_tokens=self.text_tokens,
                grids=None if self.grid is None else [self.grid],
            )
            for each in (recipe, none)
        )
        paper, paper_whole = (
            paper_flops(
                config.text,
                each,
                visual_tokens=visual,
                text_tokens=self.text_tokens,
                matrices=self.matrices,
                counted=self.counted,
            )
            for each in (recipe, none)
        )
        print(f"{visual} visual and {self.text_tokens} text tokens, 10^9 multiply-accumulates\n")
        print(layer_table(executed, paper))
        print()
        print(total_table(executed, whole, paper, paper_whole))
        return 0

    def chosen(self, config: ModelConfig, stored: Recipe) -> Recipe:
        """The recipe to count: a file's, a uniform one, or the stored one."""
        from quota_jax.prune.presets import candidates
        from quota_jax.recipe import Recipe

        if self.recipe is not None and self.keep is not None:
            raise QuotaError("--recipe and --keep exclude each other")
        if self.layers and self.keep is None:
            raise QuotaError("--layers needs --keep, for example --keep 0.3")
        if self.recipe is not None:
            return read_recipe_file(self.recipe, config)
        if self.keep is None:
            return stored
        layers = self.layers or candidates(config)
        return Recipe.uniform(num_layers=stored.num_layers, layers=layers, keep=self.keep)


def open_model(name: str) -> tuple[ModelConfig, Recipe]:
    """Configuration and stored recipe of a checkpoint; a preset has no stored recipe."""
    from quota_jax.config import PRESETS
    from quota_jax.recipe import Recipe

    path = Path(name)
    if name in PRESETS and not path.exists():
        config = PRESETS[name]
        return config, Recipe.none(config.text.num_layers)
    if not path.is_dir():
        raise QuotaError(f"{name}: no such checkpoint folder, and no preset ({', '.join(PRESETS)})")
    from quota_jax.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(path)
    return checkpoint.config, checkpoint.recipe


def read_recipe_file(path: Path, config: ModelConfig) -> Recipe:
    """The recipe in a checkpoint's recipe.json, or in a file that holds nothing else."""
    from quota_jax.checkpoint.format import read_json
    from quota_jax.checkpoint.recipe_file import check_recipe, read_recipe
    from quota_jax.recipe import Recipe

    data = read_json(path)
    if "recipe" in data:
        return read_recipe(path, config)[0]
    try:
        recipe = Recipe.from_json(data)
    except QuotaError as error:
        raise QuotaError(f"{path}: {error}") from None
    check_recipe(recipe, config, str(path))
    return recipe


def layer_table(executed: Flops, paper: Flops) -> str:
    """Tokens and cost of each decoder layer; equal neighbours share a row."""
    pairs = list(zip(executed.layers, paper.layers, strict=True))
    rows: list[Sequence[object]] = []
    for (ours, theirs), run in groupby(range(len(pairs)), key=pairs.__getitem__):
        layers = list(run)
        label = f"{layers[0]}" if len(layers) == 1 else f"{layers[0]}-{layers[-1]}"
        rows.append(
            (
                label,
                ours.attention_tokens,
                ours.mlp_tokens,
                giga(ours.flops),
                theirs.mlp_tokens,
                giga(theirs.flops),
            )
        )
    header = ("layer", "attention", "mlp", "executed", "paper tokens", "paper")
    return table(header, rows)


def total_table(executed: Flops, whole: Flops, paper: Flops, paper_whole: Flops) -> str:
    """The parts of a prefill and their sum, each beside the same without pruning."""
    parts = [
        (name, getattr(executed, part), getattr(whole, part))
        for name, part in (
            ("vision tower", "vision"),
            ("projector", "projector"),
            ("decoder", "decoder"),
            ("head, last token", "head"),
            ("total, executed", "total"),
        )
    ]
    parts.append(("total, paper", paper.total, paper_whole.total))
    rows = [
        (name, giga(now), giga(before), f"{100 * now / before:.2f} %" if before else "-")
        for name, now, before in parts
    ]
    return table(("part", "this recipe", "unpruned", "of unpruned"), rows)


def giga(count: int) -> str:
    """Multiply-accumulates in 10^9, with digits for small models too."""
    return f"{count / 1e9:.3f}" if count >= 10**8 else f"{count / 1e9:.3g}"
