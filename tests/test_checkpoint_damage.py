"""Damaged, foreign and hostile checkpoint folders are refused in one line that names the file."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from quota_jax.checkpoint import open_checkpoint
from quota_jax.checkpoint.format import seal
from quota_jax.checkpoint.items import load_item, save_item
from quota_jax.errors import QuotaError
from tests.checkpoint_samples import BF16, W4, random_blocks, tiny_config, write


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    config = tiny_config()
    folder = tmp_path_factory.mktemp("original") / "ckpt"
    return write(folder, config, random_blocks(config, W4), W4)


@pytest.fixture
def path(original, tmp_path) -> Path:
    """A fresh copy to damage."""
    return Path(shutil.copytree(original, tmp_path / "ckpt"))


def edit(file: Path, change: Callable[[dict], object], *, sealed: bool = True) -> None:
    """Changes a JSON file as an attacker would, with a matching checksum inside."""
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(seal(data, "test") if sealed else data))


def largest(folder: Path) -> Path:
    return max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


def flip(file: Path, position: float = 0.5) -> None:
    content = bytearray(file.read_bytes())
    content[int(len(content) * position)] ^= 0x10
    file.write_bytes(content)


def assert_refused(action: Callable[[], object], *words: str) -> None:
    """The action raises a QuotaError of one readable line that contains all words."""
    with pytest.raises(QuotaError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    for word in words:
        assert word in message


def test_the_copy_is_good(path):
    open_checkpoint(path).verify_checksums()


@pytest.mark.parametrize(
    "name",
    ["manifest.json", "config.json", "quantization.json", "recipe.json", "assets/tokenizer.json"],
)
def test_missing_files(path, name):
    (path / name).unlink()
    words = ("unfinished",) if name == "manifest.json" else ("missing",)
    assert_refused(lambda: open_checkpoint(path), name, *words)


def test_no_folder(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    assert_refused(
        lambda: open_checkpoint(tmp_path / "absent"), "absent", "no such checkpoint folder"
    )
    assert_refused(lambda: open_checkpoint(tmp_path / "file"), "file", "no such checkpoint folder")
    assert_refused(
        lambda: open_checkpoint(tmp_path / "empty"), "empty", "not a quota_jax checkpoint"
    )


@pytest.mark.parametrize("name", ["manifest.json", "recipe.json"])
@pytest.mark.parametrize(
    ("content", "word"),
    [(b"{", "not valid JSON"), (b"\xff\xfe", "not valid JSON"), (b"[]", "JSON object")],
)
def test_corrupt_json(path, name, content, word):
    (path / name).write_bytes(content)
    assert_refused(lambda: open_checkpoint(path), name, word)


@pytest.mark.parametrize("name", ["config.json", "quantization.json"])
def test_corrupt_json_of_the_right_size(path, name):
    (path / name).write_bytes(b"{" * (path / name).stat().st_size)
    assert_refused(lambda: open_checkpoint(path), name, "not valid JSON")


@pytest.mark.parametrize("version", [0, 2, "1", None, True])
@pytest.mark.parametrize("name", ["manifest.json", "recipe.json"])
def test_unknown_format_version(path, name, version):
    edit(path / name, lambda data: data.update(format_version=version))
    assert_refused(lambda: open_checkpoint(path), name, f"format version {version!r}", "reads 1")


@pytest.mark.parametrize("change", ["truncate", "extend", "empty"])
def test_wrong_file_sizes(path, change):
    file = largest(path / "state" / "decoder_layer_001")
    content = file.read_bytes()
    file.write_bytes({"truncate": content[:-1], "extend": content + b"\0", "empty": b""}[change])
    assert_refused(lambda: open_checkpoint(path), file.name, f"manifest says {len(content)}")


def test_every_file_is_covered_by_a_checksum(path):
    """One flipped byte in any file is found, at opening or by verify_checksums."""
    files = [file for file in sorted(path.rglob("*")) if file.is_file()]
    assert len(files) > 40
    for file in files:
        content = file.read_bytes()
        for position in (0, 0.3, 0.99):
            flip(file, position)
            assert_refused(lambda: open_checkpoint(path).verify_checksums(), file.name)
            file.write_bytes(content)
    open_checkpoint(path).verify_checksums()


def test_a_flipped_weight_of_a_small_file_is_found_when_read(path):
    flip(largest(path / "state" / "embeddings"))
    checkpoint = open_checkpoint(path)
    assert_refused(lambda: checkpoint.read_block("embeddings"), "state/embeddings", "checksum")
    assert_refused(checkpoint.load_model, "state/embeddings", "checksum mismatch")
    assert_refused(checkpoint.verify_checksums, "state/embeddings", "checksum mismatch")


def test_a_flipped_weight_of_a_large_file_is_found_by_verification(tmp_path):
    config = tiny_config(hidden=512, vocab=2**14)
    path = write(tmp_path / "ckpt", config, random_blocks(config))
    file = largest(path / "state" / "embeddings")
    assert file.stat().st_size > 8 << 20
    flip(file)
    checkpoint = open_checkpoint(path)
    checkpoint.read_block("embeddings")
    assert_refused(checkpoint.verify_checksums, "state/embeddings", "checksum mismatch")


def test_orbax_errors_become_one_line(path):
    """Metadata that Orbax cannot read although all checksums are right."""
    name = "state/decoder_layer_000/_METADATA"
    size = (path / name).stat().st_size
    content = b"{" * size
    (path / name).write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()

    def update(data):
        data["blocks"]["decoder_layer_000"]["files"][name]["sha256"] = digest

    edit(path / "manifest.json", update)
    checkpoint = open_checkpoint(path)
    checkpoint.verify_checksums()
    assert_refused(
        lambda: checkpoint.read_block("decoder_layer_000"),
        "decoder_layer_000: damaged, cannot be read",
    )


def test_items_that_hold_other_arrays_than_promised(path):
    """Shape, dtype and names of the item itself are compared with the manifest."""
    specs = open_checkpoint(path).block_specs("head")
    item = path / "state" / "head"
    norm = "decoder.norm.scale"
    for odd in ({norm: np.zeros(33, BF16)}, {norm: np.zeros(32, np.float32)}, {}):
        arrays = {name: np.zeros(spec.shape, spec.dtype) for name, spec in specs.items()}
        arrays = {name: array for name, array in arrays.items() if name != norm} | odd
        shutil.rmtree(item)
        save_item(item, arrays)
        assert_refused(lambda: load_item(item, specs), "state/head")


def test_a_file_that_vanishes_after_opening(path):
    checkpoint = open_checkpoint(path)
    shutil.rmtree(path / "state" / "head")
    assert_refused(lambda: checkpoint.read_block("head"), "state/head", "cannot be read")
    assert_refused(checkpoint.load_model, "state/head", "cannot be read")
    assert_refused(checkpoint.verify_checksums, "state/head", "cannot be read")
    assert_refused(lambda: checkpoint.read_block("tail"), "has no block 'tail'")


@pytest.mark.parametrize("kind", ["data", "state", "config.json", "assets", "manifest.json"])
def test_links_that_leave_the_folder(path, tmp_path, kind):
    inside = largest(path / "state" / "embeddings") if kind == "data" else path / kind
    outside = tmp_path / "outside"
    inside.rename(outside)
    inside.symlink_to(outside)
    assert_refused(lambda: open_checkpoint(path), "leaves the checkpoint folder")


def test_links_inside_the_folder_and_to_the_folder_are_followed(path, tmp_path):
    (path / "config.json").rename(path / "moved.json")
    (path / "config.json").symlink_to("moved.json")
    (tmp_path / "alias").symlink_to(path)
    open_checkpoint(tmp_path / "alias").verify_checksums()


@pytest.mark.parametrize(
    "name", ["../outside", "/etc/hostname", "assets/../../x", "a\\b", "", "a\0b"]
)
def test_manifest_paths_that_leave_the_folder(path, name):
    entry = {"bytes": 1, "sha256": "0" * 64}
    edit(path / "manifest.json", lambda data: data["files"].update({name: entry}))
    assert_refused(lambda: open_checkpoint(path), "manifest.json", "leaves the checkpoint folder")


def test_blocks_stay_in_their_own_folders(path):
    def move(data):
        files = data["blocks"]["head"]["files"]
        files["config.json"] = data["files"]["config.json"]

    edit(path / "manifest.json", move)
    assert_refused(lambda: open_checkpoint(path), "'head'", "'config.json' outside state/head/")


def test_manifest_must_describe_exactly_the_model(path):
    manifest = path / "manifest.json"
    content = manifest.read_bytes()
    params = "decoder.norm.scale"

    def specs(data):
        return data["blocks"]["head"]["params"]

    cases = {
        "block 'head' is missing": lambda data: data["blocks"].pop("head"),
        "block 'tail' is unknown": lambda data: data["blocks"].update(tail=data["blocks"]["head"]),
        "block name '../head'": lambda data: data["blocks"].update({"../head": {}}),
        "parameter 'decoder.norm.scale' is missing": lambda data: specs(data).pop(params),
        "parameter 'more' is unknown": lambda data: specs(data).update(more=specs(data)[params]),
        "bfloat16[33]": lambda data: specs(data)[params].update(shape=[33]),
        "has shape [-1]": lambda data: specs(data)[params].update(shape=[-1]),
        "dtype 'object'": lambda data: specs(data)[params].update(dtype="object"),
        "dtype None": lambda data: specs(data)[params].pop("dtype"),
        "uint8[32]": lambda data: specs(data)[params].update(dtype="uint8"),
        "is malformed": lambda data: data["files"]["config.json"].update(bytes="many"),
        "does not list config.json": lambda data: data["files"].pop("config.json"),
        "JSON object": lambda data: data.update(blocks=[]),
    }
    for word, change in cases.items():
        manifest.write_bytes(content)
        edit(manifest, lambda data, change=change: change(data) and None)
        if word == "block 'tail' is unknown":
            word = "outside state/tail/"
        assert_refused(
            lambda: open_checkpoint(path), "manifest.json" if "name" not in word else "", word
        )


def test_edited_manifest_and_recipe_are_noticed(path):
    for name, change in (
        ("manifest.json", lambda data: data.update(fingerprint="other")),
        ("recipe.json", lambda data: data["provenance"].update(source="elsewhere")),
    ):
        content = (path / name).read_bytes()
        edit(path / name, change, sealed=False)
        assert_refused(lambda: open_checkpoint(path), name, "checksum mismatch")
        (path / name).write_bytes(content)


def test_recipe_of_another_model_is_named(path, tmp_path):
    config = tiny_config(layers=3)
    other = write(tmp_path / "other", config, random_blocks(config))
    shutil.copy(other / "recipe.json", path / "recipe.json")
    assert_refused(
        lambda: open_checkpoint(path), "recipe.json", "3 decoder layers, the model has 2"
    )


@pytest.mark.parametrize("folder", ["assets", "state/head"])
def test_additional_files_are_found_by_verification(path, folder):
    (path / folder / "extra.bin").write_bytes(b"x")
    assert_refused(
        open_checkpoint(path).verify_checksums, "extra.bin", "not part of the checkpoint"
    )
