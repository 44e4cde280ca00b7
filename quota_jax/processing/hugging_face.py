"""Quiet access to transformers and to the JSON files of a checkpoint folder."""

from __future__ import annotations

import json
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from quota_jax.errors import QuotaError


def transformers() -> ModuleType:
    """The transformers package, without its advice to install torch: nothing here needs it."""
    name = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        import transformers as module
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
    return module


class _Silence:
    """Hides Python warnings while any thread is inside.

    The filters belong to the process: with `warnings.catch_warnings` alone, threads that overlap
    put back each other's, and the last one leaves the wrong ones behind.
    """

    def __init__(self):
        self._lock = threading.Lock()
        self._inside = 0
        self._filters = ExitStack()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if not self._inside:
                self._filters.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore")
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside:
                    self._filters.close()


without_warnings = _Silence()


@contextmanager
def quiet() -> Iterator[None]:
    """Hides Python warnings and transformers' log lines below errors."""
    log = transformers().utils.logging
    level = log.get_verbosity()
    with without_warnings():
        log.set_verbosity_error()
        try:
            yield
        finally:
            log.set_verbosity(level)


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type where it has none."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip() if lines else type(error).__name__


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None where there is no file, `QuotaError` where it is damaged."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise QuotaError(f"{path}: not readable as JSON: {first_line(error)}") from None
    if not isinstance(content, dict):
        raise QuotaError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content
