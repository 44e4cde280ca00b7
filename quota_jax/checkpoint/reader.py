"""Opens finished checkpoints; everything in the folder is checked before it is trusted."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import jax
import numpy as np

from quota_jax.checkpoint import format as fmt
from quota_jax.checkpoint.items import load_item
from quota_jax.checkpoint.recipe_file import check_recipe, read_recipe, recipe_json
from quota_jax.checkpoint.stacking import ShardingLike, stack_blocks
from quota_jax.config import ModelConfig, config_from_json
from quota_jax.errors import QuotaError
from quota_jax.models.params import abstract_params, blocks, build_model
from quota_jax.quantization import QuantizationConfig
from quota_jax.recipe import Recipe

if TYPE_CHECKING:
    from quota_jax.models.vision_language import VisionLanguageModel

# A damaged index makes Orbax fail in the middle of many reads, so indices are checked beforehand.
_ALWAYS_VERIFIED = 8 << 20


class Sizes(TypedDict):
    """Bytes: ``logical`` as arrays, ``files`` as file lengths, ``disk`` as allocated (``du``).

    ``effective`` are the logical bytes if each code took its own bits: weights of 2 and 3 bits are
    stored as 4-bit ones, so that only with them it is less than what anything occupies.
    ``blocks`` and ``dtypes`` split the logical bytes; ``files`` and ``disk`` are the folder's.
    """

    blocks: dict[str, int]
    dtypes: dict[str, int]
    logical: int
    effective: int
    files: int
    disk: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A complete checkpoint folder, opened and checked; made by ``open_checkpoint``.

    ``dtype`` is the float dtype that holds most values of the unquantized parameters. ``hf_config``
    and ``hf_layout`` describe the Hugging Face checkpoint it was converted from, if any.
    """

    path: Path
    config: ModelConfig
    quantization: QuantizationConfig
    recipe: Recipe
    provenance: Mapping[str, Any]
    dtype: np.dtype
    hf_config: Mapping[str, Any] | None
    hf_layout: str | None
    fingerprint: str
    _blocks: Mapping[str, fmt.BlockEntry] = field(repr=False)
    _files: Mapping[str, fmt.FileEntry] = field(repr=False)

    @property
    def assets_dir(self) -> Path:
        """Folder of tokenizer, preprocessor, chat template and generation config."""
        return self.path / fmt.ASSETS

    @property
    def block_names(self) -> tuple[str, ...]:
        """All blocks in model order."""
        return tuple(self._blocks)

    def block_specs(self, name: str) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and stored dtype of every parameter of a block, without reading it."""
        return dict(self._block(name).params)

    def read_block(self, name: str) -> dict[str, np.ndarray]:
        """The arrays of one block on the host, unstacked, in their stored dtypes.

        Files of up to 8 MiB (all of a small model, the indices of a large one) are checked against
        their sha256 each time.
        """
        small = {k: v for k, v in self._block(name).files.items() if v.bytes <= _ALWAYS_VERIFIED}
        self._verify(small)
        return load_item(self.path / fmt.STATE / name, self._block(name).params)

    def load_model(self, dtype: Any = None, sharding: ShardingLike = None) -> VisionLanguageModel:
        """The model on the device, filled block by block.

        Peak host memory is about one block, peak device memory the model plus one block.

        Args:
            dtype: float32, bfloat16 or float16 for all parameters that are neither integers nor
                scales of quantized matrices. None keeps what is stored: matrices take
                ``self.dtype``, vectors (norms, biases) their own dtype, or ``self.dtype`` where the
                layers of one stack differ.
            sharding: for all parameters, or a function from the name of a parameter of the stacked
                model to its sharding or None. None puts everything on the default device.
        """
        specs = self._load_specs(dtype)
        arrays = stack_blocks((self.read_block(name) for name in self._blocks), specs, sharding)
        return build_model(self.config, self.quantization, arrays)

    def verify_checksums(self) -> None:
        """Reads every file; a changed, missing or additional one is a QuotaError that names it."""
        self._verify(self._files)
        for folder in (fmt.STATE, fmt.ASSETS):
            for path in fmt.walk_files(self.path / folder):
                if path.relative_to(self.path).as_posix() not in self._files:
                    raise QuotaError(f"{path}: is not part of the checkpoint")
        read_recipe(self.path / fmt.RECIPE, self.config)

    def sizes(self) -> Sizes:
        """Logical bytes per block and per dtype, file bytes and allocated bytes (``du``)."""
        dtypes: Counter[str] = Counter()
        saved = 0
        for block, entry in self._blocks.items():
            bits = self.quantization.at(block).weight_bits
            for name, spec in entry.params.items():
                dtypes[spec.dtype.name] += spec.size * spec.dtype.itemsize
                if name.endswith(".packed"):
                    saved += spec.size * (8 - 2 * bits) // 8
        files = [os.lstat(path) for path in fmt.walk_files(self.path)]
        folders = [os.lstat(root) for root, _, _ in os.walk(self.path)]
        per_block = {name: entry.logical_bytes for name, entry in self._blocks.items()}
        return Sizes(
            blocks=per_block,
            dtypes=dict(sorted(dtypes.items())),
            logical=sum(per_block.values()),
            effective=sum(per_block.values()) - saved,
            files=sum(stat.st_size for stat in files),
            # st_blocks counts units of 512 bytes whatever the file system's block size.
            disk=512 * sum(stat.st_blocks for stat in files + folders),
        )

    def _verify(self, files: Mapping[str, fmt.FileEntry]) -> None:
        for name, entry in files.items():
            path = self.path / name
            try:
                found = fmt.describe_file(path)
            except OSError as error:
                raise QuotaError(f"{path}: cannot be read: {error.strerror}") from None
            if found != entry:
                raise QuotaError(f"{path}: checksum mismatch: the file was changed or damaged")

    def _block(self, name: str) -> fmt.BlockEntry:
        if name not in self._blocks:
            raise QuotaError(f"{self.path}: has no block {name!r}")
        return self._blocks[name]

    def _load_specs(self, dtype: Any) -> dict[str, jax.ShapeDtypeStruct]:
        """The stacked parameters with the dtypes that ``load_model(dtype)`` gives them."""
        wanted = None if dtype is None else _float_dtype(dtype)
        stacked = abstract_params(self.config, self.quantization)
        stored: dict[str, set[np.dtype]] = {}
        ranks: dict[str, int] = {}
        for entry in self._blocks.values():
            for name, spec in entry.params.items():
                stored.setdefault(name, set()).add(spec.dtype)
                ranks[name] = len(spec.shape)
        free = fmt.castable(stacked)
        specs = {}
        for name, spec in stacked.items():
            dtypes = stored[name]
            if name in free and wanted is not None:
                dtypes = {wanted}
            elif name in free and (ranks[name] > 1 or len(dtypes) > 1):
                dtypes = {self.dtype}
            (only,) = dtypes
            specs[name] = jax.ShapeDtypeStruct(spec.shape, only)
        return specs


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Opens a finished checkpoint; anything missing, cut short, foreign or unsafe is a QuotaError.

    Sizes of all files are checked, their content only by ``verify_checksums``. No path or symbolic
    link that leaves the folder is followed.
    """
    path = Path(path)
    if not path.is_dir():
        raise QuotaError(f"{path}: no such checkpoint folder")
    root = path.resolve()
    if path.name.endswith(fmt.PARTIAL_SUFFIX):
        raise QuotaError(f"{path}: is an unfinished checkpoint; run the command that made it again")
    if not os.path.lexists(path / fmt.MANIFEST):
        raise QuotaError(
            f"{path}: has no {fmt.MANIFEST}: unfinished, or not a quota_jax checkpoint"
        )
    manifest = _read(path, root, fmt.MANIFEST)
    files = fmt.file_entries(manifest.get("files"), where=str(path / fmt.MANIFEST))
    entries = _read_blocks(manifest, str(path / fmt.MANIFEST))
    files |= {name: entry for block in entries.values() for name, entry in block.files.items()}
    for required in (fmt.CONFIG, fmt.QUANTIZATION):
        if required not in files:
            raise QuotaError(f"{path / fmt.MANIFEST}: does not list {required}")
    for name, entry in files.items():
        _check_file(path, root, name, entry)
    fmt.check_seal(manifest, str(path / fmt.MANIFEST))

    config_json = _read(path, root, fmt.CONFIG)
    quantization_json = _read(path, root, fmt.QUANTIZATION)
    _check_file(path, root, fmt.RECIPE, None)
    where = str(path / fmt.CONFIG)
    try:
        config = config_from_json(fmt.expect_mapping(config_json.get("model"), "model"))
    except QuotaError as error:
        raise QuotaError(f"{where}: {error}") from None
    try:
        quantization = QuantizationConfig.from_json(
            fmt.expect_mapping(quantization_json.get("quantization"), "quantization")
        )
    except QuotaError as error:
        raise QuotaError(f"{path / fmt.QUANTIZATION}: {error}") from None
    recipe, provenance = read_recipe(path / fmt.RECIPE, config)
    return Checkpoint(
        path=path,
        config=config,
        quantization=quantization,
        recipe=recipe,
        provenance=provenance,
        dtype=fmt.stored_dtype(config_json.get("dtype"), where),
        hf_config=config_json.get("hf_config"),
        hf_layout=config_json.get("hf_layout"),
        fingerprint=str(manifest.get("fingerprint")),
        _blocks=_ordered(entries, blocks(config, quantization), str(path / fmt.MANIFEST)),
        _files=files,
    )


