"""One Orbax item: a flat dictionary of host arrays in one folder.

Items are written straight through the PyTree handler: the checkpoint folder has its own commit
protocol, so Orbax's temporary folders, timestamps and commit markers would only add files (the
marker also records the absolute path). OCDBT keeps small arrays in common files, which matters for
models of a few megabytes; arrays are not compressed, so file bytes are logical bytes plus one to
two per cent.
``orbax.checkpoint.PyTreeCheckpointer().restore(folder)`` opens an item as well.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from quota_jax.errors import QuotaError

_ABSL = logging.getLogger("absl")


def save_item(folder: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes the arrays into ``folder``, which must not exist."""
    try:
        folder.mkdir()
        _in_thread(_save, epath.Path(folder.absolute()), ocp.args.PyTreeSave(dict(arrays)))
    except Exception as error:  # A full disk, for one, arrives as ValueError from TensorStore.
        raise QuotaError(f"{folder}: cannot be written: {_first_line(error)}") from error


def load_item(folder: Path, specs: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, np.ndarray]:
    """Reads the arrays named by ``specs``; shape or dtype other than promised is a QuotaError."""
    request = ocp.args.PyTreeRestore(
        item=dict(specs),
        restore_args={name: ocp.RestoreArgs(restore_type=np.ndarray) for name in specs},
    )
    try:
        arrays = _in_thread(_restore, epath.Path(folder.absolute()), request)
    except Exception as error:  # Orbax, TensorStore and the JSON inside raise many types.
        raise QuotaError(f"{folder}: damaged, cannot be read: {_first_line(error)}") from error
    for name, spec in specs.items():
        array = arrays[name]
        if array.shape != spec.shape or array.dtype != spec.dtype:
            raise QuotaError(
                f"{folder}: parameter {name!r} is {array.dtype}{list(array.shape)}, the "
                f"manifest says {spec.dtype}{list(spec.shape)}"
            )
    return arrays


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


class _OnlyErrors(logging.Filter):
    """Keeps Orbax's notes about its own merge step away from users; errors pass."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR or "orbax" not in record.pathname


def _save(folder: epath.Path, request: ocp.args.PyTreeSave) -> None:
    with _handler() as handler:
        handler.save(folder, args=request)
        handler.finalize(folder)


def _restore(folder: epath.Path, request: ocp.args.PyTreeRestore) -> dict[str, np.ndarray]:
    with _handler() as handler:
        return handler.restore(folder, args=request)


def _in_thread(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls the function in a thread of its own.

    Orbax runs an event loop inside; in the caller's thread it would replace the current loop, or
    patch asyncio if one is running (a server, a notebook).
    """
    with ThreadPoolExecutor(max_workers=1) as executor:
        return executor.submit(function, *arguments).result()


@contextlib.contextmanager
def _handler() -> Iterator[ocp.PyTreeCheckpointHandler]:
    """A handler that is silent while it is open."""
    only_errors = _OnlyErrors()
    _ABSL.addFilter(only_errors)
    try:
        handler = ocp.PyTreeCheckpointHandler(
            use_ocdbt=True, use_zarr3=False, use_compression=False
        )
        try:
            yield handler
        finally:
            handler.close()
    finally:
        _ABSL.removeFilter(only_errors)
