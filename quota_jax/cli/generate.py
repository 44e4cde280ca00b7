"""``quota-jax generate``: one answer about one or more pictures."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Annotated

import tyro

from quota_jax.cli.answering import Answerer, AnswerOptions, user_message
from quota_jax.cli.console import CheckpointPath


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

    def run(self) -> int:
        answerer = Answerer(self.checkpoint, self)
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
            answerer.answer(batch, lambda piece: print(piece, end="", flush=True))
            print()
        else:
            print(answerer.answer(batch).strip())
        return 0
