"""Qwen2.5-VL checkpoints: there and back bit for bit, exports that transformers loads, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from converters import convert, export_hf
from quota_jax.checkpoint import open_checkpoint
from quota_jax.config import QwenVlConfig, config_from_hf
from quota_jax.errors import QuotaError
from quota_jax.models.params import blocks
from tests.converter_checks import (
    QWEN,
    Tensors,
    change_config,
    changed,
    check_cast,
    check_layout_change,
    check_round_trip,
    check_transformers_loads,
    refuse,
)
from tests.tiny_qwen import LAYOUTS, TinyQwen, hf_config, hf_tensors, load_oracle, write_tiny_qwen
from tests.tiny_tensors import DTYPES

Q = "model.layers.1.self_attn.q_proj.weight"
K = "model.layers.1.self_attn.k_proj.weight"
O_BIAS = "model.layers.1.self_attn.o_proj.bias"
QKV = "visual.blocks.0.attn.qkv.weight"
GATE = "visual.blocks.2.mlp.gate_proj.bias"
UP = "visual.blocks.2.mlp.up_proj.bias"
PATCH = "visual.patch_embed.proj.weight"
LN_Q = "visual.merger.ln_q.weight"
EMBED = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


def mixed_dtypes(name: str) -> str:
    """Norms in float32, the tower in float16, the rest in bfloat16."""
    if "norm" in name or "ln_q" in name:
        return "float32"
    return "float16" if name.startswith("visual.") else "bfloat16"


SPECS: dict[str, dict[str, Any]] = {
    "saved": {"dtype": "bfloat16"},
    "memory": {"dtype": "bfloat16", "layout": "memory"},
    "float16": {"dtype": "float16", "head_dim": 40, "num_shards": 3},
    "float32": {"head_dim": 80, "num_heads": 2, "num_kv_heads": 2, "vision_head_dim": 20},
    "mixed": {"dtype": mixed_dtypes, "layout": "memory", "num_shards": 2},
    "tied": {"tie_word_embeddings": True, "num_kv_heads": 1},
    "tied_copy": {"tie_word_embeddings": True, "stored_head": "copy", "dtype": "bfloat16"},
    "tied_memory": {"tie_word_embeddings": True, "stored_head": "copy", "layout": "memory"},
    "old": {"old_config": True, "buffers": True, "num_shards": 2, "dtype": "bfloat16"},
    "old_tied": {"old_config": True, "tie_word_embeddings": True},
    "old_memory": {"old_config": True, "buffers": True, "layout": "memory"},
    "sizes": {"spatial_merge_size": 1, "temporal_patch_size": 1, "patch_size": 8, "num_layers": 3},
}


@pytest.mark.parametrize("case", sorted(SPECS))
def test_round_trip_is_bit_identical(tmp_path: Path, case: str) -> None:
    check_round_trip(tmp_path, QWEN, **SPECS[case])


@pytest.mark.torch
@pytest.mark.parametrize("case", sorted(SPECS))
def test_transformers_loads_the_export(tmp_path: Path, case: str) -> None:
    check_transformers_loads(tmp_path, QWEN, **SPECS[case])


@pytest.mark.parametrize("stored", sorted(DTYPES))
@pytest.mark.parametrize("wanted", sorted(DTYPES))
def test_casts_round_to_nearest_even_and_tell_the_config(
    tmp_path: Path, stored: str, wanted: str
) -> None:
    check_cast(tmp_path, QWEN, wanted, dtype=stored, old_config=stored == "float16")


@pytest.mark.parametrize("stored", LAYOUTS)
@pytest.mark.parametrize("wanted", LAYOUTS)
def test_any_layout_can_be_written(tmp_path: Path, stored: str, wanted: str) -> None:
    check_layout_change(tmp_path, QWEN, stored, wanted)


def test_layouts_are_told_apart(tmp_path: Path) -> None:
    for layout, found in (("saved", "saved"), ("hub", "saved"), ("memory", "memory")):
        source = write_tiny_qwen(tmp_path / layout, layout=layout)
        assert open_checkpoint(convert(source, tmp_path / f"{layout}_qj")).hf_layout == found
    with pytest.raises(QuotaError, match="'memory_vision_model' is unknown; known: saved, hub, m"):
        export_hf(tmp_path / "saved_qj", tmp_path / "other", layout="memory_vision_model")


def test_old_and_new_configs_describe_the_same_model() -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"tie_word_embeddings": True},
        {"mrope_section": (1, 2, 5)},
    ]
    for fields in changes:
        old = config_from_hf(hf_config(TinyQwen(old_config=True, **fields)))
        assert old == config_from_hf(hf_config(TinyQwen(**fields)))
        assert config_from_hf(old.to_hf()) == old


def test_the_checkpoint_holds_joined_rows_in_the_stored_dtype(tmp_path: Path) -> None:
    spec = TinyQwen(dtype="float16", head_dim=40)
    tensors = hf_tensors(spec)
    checkpoint = open_checkpoint(convert(write_tiny_qwen(tmp_path / "hf", spec), tmp_path / "qj"))
    assert checkpoint.quantization.is_none
    assert list(checkpoint.block_names) == [
        "vision_embeddings",
        *(f"vision_layer_{index:03d}" for index in range(spec.vision_layers)),
        "projector",
        "embeddings",
        *(f"decoder_layer_{index:03d}" for index in range(spec.num_layers)),
        "head",
    ]
    decoder, tower = "model.layers.1.", "visual.blocks.2."
    attention = [f"{decoder}self_attn.{part}_proj" for part in "qkv"]
    expected: dict[str, dict[str, list[str]]] = {
        "decoder_layer_001": {
            "decoder.layers.attn.qkv.weight": [f"{name}.weight" for name in attention],
            "decoder.layers.attn.qkv.bias": [f"{name}.bias" for name in attention],
            "decoder.layers.attn.o.weight": [f"{decoder}self_attn.o_proj.weight"],
            "decoder.layers.mlp.gate_up.weight": [
                f"{decoder}mlp.{part}_proj.weight" for part in ("gate", "up")
            ],
        },
        "vision_layer_002": {
            "vision.layers.attn.qkv.bias": [f"{tower}attn.qkv.bias"],
            "vision.layers.mlp.gate_up.weight": [
                f"{tower}mlp.{part}_proj.weight" for part in ("gate", "up")
            ],
            "vision.layers.mlp.gate_up.bias": [
                f"{tower}mlp.{part}_proj.bias" for part in ("gate", "up")
            ],
        },
        "vision_embeddings": {"vision.patch_embed.weight": [PATCH]},
        "projector": {
            "projector.norm.scale": [LN_Q],
            "projector.linear_1.weight": ["visual.merger.mlp.0.weight"],
            "projector.linear_2.bias": ["visual.merger.mlp.2.bias"],
        },
    }
    for block, params in expected.items():
        stored = checkpoint.read_block(block)
        assert set(stored) == set(blocks(checkpoint.config)[block])
        for param, names in params.items():
            assert stored[param].dtype == np.float16
            joined = np.concatenate([tensors[name] for name in names])
            np.testing.assert_array_equal(stored[param], joined, err_msg=param)
    assert "decoder.layers.attn.o.bias" not in checkpoint.read_block("decoder_layer_001")


@pytest.mark.torch
@pytest.mark.parametrize("tied", [False, True])
def test_transformers_loads_a_config_that_was_made_here(tmp_path: Path, tied: bool) -> None:
    """A model without a source has no Hugging Face config of its own to give back."""
    folder = write_tiny_qwen(tmp_path / "hf", tie_word_embeddings=tied, tokens_per_second=3)
    before = json.loads((folder / "config.json").read_text())
    config = QwenVlConfig.from_hf(before)
    reference = load_oracle(folder).config.to_dict()
    (folder / "config.json").write_text(json.dumps({**config.to_hf(), "dtype": "float32"}))
    found = load_oracle(folder).config.to_dict()
    for section in ("text_config", "vision_config"):
        ours, theirs = found.pop(section), reference.pop(section)
        for key in before[section]:
            if key not in ("bos_token_id", "eos_token_id", "sliding_window", "max_window_layers"):
                assert ours[key] == theirs[key], key
    assert found == reference


@pytest.mark.parametrize("name", [K, QKV, UP, PATCH, LN_Q, EMBED, HEAD])
@pytest.mark.parametrize("layout", ["saved", "memory"])
def test_missing_tensor(tmp_path: Path, name: str, layout: str) -> None:
    stored = QWEN.layout_name(name, layout)
    source = changed(tmp_path, lambda t: t.pop(stored), QWEN, layout=layout)
    refuse(source, rf"1 missing tensor: {stored}$")


@pytest.mark.parametrize("name", [O_BIAS, "visual.blocks.3.norm1.weight", "model.norm.bias"])
def test_unknown_tensor(tmp_path: Path, name: str) -> None:
    source = changed(tmp_path, lambda t: t.update({name: np.zeros(64, np.float32)}), QWEN)
    refuse(source, rf"1 unknown tensor: {name}$")


@pytest.mark.parametrize(
    ("name", "found", "expected"),
    [
        (QKV, (32, 96), (96, 32)),
        (PATCH, (32, 3, 14, 14), (32, 3, 2, 14, 14)),
        (UP, (96,), (48,)),
        (Q, (32, 64), (64, 64)),
        ("visual.merger.mlp.2.weight", (32, 128), (64, 128)),
    ],
)
def test_wrong_shape(
    tmp_path: Path, name: str, found: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    source = changed(tmp_path, lambda t: t.update({name: np.ones(found, np.float32)}), QWEN)
    message = refuse(source, "1 of wrong shape: ")
    assert message.endswith(f"{name} is {found}, expected {expected}")


def test_layouts_are_not_mixed(tmp_path: Path) -> None:
    other = QWEN.layout_name(QKV, "memory")
    source = changed(tmp_path, lambda t: t.update({other: t.pop(QKV)}), QWEN)
    refuse(source, rf"1 missing tensor: {QKV}; 1 unknown tensor: {other}$")


def test_joined_tensors_of_different_dtypes(tmp_path: Path) -> None:
    source = changed(tmp_path, lambda t: t.update({GATE: t[GATE].astype(np.float16)}), QWEN)
    message = refuse(source, r"vision\.layers\.mlp\.gate_up\.bias differ in dtype")
    assert f"{GATE} float16" in message
    assert f"{UP} float32" in message
    convert(source, tmp_path / "cast", dtype="bfloat16")


@pytest.mark.parametrize("name", [K, QKV, LN_Q])
def test_nan(tmp_path: Path, name: str) -> None:
    def spoil(tensors: Tensors) -> None:
        tensors[name].reshape(-1)[-1] = np.nan

    source = changed(tmp_path, spoil, QWEN, dtype="bfloat16")
    refuse(source, rf"model\.safetensors: tensor {name} holds NaN or infinity")


def test_tied_head_that_differs(tmp_path: Path) -> None:
    def spoil(tensors: Tensors) -> None:
        tensors[HEAD][3, 5] += 1

    source = changed(tmp_path, spoil, QWEN, tie_word_embeddings=True, stored_head="copy")
    refuse(source, rf"config\.json ties the embeddings, but {HEAD} differs from {EMBED}")


@pytest.mark.parametrize("old_config", [False, True])
@pytest.mark.parametrize(
    ("section", "change", "match"),
    [
        (None, {"quantization_config": {"quant_method": "awq"}}, r"quantization_config \(awq\)"),
        (None, {"vision_config": None}, "config has no 'vision_config' section"),
        ("vision_config", {"out_hidden_size": 48}, "out_hidden_size 48 differs"),
        ("vision_config", {"fullatt_block_indexes": [3]}, "the tower has 3 layers"),
        ("vision_config", {"num_heads": 3}, "vision hidden_size 32 with 3 heads"),
        ("text", {"use_sliding_window": True}, "use_sliding_window is not supported"),
        ("text", {"num_hidden_layers": "2"}, "'num_hidden_layers' must be an integer, got '2'"),
        ("text", {"num_hidden_layers": 3}, "12 missing tensors"),
        ("rope", {"mrope_section": [2, 3, 4]}, r"mrope_section \[2, 3, 4\] must be three sizes"),
        ("rope", {"rope_type": "yarn", "factor": 4.0}, "rope type 'yarn' is not supported"),
    ],
)
def test_configs(
    tmp_path: Path, old_config: bool, section: str | None, change: dict[str, Any], match: str
) -> None:
    source = write_tiny_qwen(tmp_path / "hf", old_config=old_config)
    text = None if old_config else "text_config"
    if section == "rope":
        config = json.loads((source / "config.json").read_text())
        key = "rope_scaling" if old_config else "rope_parameters"
        rope = (config if old_config else config["text_config"])[key]
        section, change = "text", {key: {**rope, **change}}
    change_config(source, text if section == "text" else section, **change)
    refuse(source, match)
