"""Arguments to a command's dataclass by tyro; a wrong argument is one line."""

from __future__ import annotations

import contextlib
import inspect
import io
import os
import re
from typing import Any, TypeVar

import tyro

from quota_jax.errors import QuotaError

T = TypeVar("T")

_FRAME = re.compile(r"^[│╭╰─╮╯\s|+]+|[│╭╰─╮╯\s|+]+$")
_RULE = re.compile(r"^[│\s|]*─{3,}[│\s|]*$")


def parse(kind: type[T], name: str, argv: list[str]) -> T | None:
    """The command with its options; None when ``--help`` was asked for and printed.

    Raises:
      QuotaError: unknown, missing or malformed arguments.
    """
    stderr = io.StringIO()
    settings: dict[str, Any] = {
        "prog": f"quota-jax {name}",
        "description": inspect.cleandoc(kind.__doc__ or ""),
        "args": argv,
        "config": (tyro.conf.FlagCreatePairsOff,),
    }
    try:
        with contextlib.redirect_stderr(stderr), _columns(argv):
            return tyro.cli(kind, **settings)
    except SystemExit as stop:
        if not stop.code:
            return None
        reason = _first_paragraph(stderr.getvalue())
        raise QuotaError(f"{reason} (quota-jax {name} --help)") from None


@contextlib.contextmanager
def _columns(argv: list[str]):
    """A very wide terminal, so that errors break no word; help keeps the real one."""
    if {"-h", "--help"} & set(argv):
        yield
        return
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "4000"
    try:
        yield
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before


def _first_paragraph(text: str) -> str:
    """The message inside the first frame that tyro draws, without title, frame and help footer."""
    lines: list[str] = []
    for line in text.splitlines():
        if line.lstrip().startswith("╭"):
            continue
        if _RULE.match(line) or line.lstrip().startswith("╰"):
            break
        lines.append(_FRAME.sub("", line))
    return " ".join(" ".join(lines).split()) or "the arguments cannot be read"
