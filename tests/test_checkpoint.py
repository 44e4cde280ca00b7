"""Round trips of checkpoints: what is written is what is read and what the model gets."""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
from typing import Any

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from quota_jax.checkpoint import open_checkpoint, set_recipe
from quota_jax.errors import QuotaError
from quota_jax.quantization import QuantizationConfig
from quota_jax.recipe import Recipe
from tests.checkpoint_samples import (
    ASSETS,
    BF16,
    NONE,
    W4,
    W8,
    assert_same,
    random_blocks,
    stack,
    stacked_params,
    tiny_config,
    write,
    writer,
)

F32, F16 = np.dtype(np.float32), np.dtype(np.float16)


@pytest.mark.parametrize("quantization", [NONE, W4, W8], ids=["none", "w4", "w8"])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_blocks_and_model_equal_what_was_written(tmp_path, quantization, dtype):
    config = tiny_config()
    arrays = random_blocks(config, quantization, dtype)
    write(tmp_path / "ckpt", config, arrays, quantization)
    checkpoint = open_checkpoint(tmp_path / "ckpt")
    checkpoint.verify_checksums()
    assert checkpoint.config == config
    assert checkpoint.quantization == quantization
    assert checkpoint.dtype == dtype
    assert checkpoint.block_names == tuple(arrays)
    for name, params in arrays.items():
        assert_same(checkpoint.read_block(name), params)
    assert_same(stacked_params(checkpoint.load_model()), stack(arrays))


def test_metadata_survives(tmp_path):
    config = tiny_config()
    options = {
        "provenance": {"source": "a/b", "nested": {"layers": [1, 2]}},
        "hf_config": {"model_type": "llava", "x": None},
        "hf_layout": "llava-old",
    }
    write(tmp_path / "ckpt", config, random_blocks(config), **options)
    checkpoint = open_checkpoint(str(tmp_path / "ckpt"))
    assert checkpoint.provenance == options["provenance"]
    assert checkpoint.hf_config == options["hf_config"]
    assert checkpoint.hf_layout == "llava-old"
    assert checkpoint.recipe == Recipe.none(config.text.num_layers)
    assert checkpoint.fingerprint == "source-1"
    found = {file.name: file.read_bytes() for file in checkpoint.assets_dir.iterdir()}
    assert found == ASSETS
    assert not (tmp_path / "ckpt.partial").exists()
    assert not (tmp_path / "ckpt" / ".journal").exists()


def test_written_text_names_no_folder_of_this_machine(tmp_path):
    config = tiny_config()
    path = write(tmp_path / "ckpt", config, random_blocks(config, W4), W4)
    files = [file for file in path.rglob("*") if file.is_file()]
    assert len(files) > 30
    assert not [file for file in files if str(tmp_path).encode() in file.read_bytes()]


def test_views_and_device_arrays_are_written_by_value(tmp_path):
    config = tiny_config()
    arrays = random_blocks(config, NONE, F32)
    given: dict[str, dict[str, Any]] = {block: dict(params) for block, params in arrays.items()}
    weight = given["head"]["decoder.head.weight"]
    given["head"]["decoder.head.weight"] = np.asfortranarray(weight)
    given["projector"]["projector.linear_1.weight"] = np.repeat(
        given["projector"]["projector.linear_1.weight"], 2, axis=0
    )[::2]
    given["embeddings"] = {k: jnp.asarray(v) for k, v in given["embeddings"].items()}
    write(tmp_path / "ckpt", config, given)
    checkpoint = open_checkpoint(tmp_path / "ckpt")
    for name in ("head", "projector", "embeddings"):
        assert_same(checkpoint.read_block(name), arrays[name])


