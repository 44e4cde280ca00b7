"""The safetensors reader: what it reads and refuses, and that nothing leads out of a folder."""

from __future__ import annotations

import fnmatch
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from converters.blocks import all_finite
from converters.hf_reader import INDEX_FILE, HfReader, open_hf
from converters.sources import ASSET_FILES, Source, open_source
from quota_jax.errors import QuotaError
from tests.tiny_models import DTYPES, read_folder, write_tiny_llava


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("num_shards", [1, 3])
def test_reads_every_tensor_as_stored(tmp_path: Path, dtype: str, num_shards: int) -> None:
    folder = write_tiny_llava(tmp_path / "hf", dtype=dtype, num_shards=num_shards)
    reader = open_hf(folder)
    expected = read_folder(folder)
    assert set(reader.infos) == set(expected)
    assert len(reader.files) == num_shards
    for name, array in expected.items():
        found = reader.read(name)
        assert found.dtype == DTYPES[dtype] == reader.dtype(name)
        assert found.shape == reader.infos[name].shape
        assert found.tobytes() == array.tobytes()


def test_other_dtypes_are_refused_by_name(tmp_path: Path) -> None:
    save_file({"counts": np.arange(3)}, tmp_path / "model.safetensors")
    reader = open_hf(tmp_path)
    with pytest.raises(QuotaError, match=r"model\.safetensors: tensor counts is stored as I64"):
        reader.read("counts")


def test_same_compares_dtype_shape_and_bits(tmp_path: Path) -> None:
    zero = np.zeros((3, 2), np.float32)
    tensors = {
        "a": zero,
        "b": zero.copy(),
        "c": -zero,
        "d": zero[:2].copy(),
        "e": zero.astype(np.float16),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    reader = open_hf(tmp_path)
    assert [reader.same("a", other) for other in "abcde"] == [True, True, False, False, False]


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_all_finite_agrees_with_isfinite_on_every_pattern_of_16_bits(dtype: str) -> None:
    patterns = np.arange(2**16, dtype=np.uint16)
    if dtype == "float32":
        values = (patterns.astype(np.uint32) << 16).view(np.float32)
    else:
        values = patterns.view(DTYPES[dtype])
    expected = np.isfinite(values.astype(np.float32))
    assert expected.any()
    assert not expected.all()
    assert all_finite(values[expected])
    for value in values[~expected][::97]:
        assert not all_finite(np.array([1.0, value]).astype(DTYPES[dtype]))


def _index(folder: Path) -> dict:
    return json.loads((folder / INDEX_FILE).read_text())


def _write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("kind", ["absolute", "parent", "inner_parent", "backslash"])
def test_index_paths_that_leave_the_folder_are_refused(tmp_path: Path, kind: str) -> None:
    outside = tmp_path / "outside.safetensors"
    save_file({"secret": np.zeros(1, np.float32)}, outside)
    folder = write_tiny_llava(tmp_path / "hf", num_shards=2)
    path = {
        "absolute": str(outside),
        "parent": "../outside.safetensors",
        "inner_parent": "inner/../../outside.safetensors",
        "backslash": "..\\outside.safetensors",
    }[kind]
    _write_index(folder, {**_index(folder)["weight_map"], "secret": path})
    with pytest.raises(QuotaError, match="leaves the folder") as caught:
        open_hf(folder)
    assert repr(path) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("model.safetensors", HfReader),
        ("config.json", lambda source: source.read_json("config.json")),
        ("tokenizer.json", lambda source: source.read_assets()),
    ],
)
def test_links_out_of_a_local_folder_are_refused(
    tmp_path: Path, name: str, read: Callable[[Source], object]
) -> None:
    folder = write_tiny_llava(tmp_path / "hf")
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    source = open_source(folder)
    with pytest.raises(QuotaError, match="is a link out of the folder"):
        read(source)


def test_links_of_a_hub_cache_are_followed_but_not_beyond_it(tmp_path: Path) -> None:
    cache = tmp_path / "models--owner--name"
    snapshot = write_tiny_llava(cache / "snapshots" / "0123abc", num_shards=2)
    (cache / "blobs").mkdir()
    for number, file in enumerate(sorted(snapshot.iterdir())):
        blob = cache / "blobs" / f"blob{number}"
        file.rename(blob)
        file.symlink_to(os.path.relpath(blob, snapshot))
    assert set(open_hf(snapshot).infos) == set(read_folder(snapshot))
    assert "tokenizer.json" in open_source(snapshot).read_assets()

    other = write_tiny_llava(tmp_path / "models--owner--other" / "blobs")
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(other / "config.json")
    with pytest.raises(QuotaError, match=r"config\.json is a link out of the folder"):
        open_source(snapshot).read_json("config.json")


