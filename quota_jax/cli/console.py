"""What the commands share on the terminal: sizes, tables, progress bars, access to converters."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Annotated

import tyro

from quota_jax.errors import QuotaError

CheckpointPath = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CHECKPOINT")]


def size(count: float) -> str:
    """Bytes in decimal units: ``24.1 MB``."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def table(header: Sequence[str], rows: Sequence[Sequence[object]], *, left: int = 1) -> str:
    """Columns padded with spaces; the first ``left`` ones flush left, the others flush right."""
    cells = [list(map(str, row)) for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if place < left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


@contextmanager
def progress(title: str) -> Iterator[Callable[[int, int, str], None]]:
    """A bar on stderr, fed with (done, total, name); silent where stderr is no terminal."""
    from tqdm import tqdm

    with tqdm(desc=title, unit="block", disable=None, leave=False) as bar:

        def step(done: int, total: int, name: str) -> None:
            bar.total = total
            bar.set_postfix_str(name, refresh=False)
            bar.update(done - bar.n)

        yield step


def converters() -> ModuleType:
    """This project's package ``converters``; another one of that general name is one clear line."""
    module = importlib.import_module("converters")
    if not all(hasattr(module, name) for name in ("convert", "export_hf", "verify")):
        where = getattr(module, "__file__", None) or list(getattr(module, "__path__", []))
        raise QuotaError(f"another package named 'converters' is found first: {where}")
    return module