def set_recipe(
    path: str | os.PathLike[str], recipe: Recipe, provenance: Mapping[str, Any] | None = None
) -> None:
    """Replaces the recipe of a finished checkpoint by one atomic rename; all else stays as it is.

    ``provenance`` entries are added to the stored ones, replacing those of the same name.
    """
    checkpoint = open_checkpoint(path)
    check_recipe(recipe, checkpoint.config, "recipe")
    merged = {**checkpoint.provenance, **(provenance or {})}
    content = fmt.encode_json(recipe_json(recipe, merged), "provenance")
    fmt.write_file(checkpoint.path / fmt.RECIPE, content)


def _read(path: Path, root: Path, name: str) -> dict[str, Any]:
    """A JSON file of the folder whose format version is known."""
    _check_file(path, root, name, None)
    data = fmt.read_json(path / name)
    fmt.check_version(data, str(path / name))
    return data


def _read_blocks(manifest: Mapping[str, Any], where: str) -> dict[str, fmt.BlockEntry]:
    entries = {}
    for name, data in fmt.expect_mapping(manifest.get("blocks"), where).items():
        fmt.check_block_name(name)
        entry = fmt.BlockEntry.from_json(data, where=f"{where}: block {name!r}")
        folder = f"{fmt.STATE}/{name}/"
        if strays := [file for file in entry.files if not file.startswith(folder)]:
            raise QuotaError(f"{where}: block {name!r} lists {strays[0]!r} outside {folder}")
        entries[name] = entry
    return entries


