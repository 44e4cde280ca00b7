"""``quota-jax recipe``: which visual tokens leave at which decoder layer."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quota_jax.cli.console import CheckpointPath
from quota_jax.cli.derive import RHO, DeriveOptions, allocation_table
from quota_jax.cli.recipe_tables import describe_recipe, sweep_table, tokens_left
from quota_jax.cli.selection import SelectionOptions, parse_number
from quota_jax.errors import QuotaError

if TYPE_CHECKING:
    from quota_jax.checkpoint import Checkpoint
    from quota_jax.config import ModelConfig
    from quota_jax.prune.sensitivity import Sensitivities
    from quota_jax.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class ShowRecipe(DeriveOptions, SelectionOptions):
    """Show the visual tokens per decoder layer, of the stored recipe or of a new one.

    A new recipe is derived as QUOTA does (--derive), drops in equal steps (--keep), is written by
    hand (--stages, --file), or is a peer's at its published place (--peer). --write stores it in
    the checkpoint, --none removes the stored one.

    For example:
      quota-jax recipe llava-7b-w4a4 --derive --data calib.json --reference llava-7b --write
    """

    checkpoint: CheckpointPath
    """Checkpoint, full precision or quantized."""
    keep: float | None = None
    """Drop in equal steps until this fraction of the visual tokens is left; with --peer, what the
    peer keeps."""
    stages: tuple[str, ...] = ()
    """Stages by hand, each LAYER:KEEP, for example 2:0.7 5:0.3."""
    file: Path | None = None
    """A recipe in JSON: written by hand, or a checkpoint's recipe.json."""
    peer: str | None = None
    """A published method by name, with --keep or --flops; vtw takes neither or --flops."""
    flops: float | None = None
    """With --peer: keep what costs this fraction of the unpruned language model."""
    sweep: tuple[str, ...] = ()
    """Compare several final fractions, for example 0.5,0.4,0.3: tokens per stage and FLOPs."""
    plot: Path | None = None
    """Draw the tokens per layer into this file (.png, .pdf or .svg)."""
    write: bool = False
    """Store the new recipe in the checkpoint."""
    none: bool = False
    """Remove the stored recipe: all tokens stay."""

    def run(self) -> int:
        from quota_jax.checkpoint import open_checkpoint, set_recipe
        from quota_jax.recipe import Recipe

        checkpoint = open_checkpoint(self.checkpoint)
        config = checkpoint.config
        self._check()
        if self.plot is not None:
            from quota_jax.figures.canvas import check_plots

            check_plots(self.plot)
        derived = None
        if self.derive:
            self._check_derived(checkpoint)
            derived, origin = self.measured(checkpoint)
            print(origin)
        if self.sweep:
            self._sweep(checkpoint, derived)
            return 0
        new = self.derive or self._by_hand or self.peer is not None or self.keep is not None
        recipe, notes = checkpoint.recipe, {}
        if self.none:
            recipe = Recipe.none(config.text.num_layers)
        elif new:
            recipe, notes = self._make(checkpoint, self.final, derived)
        print(describe_recipe(recipe, config))
        if self.plot is not None:
            self._draw({"": recipe}, config)
        if self.write or self.none:
            if "derivation" in checkpoint.provenance:
                notes = {"derivation": None, **notes}  # that of the recipe before
            set_recipe(self.checkpoint, recipe, {"recipe_command": self.command(), **notes})
            print(f"wrote {self.checkpoint / 'recipe.json'}")
        return 0

    @property
    def final(self) -> float | None:
        """The fraction of the visual tokens that is left in the end."""
        if self.derive:
            given = self.keep if self.rho is None else self.rho
            return RHO if given is None else given
        return self.keep

    @property
    def _by_hand(self) -> bool:
        return bool(self.stages) or self.file is not None

    def _check(self) -> None:
        """Refuses options that contradict each other, or that nothing would read."""
        ways = {
            "--derive": self.derive,
            "--stages": bool(self.stages),
            "--file": self.file is not None,
            "--peer": self.peer is not None,
        }
        chosen = [name for name, given in ways.items() if given]
        asked = chosen or self.keep is not None or self.sweep
        own = self._changed(SelectionOptions)
        if self.none and (asked or own or self.write):
            raise QuotaError("--none removes the stored recipe; it takes no other option")
        if len(chosen) > 1:
            raise QuotaError(f"{chosen[0]} and {chosen[1]} exclude each other")
        if not asked and (self.layers or self.write):
            raise QuotaError(
                "a new recipe needs --keep, for example --keep 0.3 (or --derive, --stages, "
                "--file, --peer)"
            )
        if not asked and own:
            raise QuotaError(
                f"{own[0]} belongs to a new recipe: add --keep, for example --keep 0.3"
            )
        fixed = ["--keep"] * (self.keep is not None) + ["--sweep"] * bool(self.sweep)
        if self.stages:
            fixed += ["--layers"] * bool(self.layers)
        elif self.file is not None:
            fixed += own
        if self._by_hand and fixed:
            raise QuotaError(f"{chosen[0]} says all stages; it takes no {fixed[0]}")
        if self.peer is not None and (extra := [name for name in own if name != "--layers"]):
            raise QuotaError(f"--peer takes the published settings, no {extra[0]}")
        if self.rho is not None and (self.keep is not None or not self.derive):
            raise QuotaError("--rho belongs to --derive, and stands for --keep there")
        if self.sweep and (self.keep is not None or self.rho is not None or self.flops is not None):
            raise QuotaError(
                "--sweep names the final fractions; it takes no --keep, --rho, --flops"
            )
        if self.sweep and self.write:
            raise QuotaError("--sweep shows several recipes; --write stores one")
        if self.flops is not None and self.peer is None:
            raise QuotaError("--flops belongs to --peer")
        if not self.derive and (extra := self._changed(DeriveOptions)):
            raise QuotaError(f"{extra[0]} belongs to --derive")

    def _changed(self, options: type) -> list[str]:
        """Which of some options are given, as they are written."""
        return [
            "--" + field.name.replace("_", "-")
            for field in dataclasses.fields(options)
            if getattr(self, field.name) != field.default
        ]

    def _check_derived(self, checkpoint: Checkpoint) -> None:
        """What is wrong with the recipe to come is told before anything is measured."""
        from quota_jax.prune.sensitivity import check_quantized

        check_quantized(checkpoint)
        values = [0.0] * len(self._layers(checkpoint))
        for keep in self._sweep_ratios() or [self.final]:
            self._recipe(checkpoint, keep, self._allocate(checkpoint, keep, values).ratios)

    def _layers(self, checkpoint: Checkpoint) -> tuple[int, ...]:
        from quota_jax.prune.presets import candidates

        layers = self.layers or candidates(checkpoint.config)
        depth = checkpoint.config.text.num_layers
        if beyond := [layer for layer in layers if layer >= depth]:
            raise QuotaError(
                f"recipe stage at layer {beyond[0]}, but the decoder has {depth} layers"
            )
        return layers

    def _allocate(self, checkpoint: Checkpoint, keep: float | None, values: Sequence[float]):
        from quota_jax.prune.allocator import allocate

        assert keep is not None
        return allocate(values, self._layers(checkpoint), keep, self.tau)

    def _recipe(
        self, checkpoint: Checkpoint, keep: float | None, ratios: Sequence[float]
    ) -> Recipe:
        """QUOTA's recipe of these ratios."""
        from quota_jax.prune.allocator import quota_recipe

        return quota_recipe(
            checkpoint.config.text.num_layers,
            self._layers(checkpoint),
            ratios,
            selector=self.chosen_selector(checkpoint.quantization, "quota"),
            point=self.point,
            positions=self.positions,
            min_keep_per_image=self.min_keep_per_image,
            reference_tokens=self.reference_tokens,
        )

    def _make(
        self,
        checkpoint: Checkpoint,
        keep: float | None,
        sensitivities: Sensitivities | None,
        *,
        quiet: bool = False,
    ) -> tuple[Recipe, dict[str, Any]]:
        """The new recipe and its provenance."""
        from quota_jax.prune.presets import candidates
        from quota_jax.recipe import Recipe

        config = checkpoint.config
        if sensitivities is not None:
            values = sensitivities.at(self._layers(checkpoint))
            allocation = self._allocate(checkpoint, keep, values)
            recipe = self._recipe(checkpoint, keep, allocation.ratios)
            if not quiet:
                tokens = config.reference_picture[1]
                print(f"\n{allocation_table(allocation, recipe, tokens)}\n")
            told = {"rho": keep, "tau": self.tau, "allocation": dataclasses.asdict(allocation)}
            return recipe, {
                "derivation": {**told, "sensitivities": dataclasses.asdict(sensitivities)}
            }
        if self.file is not None:
            from quota_jax.cli.flops import read_recipe_file

            return read_recipe_file(self.file, config), {}
        if self.peer is not None:
            return self._peer(config, keep), {}
        selector = self.chosen_selector(checkpoint.quantization, "text_attention")
        if self.stages:
            return self._from_stages(config, selector), {}
        assert keep is not None
        recipe = Recipe.uniform(
            num_layers=config.text.num_layers,
            layers=self.layers or candidates(config),
            keep=keep,
            selector=selector,
            point=self.point,
            positions=self.positions,
            min_keep_per_image=self.min_keep_per_image,
            budget="sample" if self.reference_tokens is None else "reference",
            reference_tokens=self.reference_tokens,
        )
        return recipe, {}

    def _from_stages(self, config: ModelConfig, selector: Any) -> Recipe:
        from quota_jax.prune.allocator import quota_recipe

        layers, ratios = [], []
        for text in self.stages:
            layer, colon, keep = text.partition(":")
            if not (colon and layer.strip().isdecimal()):
                raise QuotaError(f"--stages: {text!r} is not LAYER:KEEP, for example 2:0.7")
            layers.append(int(layer))
            ratios.append(parse_number(keep, f"--stages: {text!r}"))
        return quota_recipe(
            config.text.num_layers,
            layers,
            ratios,
            selector=selector,
            point=self.point,
            positions=self.positions,
            min_keep_per_image=self.min_keep_per_image,
            reference_tokens=self.reference_tokens,
        )

    def _peer(self, config: ModelConfig, keep: float | None) -> Recipe:
        from quota_jax.prune.presets import peer_recipe

        assert self.peer is not None
        return peer_recipe(
            self.peer,
            config,
            keep=keep,
            target_flops_ratio=self.flops,
            layers=self.layers or None,
        )

    def _sweep_ratios(self) -> list[float]:
        parts = [part for text in self.sweep for part in text.split(",") if part.strip()]
        return [parse_number(part, "--sweep") for part in parts]

    def _sweep(self, checkpoint: Checkpoint, sensitivities: Sensitivities | None) -> None:
        ratios = self._sweep_ratios()
        recipes = {
            f"{ratio:g}": self._make(checkpoint, ratio, sensitivities, quiet=True)[0]
            for ratio in ratios
        }
        print(sweep_table(recipes, checkpoint.config))
        if self.plot is not None:
            self._draw(recipes, checkpoint.config)

    def _draw(self, recipes: dict[str, Recipe], config: ModelConfig) -> None:
        from quota_jax.figures.recipe_plot import draw_tokens_per_layer

        picture, tokens = config.reference_picture
        assert self.plot is not None
        draw_tokens_per_layer(
            {label: (recipe, tokens_left(recipe, tokens)) for label, recipe in recipes.items()},
            tokens,
            self.plot,
            f"Visual tokens of {picture}",
        )
        print(f"wrote {self.plot}")

    def command(self) -> str:
        """The options that made the recipe, for its provenance."""
        parts = ["recipe"]
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in ("checkpoint", "write", "plot") or value == field.default:
                continue
            parts.append("--" + field.name.replace("_", "-"))
            if isinstance(value, tuple):
                parts += map(str, value)
            elif value is not True:
                parts.append(str(value))
        return shlex.join(parts)
