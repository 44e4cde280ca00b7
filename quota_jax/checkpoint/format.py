"""What lies where in a checkpoint folder, and the file handling that both sides share.

    config.json         model configuration, the Hugging Face one it came from, dominant dtype
    quantization.json   quantization configuration
    recipe.json         pruning recipe and provenance; sealed by its own checksum
    assets/             tokenizer, preprocessor, chat template, generation config
    state/<block>/      one Orbax item (OCDBT, uncompressed) per block, arrays unstacked
    manifest.json       written last: version, blocks, size and sha256 of every other file

Only ``recipe.json`` is not listed in the manifest: it may be replaced later, and one file can be
replaced atomically. ``.journal/`` exists only while a checkpoint is being written.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeGuard

import jax
import ml_dtypes
import numpy as np

from quota_jax.errors import QuotaError
from quota_jax.quantization import QuantizationConfig

FORMAT_VERSION = 1
PARTIAL_SUFFIX = ".partial"
MANIFEST = "manifest.json"
CONFIG = "config.json"
QUANTIZATION = "quantization.json"
RECIPE = "recipe.json"
ASSETS = "assets"
STATE = "state"
JOURNAL = ".journal"

_TABLES = tuple(QuantizationConfig.none.table_bits)
# Parameters of a quantized matrix beside its codes.
_OF_CODES = ("scale", "zeros", "group_index", "input_scale", "left", "right", "clip")

FLOAT_DTYPES = ("bfloat16", "float16", "float32")
_DTYPES = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    **{name: np.dtype(name) for name in ("float16", "float32", "int8", "int32", "uint8")},
}
_BLOCK = re.compile(r"[a-z][a-z0-9_]*")
_ASSET = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._\-]*")
_CHUNK = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class FileEntry:
    """Size in bytes and hexadecimal sha256 of one file."""

    bytes: int
    sha256: str

    def to_json(self) -> dict[str, Any]:
        return {"bytes": self.bytes, "sha256": self.sha256}


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockEntry:
    """What is stored of one block: shape and dtype of each parameter, and the files that hold them.

    ``files`` maps paths relative to the checkpoint folder.
    """

    params: Mapping[str, jax.ShapeDtypeStruct]
    files: Mapping[str, FileEntry]

    @property
    def logical_bytes(self) -> int:
        return sum(spec.size * spec.dtype.itemsize for spec in self.params.values())

    def to_json(self) -> dict[str, Any]:
        return {
            "params": {
                name: {"dtype": spec.dtype.name, "shape": list(spec.shape)}
                for name, spec in sorted(self.params.items())
            },
            "files": {name: entry.to_json() for name, entry in sorted(self.files.items())},
        }

    @classmethod
    def from_json(cls, data: Any, *, where: str) -> BlockEntry:
        """Reads ``to_json``; anything malformed is a QuotaError that starts with ``where``."""
        params = {}
        for name, spec in expect_mapping(expect_mapping(data, where).get("params"), where).items():
            shape, dtype = expect_mapping(spec, where).get("shape"), spec.get("dtype")
            if not isinstance(shape, list) or not all(_is_size(size) for size in shape):
                raise QuotaError(f"{where}: parameter {name!r} has shape {shape!r}")
            params[name] = jax.ShapeDtypeStruct(tuple(shape), stored_dtype(dtype, where))
        return cls(params=params, files=file_entries(data.get("files"), where=where))


def file_entries(data: Any, *, where: str) -> dict[str, FileEntry]:
    """Reads a table of files; paths are checked to be plain relative ones."""
    entries = {}
    for name, entry in expect_mapping(data, where).items():
        parts = PurePosixPath(name).parts
        if not parts or name.startswith("/") or "\\" in name or ".." in parts or "\0" in name:
            raise QuotaError(f"{where}: file {name!r} leaves the checkpoint folder")
        size, digest = expect_mapping(entry, where).get("bytes"), entry.get("sha256")
        if not _is_size(size) or not isinstance(digest, str):
            raise QuotaError(f"{where}: the entry of file {name!r} is malformed")
        entries[name] = FileEntry(bytes=size, sha256=digest)
    return entries


def stored_dtype(name: Any, where: str) -> np.dtype:
    """The numpy dtype of a stored dtype name; bfloat16 comes from ml_dtypes."""
    if not isinstance(name, str) or name not in _DTYPES:
        raise QuotaError(f"{where}: dtype {name!r} is not one of {sorted(_DTYPES)}")
    return _DTYPES[name]


def is_storable(dtype: np.dtype) -> bool:
    return _DTYPES.get(dtype.name) == dtype


def castable(params: Mapping[str, jax.ShapeDtypeStruct]) -> set[str]:
    """Names of the float parameters of free dtype: all but those of quantized matrices.

    Their scales and zeros, and the factors and clipping of their inputs, keep the dtype that the
    codes were made for; so does what belongs to the cache. Scales of token embeddings and head are
    free: they stand for the rows, whose dtype is that of the residual stream.
    """
    fixed = set()
    for name in params:
        stem, _, kind = name.rpartition(".")
        if kind == "codes" and stem in _TABLES:
            fixed.add(name)
        elif kind in ("packed", "codes"):
            fixed |= {name, *(f"{stem}.{part}" for part in _OF_CODES)}
        if stem.endswith(".layers.cache"):
            fixed.add(name)
    return set(params) - fixed


def check_block_name(name: str) -> None:
    if not _BLOCK.fullmatch(name):
        raise QuotaError(f"block name {name!r} must be lower-case letters, digits and underscores")


def check_asset_name(name: str) -> None:
    if not _ASSET.fullmatch(name) or ".." in name:
        raise QuotaError(f"asset name {name!r} is not a plain file name")


def check_version(data: Mapping[str, Any], where: str) -> None:
    version = data.get("format_version")
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise QuotaError(
            f"{where}: format version {version!r} is not supported; "
            f"this release reads {FORMAT_VERSION}"
        )


def seal(data: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The data as it will be read back, with ``sha256`` over the canonical form of the rest."""
    # The round trip turns tuples into lists and keys into strings, as reading will.
    body = json.loads(encode_json(dict(data), where))
    body.pop("sha256", None)
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return {**body, "sha256": hashlib.sha256(canonical.encode()).hexdigest()}