class _Bomb:
    def __reduce__(self):
        return os.abort, ()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth"])
def test_pickles_are_not_opened_and_the_way_out_is_printed(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(pickle.dumps(_Bomb()))
    with pytest.raises(QuotaError, match="only pickled weights") as caught:
        open_hf(tmp_path)
    message = str(caught.value)
    assert name in message
    assert "python -c" in message
    assert "save_pretrained" in message
    assert message.count("\n") == 0


def test_an_index_of_pickles_is_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(pickle.dumps(_Bomb()))
    _write_index(tmp_path, {"a": "weights.bin"})
    with pytest.raises(QuotaError, match=r"weights\.bin is not safetensors"):
        open_hf(tmp_path)


def test_missing_shard(tmp_path: Path) -> None:
    folder = write_tiny_llava(tmp_path / "hf", num_shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(QuotaError, match=r"model-00002-of-00003\.safetensors is missing"):
        open_hf(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -1])
def test_truncated_shard(tmp_path: Path, keep: float) -> None:
    folder = write_tiny_llava(tmp_path / "hf", num_shards=2)
    shard = folder / "model-00002-of-00002.safetensors"
    whole = shard.read_bytes()
    size = int(len(whole) * keep) if isinstance(keep, float) else keep % len(whole)
    shard.write_bytes(whole[:size])
    with pytest.raises(QuotaError, match=r"model-00002-of-00002\.safetensors is not a whole"):
        open_hf(folder)


@pytest.mark.parametrize(
    "header", [b"{", b"[]", b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,4]}}']
)
def test_corrupt_header(tmp_path: Path, header: bytes) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    with pytest.raises(QuotaError, match=r"model\.safetensors is not a whole safetensors file"):
        open_hf(tmp_path)


def test_index_and_shards_must_agree(tmp_path: Path) -> None:
    folder = write_tiny_llava(tmp_path / "hf", num_shards=2)
    placed = _index(folder)["weight_map"]
    name, file = next(iter(placed.items()))
    other = next(value for value in placed.values() if value != file)

    _write_index(folder, {**placed, "ghost.weight": file})
    with pytest.raises(QuotaError, match=rf"{file} lacks ghost\.weight, listed by"):
        open_hf(folder)

    _write_index(folder, {key: value for key, value in placed.items() if key != name})
    with pytest.raises(QuotaError, match=rf"{file} holds {name}, which .* does not list"):
        open_hf(folder)

    _write_index(folder, placed)
    save_file({**load_file(folder / other), name: np.zeros(1, np.float32)}, folder / other)
    with pytest.raises(QuotaError, match=rf"{other} holds {name}, which .* places in {file}"):
        open_hf(folder)


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_broken_index(tmp_path: Path, content: str) -> None:
    (tmp_path / INDEX_FILE).write_text(content)
    with pytest.raises(QuotaError, match="index"):
        open_hf(tmp_path)


def test_sources_that_are_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(QuotaError, match="is a file; expected"):
        open_hf(tmp_path / "file")
    with pytest.raises(QuotaError, match=r"holds no model\.safetensors"):
        open_hf(tmp_path / "empty")
    for name in ("no/such/folder", "nothing", "../up/one"):
        with pytest.raises(QuotaError, match="neither a folder nor a hub id"):
            open_hf(name)


def test_an_unreachable_hub_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(QuotaError, match="no such folder, and the hub answered") as caught:
        open_hf("owner/name")
    assert "\n" not in str(caught.value)


def test_a_hub_id_downloads_weights_and_processor_files_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub

    asked: dict[str, Any] = {}

    def snapshot_download(repository: str, **options: Any) -> str:
        asked.update(options, repository=repository)
        return str(write_tiny_llava(tmp_path / "models--owner--name" / "snapshots" / "abc"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    reader = open_hf("owner/name@v1.0")
    assert (asked["repository"], asked["revision"]) == ("owner/name", "v1.0")
    assert "language_model.lm_head.weight" in reader.infos
    assert reader.source.root == (tmp_path / "models--owner--name").resolve()
    wanted = {"model-00001-of-00002.safetensors", INDEX_FILE, "config.json", *ASSET_FILES}
    unwanted = {"pytorch_model.bin", "model.pt", "modeling_custom.py", "README.md", "flax.msgpack"}
    matched = {
        name
        for name in wanted | unwanted
        if any(fnmatch.fnmatch(name, pattern) for pattern in asked["allow_patterns"])
    }
    assert matched == wanted


def test_a_failed_transfer_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def snapshot_download(repository: str, **options: Any) -> str:
        raise ConnectionError("connection reset\nsecond line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(QuotaError, match=r"^owner/name: .* hub answered: connection reset$"):
        open_hf("owner/name")
