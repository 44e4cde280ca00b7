"""``quota-jax chat``: a conversation about pictures on the terminal or from a pipe."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from quota_jax.cli.answering import Answerer, AnswerOptions, user_message
from quota_jax.cli.console import CheckpointPath
from quota_jax.errors import QuotaError

HELP = "/image PATH adds a picture to the next question, /reset begins anew, /quit ends"


@dataclass(frozen=True, kw_only=True)
class Chat(AnswerOptions):
    """Talk about pictures: one question per line, from the terminal or from a pipe.

    /image PATH adds a picture to the next question, /reset begins anew, /quit ends. From a pipe,
    the exit status is 2 if any line was refused.

    For example:
      quota-jax chat llava-7b --image cat.png
    """

    checkpoint: CheckpointPath
    """Checkpoint, full precision or quantized."""
    image: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A picture for the first question."""
    template: str | None = None
    """llava, vicuna_v1 or a template of the checkpoint; None takes the checkpoint's own."""

    def run(self) -> int:
        answerer = Answerer(self.checkpoint, self)
        talk = Conversation(answerer, self.template, self.max_new)
        for path in self.image:
            talk.add_picture(path)
        typed = sys.stdin.isatty()
        if typed:
            print(HELP)
        refused = 0
        while (line := _read(typed)) is not None:
            line = line.strip()
            if line == "/quit":
                break
            try:
                if line == "/reset":
                    talk.reset()
                elif line.startswith("/image"):
                    talk.add_picture(line.removeprefix("/image").strip())
                elif line.startswith("/"):
                    raise QuotaError(f"unknown command {line.split()[0]}: {HELP}")
                elif line:
                    talk.ask(line)
            except QuotaError as error:
                refused += 1
                print(f"error: {error}", file=sys.stderr, flush=True)
        return 2 if refused and not typed else 0


class Conversation:
    """Turns so far, and pictures that wait for the next question."""

    def __init__(self, answerer: Answerer, template: str | None, max_new: int):
        self._answerer, self._template, self._max_new = answerer, template, max_new
        self._turns: list[dict[str, Any]] = []
        self._waiting: list[str] = []

    def reset(self) -> None:
        """Forgets turns and waiting pictures."""
        self._turns, self._waiting = [], []

    def add_picture(self, path: str) -> None:
        """Keeps a picture for the next question; reads it now, so that a bad one is told at
        once."""
        if not path:
            raise QuotaError("/image needs the path of a picture")
        self._answerer.processor.pictures.read_all([[path]])
        self._waiting.append(path)

    def ask(self, text: str) -> None:
        """Prints the answer. A question that is refused leaves the conversation as it was."""
        turns = [*self._turns, user_message(text, self._waiting)]
        batch = self._answerer.processor.chat(
            [turns], template=self._template, max_new_tokens=self._max_new
        )
        answer = self._answerer.answer(batch, lambda piece: print(piece, end="", flush=True))
        print(flush=True)
        content = [{"type": "text", "text": answer.strip()}]
        self._turns = [*turns, {"role": "assistant", "content": content}]
        self._waiting = []


def _read(typed: bool) -> str | None:
    """The next line, None at the end of the input."""
    try:
        return input("> " if typed else "")
    except EOFError:
        return None