def check_seal(data: Mapping[str, Any], where: str) -> None:
    if data.get("sha256") != seal(data, where)["sha256"]:
        raise QuotaError(f"{where}: checksum mismatch: the file was changed or damaged")


def expect_mapping(data: Any, where: str) -> Mapping[str, Any]:
    """``data`` itself if it is a JSON object."""
    if not isinstance(data, Mapping):
        raise QuotaError(f"{where}: expected a JSON object, got {type(data).__name__}")
    return data


def encode_json(data: Any, where: str) -> bytes:
    """UTF-8 JSON with a final newline; what JSON cannot hold (NaN included) is a QuotaError."""
    try:
        text = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False)
        return text.encode() + b"\n"
    except (TypeError, ValueError) as error:
        raise QuotaError(f"{where}: cannot be written as JSON: {error}") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; unreadable or malformed files are named."""
    try:
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise QuotaError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise QuotaError(f"{path}: not valid JSON: {error}") from None
    return dict(expect_mapping(data, str(path)))


def write_file(path: Path, content: bytes) -> FileEntry:
    """Replaces a file atomically: after a kill it has either its old or its new content."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_path(path.parent)
    except OSError as error:
        raise QuotaError(f"{path}: cannot be written: {error.strerror}") from error
    return FileEntry(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def describe_file(path: Path) -> FileEntry:
    """Size and checksum of a file as it is on disk, read in pieces of 1 MiB."""
    digest, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while piece := file.read(_CHUNK):
            digest.update(piece)
            size += len(piece)
    return FileEntry(bytes=size, sha256=digest.hexdigest())


def sync_path(path: Path) -> None:
    """Flushes one file or directory to the device."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Flushes every file and directory below and including ``folder``."""
    for root, _, files in os.walk(folder):
        for file in files:
            sync_path(Path(root, file))
        sync_path(Path(root))


def walk_files(folder: Path) -> Iterator[Path]:
    """All files and symbolic links below ``folder``, sorted; links are not followed."""
    for root, folders, files in os.walk(folder):
        folders.sort()
        linked = [name for name in folders if os.path.islink(os.path.join(root, name))]
        for name in sorted(files + linked):
            yield Path(root, name)


def remove(path: Path) -> None:
    """Removes a file, link or folder if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()


def _is_size(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