def test_a_four_bit_block_takes_half_a_byte_per_weight(tmp_path):
    config = tiny_config(hidden=256)
    path = write(tmp_path / "ckpt", config, random_blocks(config, W4), W4)
    block = open_checkpoint(path).block_specs("decoder_layer_000")
    weights = sum(2 * spec.size for name, spec in block.items() if name.endswith(".packed"))
    assert weights == 256 * 256 * (2 + 1 + 4 + 2)
    others = sum(
        spec.size * spec.dtype.itemsize for n, spec in block.items() if not n.endswith(".packed")
    )
    on_disk = sum(
        file.stat().st_size
        for file in (path / "state" / "decoder_layer_000").rglob("*")
        if file.is_file()
    )
    # Random nibbles do not compress. Orbax adds some 7 to 11 KB per block, the more the more often
    # its concurrent writes touch the index.
    assert weights / 2 < on_disk - others < weights / 2 + 32 * 1024


def test_sizes_add_up(tmp_path):
    config = tiny_config(hidden=256)
    arrays = random_blocks(config, W4, BF16)
    path = write(tmp_path / "ckpt", config, arrays, W4)
    sizes = open_checkpoint(path).sizes()
    assert sizes["blocks"] == {
        name: sum(array.nbytes for array in params.values()) for name, params in arrays.items()
    }
    assert sizes["logical"] == sum(sizes["blocks"].values()) == sum(sizes["dtypes"].values())
    assert set(sizes["dtypes"]) == {"bfloat16", "float32", "uint8"}
    files = [file for file in path.rglob("*") if file.is_file()]
    assert sizes["files"] == sum(file.stat().st_size for file in files)
    du = subprocess.run(["du", "-s", "-B1", path], capture_output=True, text=True, check=True)
    assert sizes["disk"] == int(du.stdout.split()[0])


def test_plain_orbax_opens_a_block(tmp_path):
    config = tiny_config()
    arrays = random_blocks(config, W4, F32)
    path = write(tmp_path / "ckpt", config, arrays, W4)
    with ocp.PyTreeCheckpointer() as checkpointer:
        restored = checkpointer.restore(path / "state" / "decoder_layer_001")
    assert_same({k: np.asarray(v) for k, v in restored.items()}, arrays["decoder_layer_001"])


def test_writing_twice_gives_the_same_arrays_and_descriptions(tmp_path):
    config = tiny_config()
    arrays = random_blocks(config, W4)
    for name in ("a", "b"):
        write(tmp_path / name, config, arrays, W4)
    a, b = (open_checkpoint(tmp_path / name) for name in ("a", "b"))
    for name in arrays:
        assert_same(a.read_block(name), b.read_block(name))
    for name in ("config.json", "quantization.json", "recipe.json"):
        assert (a.path / name).read_bytes() == (b.path / name).read_bytes()


def test_nothing_is_printed_or_logged(tmp_path, capfd, caplog):
    caplog.set_level(logging.INFO)
    config = tiny_config()
    write(tmp_path / "ckpt", config, random_blocks(config))
    open_checkpoint(tmp_path / "ckpt").read_block("head")
    assert [record.getMessage() for record in caplog.records] == []
    assert capfd.readouterr() == ("", "")


def test_set_recipe_replaces_recipe_and_extends_provenance(tmp_path):
    config = tiny_config(layers=4)
    path = write(tmp_path / "ckpt", config, random_blocks(config))
    before = {f: f.read_bytes() for f in path.rglob("*") if f.is_file() and f.name != "recipe.json"}
    recipe = Recipe(num_layers=4, stages=(), positions="renumber")
    set_recipe(path, recipe, {"calibration": "64 samples"})
    checkpoint = open_checkpoint(path)
    checkpoint.verify_checksums()
    assert checkpoint.recipe == recipe
    assert checkpoint.provenance == {"source": "random", "calibration": "64 samples"}
    after = {f: f.read_bytes() for f in path.rglob("*") if f.is_file() and f.name != "recipe.json"}
    assert after == before
    with pytest.raises(QuotaError, match="is for 5 decoder layers, the model has 4"):
        set_recipe(path, Recipe.none(5))
    with pytest.raises(QuotaError, match="cannot be written as JSON"):
        set_recipe(path, recipe, {"loss": float("nan")})
    assert open_checkpoint(path).recipe == recipe