def _check_file(path: Path, root: Path, name: str, entry: fmt.FileEntry | None) -> None:
    """A regular file inside the folder, of the listed size, reached without leaving the folder."""
    file = path / name
    real = Path(os.path.realpath(file))
    if not real.is_relative_to(root):
        raise QuotaError(f"{file}: is a link that leaves the checkpoint folder")
    if not real.is_file():
        raise QuotaError(f"{file}: is missing")
    size = real.stat().st_size
    if entry is not None and size != entry.bytes:
        raise QuotaError(f"{file}: has {size} bytes, the manifest says {entry.bytes}")


def _ordered(
    entries: Mapping[str, fmt.BlockEntry],
    expected: Mapping[str, Mapping[str, jax.ShapeDtypeStruct]],
    where: str,
) -> dict[str, fmt.BlockEntry]:
    """The entries in model order, after checking that they are exactly the model's parameters."""
    if set(entries) != set(expected):
        odd = sorted(set(entries) ^ set(expected))[0]
        raise QuotaError(f"{where}: block {odd!r} is {'missing' if odd in expected else 'unknown'}")
    for name, params in expected.items():
        found = entries[name].params
        if set(found) != set(params):
            odd = sorted(set(found) ^ set(params))[0]
            state = "missing" if odd in params else "unknown"
            raise QuotaError(f"{where}: block {name!r}: parameter {odd!r} is {state}")
        free = fmt.castable(params)
        for key, spec in params.items():
            dtype = found[key].dtype
            fits = dtype.name in fmt.FLOAT_DTYPES if key in free else dtype == spec.dtype
            if found[key].shape != spec.shape or not fits:
                raise QuotaError(
                    f"{where}: block {name!r}: parameter {key!r} is {dtype}"
                    f"{list(found[key].shape)}, the model needs {spec.dtype}{list(spec.shape)}"
                )
    return {name: entries[name] for name in expected}


def _float_dtype(dtype: Any) -> np.dtype:
    try:
        name = np.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    if name not in fmt.FLOAT_DTYPES:
        raise QuotaError(f"dtype {name!r} is not one of {list(fmt.FLOAT_DTYPES)}")
    return fmt.stored_dtype(name, "dtype")
