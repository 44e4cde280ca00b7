"""Exports of quantized checkpoints, read back exactly: by us, and by compressed-tensors itself."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from converters import convert, export_compressed_tensors, export_native
from converters.export_quantized import dequantized_weight
from converters.rules import Assignment, Piece
from quota_jax.checkpoint import Checkpoint, CheckpointWriter, open_checkpoint
from quota_jax.cli import main
from quota_jax.errors import QuotaError
from quota_jax.models.params import blocks
from quota_jax.quant.calibrate import calibrate
from quota_jax.quantization import QuantizationConfig
from tests.tiny_models import write_tiny_llava
from tests.tiny_quantized import gptq, quantize_folder
from tests.tiny_qwen import write_tiny_qwen
from tests.tiny_tensors import read_folder

K_PROJ = "language_model.model.layers.1.self_attn.k_proj."


def quantized(path: Path, label: str, **options: Any) -> QuantizationConfig:
    config = QuantizationConfig.parse(label, **options)
    calibrate(path / "full", path / "ckpt", config)
    return config


def weight_of(checkpoint: Checkpoint, block: str, name: str) -> np.ndarray:
    """The whole float32 matrix of a linear of a block."""
    params = checkpoint.read_block(block)
    rows = params[f"{name}.packed"].shape
    shape = (rows[0], 2 * rows[1])
    piece = Piece(name=name, shape=shape)
    assignment = Assignment(param=f"{name}.weight", shape=shape, pieces=(piece,))
    return dequantized_weight(params, assignment, checkpoint.quantization)


@pytest.mark.parametrize(
    ("label", "symmetric", "dtype"),
    [
        pytest.param("W4A16G16", False, "bfloat16", marks=pytest.mark.slow),
        ("W4A16", True, "float16"),
    ],
)
def test_compressed_tensors_comes_back_as_it_was(tmp_path, label, symmetric, dtype) -> None:
    write_tiny_llava(tmp_path / "hf", dtype=dtype)
    convert(tmp_path / "hf", tmp_path / "full")
    quantized(tmp_path, label, symmetric=symmetric)
    command = ["export", str(tmp_path / "ckpt"), "--format", "compressed-tensors"]
    assert main([*command, "--out", str(tmp_path / "ct")]) == 0
    tensors = read_folder(tmp_path / "ct")
    assert tensors[K_PROJ + "weight_packed"].dtype == np.int32
    assert tensors[K_PROJ + "weight_shape"].tolist() == [32, 64]
    assert tensors[K_PROJ + "weight_scale"].dtype == (dtype if label != "W4A16" else "float32")
    assert (K_PROJ + "weight_zero_point" in tensors) == (not symmetric)

    first = open_checkpoint(tmp_path / "ckpt")
    again = open_checkpoint(convert(tmp_path / "ct", tmp_path / "again"))
    assert again.quantization.modules == ("decoder",)
    for block in first.block_names:
        mine, back = first.read_block(block), again.read_block(block)
        for key, value in back.items():
            expected = mine.get(key)
            if expected is None:
                # Vision tower and projector are written in floating point.
                expected = weight_of(first, block, key.removesuffix(".weight")).astype(dtype)
            assert value.dtype == expected.dtype, key
            np.testing.assert_array_equal(value, expected, err_msg=key)


def test_act_order_goes_out_as_it_came_in(tmp_path) -> None:
    folder = write_tiny_llava(tmp_path / "hf")
    references = quantize_folder(
        folder, gptq(checkpoint_format="gptq_v2"), act_order=True, scale_dtype=np.float32
    )
    convert(folder, tmp_path / "ckpt")
    export_compressed_tensors(tmp_path / "ckpt", tmp_path / "ct")
    section = json.loads((tmp_path / "ct" / "config.json").read_text())["quantization_config"]
    assert section["config_groups"]["group_0"]["weights"]["actorder"] == "group"
    before = open_checkpoint(tmp_path / "ckpt")
    after = open_checkpoint(convert(tmp_path / "ct", tmp_path / "again"))
    for block in before.block_names:
        mine, back = before.read_block(block), after.read_block(block)
        assert mine.keys() == back.keys()
        for key, value in mine.items():
            np.testing.assert_array_equal(value, back[key])
    assert len(references) == 14


def test_native_holds_transforms_clipping_and_codes(tmp_path) -> None:
    """A FlatQuant checkpoint with random content, and an 8-bit one; read back by hand."""
    convert(write_tiny_qwen(tmp_path / "hf"), tmp_path / "full")
    full = open_checkpoint(tmp_path / "full")
    rng = np.random.default_rng(0)
    config = QuantizationConfig.parse("W4A4KV4", method="flatquant")
    content: dict[str, dict[str, np.ndarray]] = {}
    with CheckpointWriter(
        tmp_path / "flat",
        config=full.config,
        quantization=config,
        provenance={},
        assets={},
        fingerprint="flat",
    ) as writer:
        for block, specs in blocks(full.config, config).items():
            content[block] = {
                name: rng.integers(0, 256, s.shape).astype(s.dtype)
                if s.dtype == jnp.uint8
                else rng.standard_normal(s.shape).astype(s.dtype)
                for name, s in specs.items()
            }
            writer.write_block(block, content[block])
        writer.finish()
    export_native(tmp_path / "flat", tmp_path / "native")
    tensors = read_folder(tmp_path / "native")
    section = json.loads((tmp_path / "native" / "config.json").read_text())["quantization_config"]
    assert section["quant_method"] == "flatquant"
    assert section["quota_jax"] == config.to_json() | {"modules": list(config.modules)} | {
        "input_scales": [],
        "layer_bits": [],
    }
    assert section["config_groups"]["group_0"]["input_activations"]["num_bits"] == 4
    block = content["decoder_layer_001"]
    stem = "model.layers.1.self_attn."
    start = 0
    for part, rows in (("q_proj", 64), ("k_proj", 32), ("v_proj", 32)):
        packed = block["decoder.layers.attn.qkv.packed"][start : start + rows]
        low, high = (packed & 15).astype(int), (packed >> 4).astype(int)
        codes = np.stack([low, high], -1).reshape(rows, 64)
        codes = np.where(codes > 7, codes - 16, codes)
        words = tensors[f"{stem}{part}.weight_packed"].view(np.uint32)
        found = np.stack([words >> (4 * i) & 15 for i in range(8)], -1).reshape(rows, 64)
        np.testing.assert_array_equal(found.astype(int) - 8, codes)
        scale = block["decoder.layers.attn.qkv.scale"][start : start + rows]
        np.testing.assert_array_equal(tensors[f"{stem}{part}.weight_scale"][:, 0], scale)
        for ours, theirs in (("left", "left"), ("right", "right"), ("clip", "clip")):
            np.testing.assert_array_equal(
                tensors[f"{stem}{part}.flatquant_{theirs}"],
                block[f"decoder.layers.attn.qkv.{ours}"],
            )
        start += rows
    # Every array of the checkpoint is in the folder.
    held = sum(array.size for arrays in content.values() for array in arrays.values())
    assert sum(array.nbytes for array in tensors.values()) > held

    quantized(tmp_path, "W8A8")
    export_native(tmp_path / "ckpt", tmp_path / "eight")
    eight = read_folder(tmp_path / "eight")[f"{stem}k_proj.weight"]
    codes = open_checkpoint(tmp_path / "ckpt").read_block("decoder_layer_001")
    np.testing.assert_array_equal(eight, codes["decoder.layers.attn.qkv.codes"][64:96])


def test_what_a_format_cannot_hold_is_refused(tmp_path, capsys) -> None:
    convert(write_tiny_llava(tmp_path / "hf"), tmp_path / "full")
    cases = {
        "W4A4": "writes W4A16 only",
        "W4A16KV4": "4-bit KV cache",
        "W4A16G20": "64 inputs, which groups of 20 do not divide",
        "W8A16": "writes W4A16 only",
    }
    for label, match in cases.items():
        calibrate(tmp_path / "full", tmp_path / label, QuantizationConfig.parse(label))
        command = ["export", str(tmp_path / label), "--out", str(tmp_path / "out")]
        assert main([*command, "--format", "compressed-tensors"]) == 2
        assert match in capsys.readouterr().err
    assert main(["export", str(tmp_path / "W4A4"), "--out", str(tmp_path / "out")]) == 2
    assert "give --format compressed-tensors or native" in capsys.readouterr().err
    with pytest.raises(QuotaError, match="has no quantized weights"):
        export_native(tmp_path / "full", tmp_path / "out")
    assert not list(tmp_path.glob("out*"))

    folder = write_tiny_llava(tmp_path / "v1")
    quantize_folder(folder, gptq())
    convert(folder, tmp_path / "sixteen")
    with pytest.raises(QuotaError, match="zero point of 16"):
        export_compressed_tensors(tmp_path / "sixteen", tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("family", ["llava", "qwen"])
@pytest.mark.parametrize(
    ("label", "symmetric"), [("W4A16G16", True), ("W4A16G16", False), ("W4A16", True)]
)
def test_the_compressed_tensors_library_decodes_our_weights(
    tmp_path, family, label, symmetric
) -> None:
    # A package that no extra brings: where it is installed, its own decoder is the reference.
    pytest.importorskip("compressed_tensors", reason="needs compressed-tensors and torch")
    compressors: Any = importlib.import_module("compressed_tensors.compressors")
    theirs: Any = importlib.import_module("compressed_tensors.quantization")
    import torch
    from transformers import AutoModelForImageTextToText

    write = write_tiny_llava if family == "llava" else write_tiny_qwen
    convert(write(tmp_path / "hf"), tmp_path / "full")
    quantized(tmp_path, label, symmetric=symmetric)
    export_compressed_tensors(tmp_path / "ckpt", tmp_path / "ct")
    section = json.loads((tmp_path / "ct" / "config.json").read_text())["quantization_config"]
    scheme = theirs.QuantizationConfig.model_validate(section).config_groups["group_0"]
    tensors = read_folder(tmp_path / "ct")
    checkpoint = open_checkpoint(tmp_path / "ckpt")
    stems = [name.removesuffix("weight_packed") for name in tensors if "weight_packed" in name]
    assert len(stems) == 14
    ours = {
        linear: weight_of(checkpoint, f"decoder_layer_{layer:03d}", f"decoder.layers.{linear}")
        for layer in (1,)
        for linear in ("attn.qkv", "attn.o", "mlp.gate_up", "mlp.down")
    }
    for stem in (stem for stem in stems if ".layers.1." in stem):
        state = {
            name.removeprefix(stem): torch.from_numpy(value)
            for name, value in tensors.items()
            if name.startswith(stem)
        }
        found = compressors.PackedQuantizationCompressor.decompress(state, scheme)["weight"].numpy()
        part = stem.split(".")[-2]
        linear, start = {
            "q_proj": ("attn.qkv", 0),
            "k_proj": ("attn.qkv", 64),
            "v_proj": ("attn.qkv", 96),
            "o_proj": ("attn.o", 0),
            "gate_proj": ("mlp.gate_up", 0),
            "up_proj": ("mlp.gate_up", 96),
            "down_proj": ("mlp.down", 0),
        }[part]
        expected = ours[linear][start : start + len(found)]
        np.testing.assert_array_equal(found, expected)
    if symmetric:
        # transformers 5.24 makes room for unpacked zero points only, and refuses its own format.
        model, info = AutoModelForImageTextToText.from_pretrained(
            tmp_path / "ct", dtype=torch.float32, output_loading_info=True
        )
        assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        import quota_jax as qj
        from converters.random_prompts import random_prompts

        prompts = random_prompts(checkpoint.config)
        logits, _ = qj.prefill(checkpoint.load_model(), prompts.batch)
        with torch.no_grad():
            for row, inputs in zip(np.asarray(logits), prompts.reference, strict=True):
                given = {name: torch.from_numpy(array) for name, array in inputs.items()}
                reference = model(**given).logits[0, -1].numpy()
                assert np.abs(row - reference).max() <= 2e-4 * np.abs(reference).max()