def test_inside_a_running_event_loop(tmp_path):
    """Notebooks and servers have one; Orbax must neither fail in it nor replace it."""
    config = tiny_config()
    arrays = random_blocks(config)

    async def main():
        loop = asyncio.get_running_loop()
        run = asyncio.run, asyncio.get_event_loop, type(loop).run_until_complete
        checkpoint = open_checkpoint(write(tmp_path / "ckpt", config, arrays))
        assert_same(checkpoint.read_block("head"), arrays["head"])
        assert asyncio.get_event_loop() is loop
        assert run == (asyncio.run, asyncio.get_event_loop, type(loop).run_until_complete)

    asyncio.run(main())


def test_manifest_lists_every_file_but_the_recipe(tmp_path):
    config = tiny_config()
    path = write(tmp_path / "ckpt", config, random_blocks(config))
    manifest = json.loads((path / "manifest.json").read_text())
    listed = set(manifest["files"]).union(*(b["files"] for b in manifest["blocks"].values()))
    found = {f.relative_to(path).as_posix() for f in path.rglob("*") if f.is_file()}
    assert found - listed == {"manifest.json", "recipe.json"}
    assert listed <= found


def test_the_writer_refuses_what_does_not_fit(tmp_path):
    config = tiny_config()
    arrays = random_blocks(config, W4)
    name, key = "decoder_layer_000", "decoder.layers.attn.o"
    good = arrays[name]
    bad = {
        "no parameter 'extra'": {**good, "extra": good[f"{key}.scale"]},
        "lacks parameter 'decoder.layers.attn.o.scale'": {
            k: v for k, v in good.items() if k != f"{key}.scale"
        },
        r"'decoder.layers.attn.o.packed' has shape \[32, 8\], expected \[32, 16\]": {
            **good,
            f"{key}.packed": good[f"{key}.packed"][:, :8],
        },
        "'decoder.layers.attn.o.packed' has dtype dtype\\('int8'\\), expected uint8": {
            **good,
            f"{key}.packed": good[f"{key}.packed"].view(np.int8),
        },
        "'decoder.layers.attn.o.scale' has dtype .*expected float32": {
            **good,
            f"{key}.scale": good[f"{key}.scale"].astype(BF16),
        },
        "'decoder.layers.norm1.scale' has dtype .*expected bfloat16 or float16 or float32": {
            **good,
            "decoder.layers.norm1.scale": good["decoder.layers.norm1.scale"].astype(">f4"),
        },
    }
    with writer(tmp_path / "ckpt", config, W4) as out:
        for message, params in bad.items():
            with pytest.raises(QuotaError, match=message):
                out.write_block(name, params)
        with pytest.raises(QuotaError, match="'decoder_layer_002' is not part"):
            out.write_block("decoder_layer_002", good)
        out.write_block(name, good)
        with pytest.raises(QuotaError, match="already been written"):
            out.write_block(name, good)
        with pytest.raises(QuotaError, match="9 of 10 blocks are missing, first 'vision_"):
            out.finish()
        assert out.finished == {name}
    assert not (tmp_path / "ckpt").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"assets": {"../evil": b""}}, "asset name '../evil'"),
        ({"assets": {"a/b": b""}}, "asset name 'a/b'"),
        ({"assets": {".hidden": b""}}, "asset name '.hidden'"),
        ({"provenance": {"x": {1, 2}}}, "provenance: cannot be written as JSON"),
        ({"recipe": Recipe.none(7)}, "is for 7 decoder layers"),
    ],
)
def test_the_writer_refuses_bad_options_before_any_work(tmp_path, options, message):
    with pytest.raises(QuotaError, match=message):
        writer(tmp_path / "ckpt", tiny_config(), **options)
    assert list(tmp_path.iterdir()) == []


def test_quantization_of_single_modules_round_trips(tmp_path):
    quantization = QuantizationConfig.parse("W4A8KV4", modules=("decoder",))
    config = tiny_config()
    arrays = random_blocks(config, quantization, F16)
    write(tmp_path / "ckpt", config, arrays, quantization)
    checkpoint = open_checkpoint(tmp_path / "ckpt")
    assert checkpoint.quantization == quantization
    assert_same(stacked_params(checkpoint.load_model()), stack(arrays))
