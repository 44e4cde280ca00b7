"""What commands that answer share: their options, and a checkpoint that answers one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from quota_jax.errors import QuotaError

if TYPE_CHECKING:
    from quota_jax.batch import Batch
    from quota_jax.checkpoint import Checkpoint
    from quota_jax.models.vision_language import VisionLanguageModel
    from quota_jax.processing import Processor
    from quota_jax.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class RecipeOptions:
    """Which visual tokens are kept, and in which precision it is computed."""

    recipe_none: bool = False
    """Keep all visual tokens, whatever the checkpoint's recipe says."""
    keep: float | None = None
    """Keep this fraction of the visual tokens, instead of the checkpoint's recipe."""
    layers: tuple[int, ...] = ()
    """With --keep: decoder layers that drop tokens, from 0; default as the command recipe."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Compute in this dtype; None takes the stored one."""

    def recipe(self, checkpoint: Checkpoint) -> Recipe:
        """The checkpoint's recipe, or the one that the options ask for."""
        from quota_jax.prune.presets import candidates
        from quota_jax.recipe import Recipe

        depth = checkpoint.config.text.num_layers
        if self.recipe_none and (self.keep is not None or self.layers):
            raise QuotaError("--recipe-none and --keep exclude each other")
        if self.layers and self.keep is None:
            raise QuotaError("--layers needs --keep, for example --keep 0.3")
        if self.recipe_none:
            return Recipe.none(depth)
        if self.keep is None:
            return checkpoint.recipe
        layers = self.layers or candidates(checkpoint.config)
        return Recipe.uniform(num_layers=depth, layers=layers, keep=self.keep)


@dataclass(frozen=True, kw_only=True)
class AnswerOptions(RecipeOptions):
    """Sampling, recipe and precision of an answer."""

    max_new: int = 32
    """Most new tokens of an answer."""
    temperature: float = 0.0
    """0 always takes the most likely token."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens with this probability."""
    top_k: int = 0
    """Sample from this many most likely tokens; 0 is off."""
    seed: int = 0
    """Equal seeds give equal samples."""


class Answerer:
    """A checkpoint and the options; the model itself is loaded with the first answer.

    So wrong prompts and unreadable pictures are told before anything large is read.
    """

    def __init__(self, path: Path, options: AnswerOptions):
        from quota_jax.checkpoint import open_checkpoint
        from quota_jax.processing import Processor
        from quota_jax.sampling import Sampling

        self._checkpoint = open_checkpoint(path)
        self._options = options
        self.recipe = options.recipe(self._checkpoint)
        self.processor: Processor = Processor.from_folder(
            self._checkpoint.assets_dir, self._checkpoint.config
        )
        self._sampling = {
            "temperature": options.temperature,
            "top_p": options.top_p,
            "top_k": options.top_k,
            "seed": options.seed,
            "stop_ids": self.processor.stop_ids,
        }
        Sampling.make(1, max_new=options.max_new, **self._sampling)  # refuses what is out of range

    @cached_property
    def model(self) -> VisionLanguageModel:
        """The model on the device, in the dtype asked for."""
        return self._checkpoint.load_model(self._options.dtype)

    def answer(self, batch: Batch, show: Callable[[str], None] | None = None) -> str:
        """The text for a batch of one; ``show`` gets it piece by piece as it is generated."""
        from quota_jax.generation import stream

        decoder = self.processor.decode_stream()
        pieces = []
        for (new,) in stream(
            self.model,
            batch,
            chunk=1 if show else self._options.max_new,
            max_new_tokens=self._options.max_new,
            recipe=self.recipe,
            **self._sampling,
        ):
            pieces.append(decoder.push(new))
            if show:
                show(pieces[-1])
        pieces.append(decoder.finish())
        if show:
            show(pieces[-1])
        return "".join(pieces)


def user_message(text: str, pictures: tuple[str, ...] | list[str]) -> dict:
    """One turn of a conversation, pictures first."""
    parts = [{"type": "image", "image": picture} for picture in pictures]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}
