"""Writes a checkpoint block by block, so that a kill at any moment loses at most one block."""

from __future__ import annotations

import fcntl
import importlib.metadata
import logging
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np

from quota_jax.checkpoint import format as fmt
from quota_jax.checkpoint.items import load_item, save_item
from quota_jax.checkpoint.recipe_file import check_recipe, recipe_json
from quota_jax.config import ModelConfig
from quota_jax.errors import QuotaError
from quota_jax.models.params import blocks
from quota_jax.quantization import QuantizationConfig
from quota_jax.recipe import Recipe

_log = logging.getLogger(__name__)
_SESSION = "session.json"
_LOCK = "lock"


class CheckpointWriter:
    """Context manager that builds ``path`` inside ``<path>.partial`` and renames it at the end.

    Each ``write_block`` is on disk and in the journal when it returns. Leaving by exception, or
    without ``finish``, keeps the partial folder; a writer with the same fingerprint, config and
    quantization goes on from there (``finished``), any other starts anew. One process at a time: a
    second one is refused.

    Args:
        path: folder to make; refused if anything is there.
        provenance: JSON values about where the model comes from, kept in recipe.json.
        assets: file name to content, for tokenizer, preprocessor and the like.
        fingerprint: identifies the source and options; equal fingerprints promise equal arrays.
        hf_config: the Hugging Face config.json the model came from, kept for export.
        hf_layout: name of the tensor naming scheme of the source, kept for export.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        config: ModelConfig,
        quantization: QuantizationConfig,
        recipe: Recipe | None = None,
        provenance: Mapping[str, Any],
        assets: Mapping[str, bytes],
        fingerprint: str,
        hf_config: Mapping[str, Any] | None = None,
        hf_layout: str | None = None,
    ):
        self.path = Path(path).absolute()
        self.partial = self.path.with_name(self.path.name + fmt.PARTIAL_SUFFIX)
        self._recipe = Recipe.none(config.text.num_layers) if recipe is None else recipe
        check_recipe(self._recipe, config, "recipe")
        for name in assets:
            fmt.check_asset_name(name)
        self._assets = dict(assets)
        self._config_json = {
            "format_version": fmt.FORMAT_VERSION,
            "model": config.to_json(),
            "hf_config": None if hf_config is None else dict(hf_config),
            "hf_layout": hf_layout,
        }
        self._quantization_json = {
            "format_version": fmt.FORMAT_VERSION,
            "quantization": quantization.to_json(),
        }
        self._recipe_json = recipe_json(self._recipe, provenance)
        self._expected = blocks(config, quantization)
        for name in self._expected:
            fmt.check_block_name(name)
        self._fingerprint = fingerprint
        self._session = fmt.seal(
            {
                "format_version": fmt.FORMAT_VERSION,
                "fingerprint": fingerprint,
                "model": self._config_json["model"],
                "quantization": self._quantization_json["quantization"],
            },
            "config",
        )
        self._entries: dict[str, fmt.BlockEntry] = {}
        self._lock: int | None = None
        # Refuse before hours of work what finish() could not write.
        fmt.encode_json(self._config_json, "config")
        self._refuse_existing()

    def __enter__(self) -> CheckpointWriter:
        self._acquire()
        try:
            self._resume()
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._release()

    @property
    def finished(self) -> frozenset[str]:
        """Names of the blocks that are safely on disk."""
        self._check_open()
        return frozenset(self._entries)

    @property
    def missing(self) -> tuple[str, ...]:
        """Names of the blocks still to be written, in model order."""
        self._check_open()
        return tuple(name for name in self._expected if name not in self._entries)

    def write_block(self, name: str, params: Mapping[str, np.ndarray | jax.Array]) -> None:
        """Writes one block; when this returns the block survives a kill and a power cut.

        Names and shapes must be those of ``blocks(config, quantization)[name]``; float parameters
        may be float32, bfloat16 or float16, everything else has exactly the expected dtype.
        """
        self._check_open()
        if name in self._entries:
            raise QuotaError(f"{self.partial}: block {name!r} has already been written")
        arrays = self._checked(name, params)
        folder = self.partial / fmt.STATE / name
        fmt.remove(folder)
        save_item(folder, arrays)
        fmt.sync_tree(folder)
        fmt.sync_path(folder.parent)
        entry = fmt.BlockEntry(
            params={key: jax.ShapeDtypeStruct(a.shape, a.dtype) for key, a in arrays.items()},
            files={
                self._relative(file): fmt.describe_file(file) for file in fmt.walk_files(folder)
            },
        )
        content = fmt.seal({"session": self._session["sha256"], **entry.to_json()}, name)
        fmt.write_file(self._journal / f"{name}.json", fmt.encode_json(content, name))
        self._entries[name] = entry

    def read_block(self, name: str) -> dict[str, np.ndarray]:
        """The arrays of a block that has been written, in their stored dtypes."""
        self._check_open()
        return load_item(self.partial / fmt.STATE / name, self._entries[name].params)

    def finish(self) -> None:
        """Writes the small files, the manifest, and renames the folder into place.

        A missing block is a QuotaError that names it; the partial folder then stays as it is.
        """
        self._check_open()
        if self.missing:
            raise QuotaError(
                f"{self.partial}: cannot finish, {len(self.missing)} of {len(self._expected)} "
                f"blocks are missing, first {self.missing[0]!r}"
            )
        self._refuse_existing()
        files = self._write_small_files()
        manifest = {
            "format_version": fmt.FORMAT_VERSION,
            "creator": {"name": "quota-jax", "version": _version()},
            "fingerprint": self._fingerprint,
            "files": {name: entry.to_json() for name, entry in sorted(files.items())},
            "blocks": {name: self._entries[name].to_json() for name in self._expected},
        }
        content = fmt.encode_json(fmt.seal(manifest, fmt.MANIFEST), fmt.MANIFEST)
        fmt.write_file(self.partial / fmt.MANIFEST, content)
        self._refuse_existing()
        os.rename(self.partial, self.path)
        fmt.sync_path(self.path.parent)
        # Only now: until the rename the journal is what makes the folder resumable.
        fmt.remove(self.path / fmt.JOURNAL)
        self._release()

    @property
    def _journal(self) -> Path:
        return self.partial / fmt.JOURNAL

    def _relative(self, file: Path) -> str:
        return file.relative_to(self.partial).as_posix()

    def _refuse_existing(self) -> None:
        if self.path.name.endswith(fmt.PARTIAL_SUFFIX):
            raise QuotaError(f"{self.path}: names ending in {fmt.PARTIAL_SUFFIX} are reserved")
        if os.path.lexists(self.path):
            raise QuotaError(f"{self.path} already exists")
        if not self.path.parent.is_dir():
            raise QuotaError(f"{self.path.parent} is not a folder")

    def _check_open(self) -> None:
        if self._lock is None:
            raise RuntimeError("CheckpointWriter is used outside its with block or after finish()")

    def _acquire(self) -> None:
        """Locks the partial folder for this process, making it if need be."""
        self._refuse_existing()
        if self.partial.is_symlink() or (self.partial.exists() and not self.partial.is_dir()):
            raise QuotaError(f"{self.partial} is in the way: it is not a folder")
        if self.partial.is_dir() and not self._journal.is_dir() and any(self.partial.iterdir()):
            raise QuotaError(f"{self.partial} is in the way: it is not an unfinished checkpoint")
        try:
            self._journal.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            lock = os.open(self._journal / _LOCK, flags, 0o666)
        except OSError as error:
            raise QuotaError(f"{self.partial}: cannot be written: {error.strerror}") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(lock)
            if isinstance(error, BlockingIOError):
                raise QuotaError(f"{self.partial} is being written by another process") from None
            raise QuotaError(f"{self.partial}: cannot be locked: {error.strerror}") from None
        self._lock = lock
        # Another writer may have renamed its finished folder between our check and our lock.
        if os.path.lexists(self.path) or not self._holds_lock():
            self._release()
            raise QuotaError(f"{self.path} has just been written by another process")

    def _holds_lock(self) -> bool:
        try:
            seen = os.stat(self._journal / _LOCK)
        except FileNotFoundError:
            return False
        held = os.fstat(self._lock if self._lock is not None else -1)
        return (seen.st_dev, seen.st_ino) == (held.st_dev, held.st_ino)

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _resume(self) -> None:
        """Takes over the finished blocks of a matching partial folder, removes the rest."""
        fmt.remove(self.partial / fmt.MANIFEST)
        session = self._journal / _SESSION
        state = self.partial / fmt.STATE
        if session.exists() and not self._matches(session):
            _log.warning(
                "%s: written from another source or with other options: starting anew", self.partial
            )
            self._clear()
        if not session.exists():
            self._clear()
            fmt.write_file(session, fmt.encode_json(self._session, _SESSION))
        state.mkdir(exist_ok=True)
        fmt.sync_path(self.partial)
        fmt.sync_path(self.partial.parent)
        for name in self._expected:
            if (self._journal / f"{name}.json").exists():
                entry = self._intact(name)
                if entry is not None:
                    self._entries[name] = entry
        for path in state.iterdir():
            if path.name not in self._entries:
                fmt.remove(path)
        if self._entries:
            _log.info(
                "%s: resuming, %d of %d blocks are done",
                self.partial,
                len(self._entries),
                len(self._expected),
            )

    def _matches(self, session: Path) -> bool:
        try:
            return fmt.read_json(session).get("sha256") == self._session["sha256"]
        except QuotaError:
            return False

    def _clear(self) -> None:
        """Empties the partial folder, the journal's record of finished blocks first."""
        kept = self._journal / _LOCK
        for path in [*self._journal.iterdir(), *self.partial.iterdir()]:
            if path not in (kept, self._journal):
                fmt.remove(path)

    def _intact(self, name: str) -> fmt.BlockEntry | None:
        """The journal entry of a block whose files still have their checksums, else None."""
        path = self._journal / f"{name}.json"
        try:
            content = fmt.read_json(path)
            fmt.check_seal(content, str(path))
            entry = fmt.BlockEntry.from_json(content, where=str(path))
            if content.get("session") != self._session["sha256"]:
                raise QuotaError(f"{path}: belongs to another session")
            folder = self.partial / fmt.STATE / name
            found = {self._relative(f): fmt.describe_file(f) for f in fmt.walk_files(folder)}
            if found != entry.files:
                raise QuotaError(f"{folder}: does not have the files that were written")
        except (QuotaError, OSError) as error:
            _log.warning("%s: block %s will be written again", error, name)
            fmt.remove(path)
            return None
        return entry

    def _checked(
        self, name: str, params: Mapping[str, np.ndarray | jax.Array]
    ) -> dict[str, np.ndarray]:
        """The arrays of a block in expected order, or a QuotaError that names the parameter."""
        if name not in self._expected:
            raise QuotaError(f"block {name!r} is not part of this model")
        expected = self._expected[name]
        if missing := sorted(set(expected) - set(params)):
            raise QuotaError(f"block {name!r} lacks parameter {missing[0]!r}")
        if unknown := sorted(set(params) - set(expected)):
            raise QuotaError(f"block {name!r} has no parameter {unknown[0]!r}")
        free = fmt.castable(expected)
        arrays = {}
        for key, spec in expected.items():
            array = np.asarray(params[key])
            if array.shape != spec.shape:
                raise QuotaError(
                    f"block {name!r}: parameter {key!r} has shape {list(array.shape)}, expected "
                    f"{list(spec.shape)}"
                )
            allowed = fmt.FLOAT_DTYPES if key in free else (np.dtype(spec.dtype).name,)
            if array.dtype.name not in allowed or not fmt.is_storable(array.dtype):
                raise QuotaError(
                    f"block {name!r}: parameter {key!r} has dtype {array.dtype!r}, expected "
                    f"{' or '.join(allowed)}"
                )
            arrays[key] = array
        return arrays

    def _write_small_files(self) -> dict[str, fmt.FileEntry]:
        """config, quantization, recipe and assets; the entries of those that the manifest lists."""
        config = {**self._config_json, "dtype": self._dominant_dtype()}
        small = {
            fmt.CONFIG: fmt.encode_json(config, fmt.CONFIG),
            fmt.QUANTIZATION: fmt.encode_json(self._quantization_json, fmt.QUANTIZATION),
        }
        fmt.remove(self.partial / fmt.ASSETS)
        (self.partial / fmt.ASSETS).mkdir()
        small |= {f"{fmt.ASSETS}/{name}": content for name, content in self._assets.items()}
        entries = {name: fmt.write_file(self.partial / name, data) for name, data in small.items()}
        recipe = fmt.encode_json(self._recipe_json, fmt.RECIPE)
        fmt.write_file(self.partial / fmt.RECIPE, recipe)
        return entries

    def _dominant_dtype(self) -> str:
        """The dtype that holds most values of the unquantized float parameters."""
        values: Counter[str] = Counter()
        for entry in self._entries.values():
            for key in fmt.castable(entry.params):
                values[entry.params[key].dtype.name] += entry.params[key].size
        return max(sorted(values), key=values.__getitem__)


def _version() -> str:
    try:
        return importlib.metadata.version("quota-jax")
    except importlib.metadata.PackageNotFoundError:
        return "source tree"
