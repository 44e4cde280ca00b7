"""A folder beside a checkpoint for work of several steps: the checkpoint appears when all are done.

Steps that make whole checkpoints of their own, or change one, would otherwise leave an ``out`` that
looks finished after a kill.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from quota_jax.checkpoint.format import encode_json, sync_path, write_file
from quota_jax.errors import QuotaError
from quota_jax.prune.calibration_pass import first_difference

SUFFIX = ".unfinished"
CHECKPOINT, SETTINGS, LOCK = "checkpoint", "settings.json", "lock"


@contextmanager
def unfinished(out: Path, settings: Mapping[str, Any]) -> Iterator[Path]:
    """Gives the place ``OUT.unfinished/checkpoint``, which becomes ``out`` at the end.

    The folder around it is for further files and goes with it. It stays after an error or a kill,
    for the next call with the same ``settings`` (JSON values) to go on; where nothing was made yet
    it goes. Only one process at a time has it.

    Raises:
      QuotaError: ``out`` exists, the folder belongs to other settings, or another process has it.
    """
    if os.path.lexists(out):
        raise QuotaError(f"{out} already exists")
    if not out.parent.is_dir():
        raise QuotaError(f"{out.parent} is not a folder")
    folder = out.with_name(out.name + SUFFIX)
    own = {SETTINGS, LOCK}
    if folder.exists() and not (folder.is_dir() and {*os.listdir(folder)} & own):
        raise QuotaError(f"{folder} is in the way: it is no unfinished work")
    folder.mkdir(exist_ok=True)
    with open(folder / LOCK, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise QuotaError(f"{folder} is being worked on by another process") from None
        _check(folder, json.loads(encode_json(dict(settings), str(folder))), out)
        try:
            yield folder / CHECKPOINT
        except BaseException:
            if {*os.listdir(folder)} <= own:
                shutil.rmtree(folder)
            raise
        os.rename(folder / CHECKPOINT, out)
        sync_path(out.parent)
        shutil.rmtree(folder)


def _check(folder: Path, settings: dict[str, Any], out: Path) -> None:
    """Notes the settings, or compares them with those of the call that began."""
    file = folder / SETTINGS
    if not file.exists():
        write_file(file, encode_json(settings, str(file)))
        return
    found = json.loads(file.read_text())
    if found != settings:
        where = first_difference(found, settings) or "settings"
        raise QuotaError(
            f"{folder} was begun with other settings ({where}): give those to go on, remove it to "
            f"begin {out.name} anew, or choose another --out"
        )
