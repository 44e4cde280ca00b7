"""``quota-jax generate``: one answer about one or more pictures."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from quota_jax.cli.answering import Answerer, AnswerOptions, user_message
from quota_jax.cli.console import CheckpointPath
from quota_jax.errors import QuotaError

if TYPE_CHECKING:
    from quota_jax.batch import Batch


@dataclass(frozen=True, kw_only=True)
class Generate(AnswerOptions):
    """Answer one prompt about one or more pictures, or about none.

    The prompt is put into the checkpoint's chat template. With --template raw it is taken as it is,
    and holds one <image> for each picture.

    For example:
      quota-jax generate llava-7b --image cat.png --prompt "What is this?"
    """

    checkpoint: CheckpointPath
    """Checkpoint, full precision or quantized."""
    prompt: str
    """The question."""
    image: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A picture file."""
    template: str | None = None
    """llava, vicuna_v1, raw, or a template of the checkpoint; None takes the checkpoint's own."""
    stream: bool = False
    """Show tokens as they come; a terminal always does."""
    show_tokens: Path | None = None
    """Draw the visual tokens that each stage of the recipe keeps over the pictures, into this file
    (.png, .pdf or .svg)."""

    def run(self) -> int:
        if self.show_tokens is not None:
            from quota_jax.figures.canvas import check_plots

            check_plots(self.show_tokens)
        answerer = Answerer(self.checkpoint, self)
        if self.show_tokens is not None and not self.image:
            raise QuotaError("--show-tokens needs a picture: add --image")
        if self.show_tokens is not None and answerer.recipe.is_none:
            raise QuotaError(
                "--show-tokens: the recipe keeps every visual token; add --keep, for example "
                "--keep 0.3"
            )
        if self.template == "raw":
            batch = answerer.processor(
                images=[list(self.image)], prompts=[self.prompt], max_new_tokens=self.max_new
            )
        else:
            batch = answerer.processor.chat(
                [[user_message(self.prompt, self.image)]],
                template=self.template,
                max_new_tokens=self.max_new,
            )
        if self.stream or sys.stdout.isatty():
            answer = answerer.answer(batch, lambda piece: print(piece, end="", flush=True))
            print()
        else:
            answer = answerer.answer(batch)
            print(answer.strip())
        if self.show_tokens is not None:
            self._draw_tokens(answerer, batch, answer.strip(), self.show_tokens)
        return 0

    def _draw_tokens(self, answerer: Answerer, batch: Batch, answer: str, path: Path) -> None:
        from quota_jax.figures.kept_plot import draw_kept, stage_name
        from quota_jax.figures.pictures import pixel_scale, seen_pictures, token_cells
        from quota_jax.prune.kept import kept_tokens

        kept = kept_tokens(answerer.model, batch, answerer.recipe)
        config, processor = answerer.model.config, answerer.processor.pictures.image_processor
        draw_kept(
            seen_pictures(config, batch, *pixel_scale(processor)),
            token_cells(config, batch)[0],
            [(stage_name(each.stage), each.places[0]) for each in kept],
            path,
            title=f"{self.prompt}  →  {answer}",
        )
        print(f"wrote {path}")
