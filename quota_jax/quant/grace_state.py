"""The saved state of a fine-tuning run, inside the unfinished checkpoint.

It lies in the checkpoint's journal, so a writer with other options clears it, and finishing the
checkpoint removes it.
"""

from __future__ import annotations

import os
import zipfile
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from quota_jax.checkpoint import CheckpointWriter
from quota_jax.checkpoint import format as fmt
from quota_jax.errors import QuotaError

T = TypeVar("T")

_NAME = "training.npz"


def save_state(writer: CheckpointWriter, state: Any, history: list[list[float]]) -> None:
    """Replaces the saved state atomically: after a kill the old or the new one is there.

    Args:
      state: a pytree of arrays.
      history: the metrics of each step.
    """
    path = writer.partial / fmt.JOURNAL / _NAME
    temporary = path.with_name(f"{_NAME}.tmp")
    arrays = {str(i): np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(state))}
    try:
        with open(temporary, "wb") as file:
            np.savez(file, history=np.asarray(history, np.float64), **arrays)  # pyrefly: ignore
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        fmt.sync_path(path.parent)
    except OSError as error:
        raise QuotaError(f"{path}: cannot be written: {error.strerror}") from error


def load_state(writer: CheckpointWriter, state: T) -> tuple[T, list[list[float]]]:
    """The saved state in the form of ``state``, with the metrics of its steps; ``state`` itself and
    none where nothing is saved.

    Raises:
      QuotaError: the file is damaged.
    """
    path = writer.partial / fmt.JOURNAL / _NAME
    if not path.exists():
        return state, []
    leaves, tree = jax.tree.flatten(state)
    try:
        with path.open("rb") as file, np.load(file) as saved:
            found = [saved[str(i)] for i in range(len(leaves))]
            history = saved["history"].tolist()
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        raise QuotaError(f"{path}: damaged; delete {writer.partial} to start anew") from None
    for leaf, array in zip(leaves, found, strict=True):
        if leaf.shape != array.shape or leaf.dtype != array.dtype:
            raise QuotaError(f"{path}: is of another model; delete {writer.partial}")
    return jax.tree.unflatten(tree, [jnp.asarray(array) for array in found]), history
