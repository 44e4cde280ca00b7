"""recipe.json: pruning recipe and provenance, the one replaceable file of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quota_jax.checkpoint import format as fmt
from quota_jax.config import ModelConfig
from quota_jax.errors import QuotaError
from quota_jax.recipe import Recipe


def recipe_json(recipe: Recipe, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The sealed content of recipe.json; the checksum covers recipe and provenance."""
    content = {
        "format_version": fmt.FORMAT_VERSION,
        "recipe": recipe.to_json(),
        "provenance": dict(provenance),
    }
    return fmt.seal(content, "provenance")


def read_recipe(path: Path, config: ModelConfig) -> tuple[Recipe, dict[str, Any]]:
    """Recipe and provenance; damage, or a recipe for another model, is a QuotaError."""
    data = fmt.read_json(path)
    fmt.check_version(data, str(path))
    fmt.check_seal(data, str(path))
    provenance = fmt.expect_mapping(data.get("provenance"), str(path))
    try:
        recipe = Recipe.from_json(fmt.expect_mapping(data.get("recipe"), str(path)))
    except QuotaError as error:
        raise QuotaError(f"{path}: {error}") from None
    check_recipe(recipe, config, str(path))
    return recipe, dict(provenance)


def check_recipe(recipe: Recipe, config: ModelConfig, where: str) -> None:
    if recipe.num_layers != config.text.num_layers:
        raise QuotaError(
            f"{where}: the recipe is for {recipe.num_layers} decoder layers, the model has "
            f"{config.text.num_layers}"
        )
