"""Hugging Face -> quota_jax -> Hugging Face gives the same names, dtypes, shapes and bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from converters import convert, export_hf
from converters.hf_reader import INDEX_FILE
from quota_jax.checkpoint import open_checkpoint
from quota_jax.errors import QuotaError
from quota_jax.models.params import blocks
from tests.converter_checks import (
    LLAVA,
    check_cast,
    check_layout_change,
    check_round_trip,
    check_transformers_loads,
)
from tests.tiny_models import (
    DTYPES,
    LAYOUTS,
    TinyLlava,
    assert_same_tensors,
    hf_tensors,
    read_folder,
    write_tiny_llava,
)


def mixed_dtypes(name: str) -> str:
    """Norms in float32, the tower in float16, the rest in bfloat16, as some checkpoints are."""
    if "norm" in name:
        return "float32"
    return "float16" if name.startswith("vision_tower") else "bfloat16"


SPECS: dict[str, dict[str, Any]] = {
    **{layout: {"layout": layout, "dtype": "bfloat16"} for layout in LAYOUTS},
    "float16": {"dtype": "float16", "head_dim": 40, "num_shards": 3},
    "float32": {"dtype": "float32", "head_dim": 80, "num_heads": 2, "num_kv_heads": 2},
    "mixed": {"dtype": mixed_dtypes, "layout": "memory", "num_shards": 2},
    "tied": {"tie_word_embeddings": True, "num_kv_heads": 1},
    "tied_copy": {"tie_word_embeddings": True, "stored_head": "copy", "layout": "hub"},
    "tied_memory": {"tie_word_embeddings": True, "stored_head": "copy", "layout": "memory"},
    "biases": {"attention_bias": True, "mlp_bias": True, "vision_feature_layer": -1},
    "no_projector_bias": {"projector_bias": False, "vision_feature_select_strategy": "full"},
    "several_features": {"vision_feature_layer": (-2, 1), "image_size": 32, "patch_size": 8},
    "old": {"old_config": True, "buffers": True, "layout": "hub", "num_shards": 2},
    "wide_heads": {"head_dim": 64, "num_heads": 2, "hidden_size": 96, "layout": "saved"},
}


@pytest.mark.parametrize("case", sorted(SPECS))
def test_round_trip_is_bit_identical(tmp_path: Path, case: str) -> None:
    check_round_trip(tmp_path, LLAVA, **SPECS[case])


def test_the_checkpoint_holds_joined_rows_in_the_stored_dtype(tmp_path: Path) -> None:
    spec = TinyLlava(dtype="float16", layout="hub", head_dim=40)
    tensors = hf_tensors(spec)
    checkpoint = open_checkpoint(convert(write_tiny_llava(tmp_path / "hf", spec), tmp_path / "qj"))
    assert checkpoint.hf_layout == "hub"
    assert checkpoint.quantization.is_none
    layer = checkpoint.read_block("decoder_layer_001")
    prefix = "language_model.model.layers.1."
    for param, parts in {
        "decoder.layers.attn.qkv.weight": (
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
        ),
        "decoder.layers.mlp.gate_up.weight": ("mlp.gate_proj", "mlp.up_proj"),
    }.items():
        expected = np.concatenate([tensors[f"{prefix}{part}.weight"] for part in parts])
        assert layer[param].dtype == np.float16
        np.testing.assert_array_equal(layer[param], expected)
    tower = checkpoint.read_block("vision_layer_002")
    prefix = "vision_tower.vision_model.encoder.layers.2.self_attn."
    np.testing.assert_array_equal(
        tower["vision.layers.attn.qkv.bias"],
        np.concatenate([tensors[f"{prefix}{part}_proj.bias"] for part in "qkv"]),
    )
    assert set(layer) == set(blocks(checkpoint.config)["decoder_layer_001"])


@pytest.mark.parametrize("stored", sorted(DTYPES))
@pytest.mark.parametrize("wanted", sorted(DTYPES))
def test_casts_round_to_nearest_even_and_tell_the_config(
    tmp_path: Path, stored: str, wanted: str
) -> None:
    check_cast(tmp_path, LLAVA, wanted, dtype=stored, old_config=stored == "float16")


@pytest.mark.parametrize("stored", LAYOUTS)
@pytest.mark.parametrize("wanted", LAYOUTS)
def test_any_layout_can_be_written(tmp_path: Path, stored: str, wanted: str) -> None:
    check_layout_change(tmp_path, LLAVA, stored, wanted)


def test_small_shards_have_an_index_that_reads_back(tmp_path: Path) -> None:
    source = write_tiny_llava(tmp_path / "hf", dtype=mixed_dtypes)
    checkpoint = convert(source, tmp_path / "qj")
    limit = 40_000
    back = export_hf(checkpoint, tmp_path / "back", max_shard_size=limit)
    tensors = read_folder(back)
    shards = sorted(back.glob("model-*.safetensors"))
    largest = max(array.nbytes for array in tensors.values())
    assert len(shards) > 3
    assert all(file.stat().st_size <= max(limit, largest) + 8192 for file in shards)
    index = json.loads((back / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in tensors.values())
    assert set(index["weight_map"]) == set(tensors)
    assert_same_tensors(read_folder(source), tensors)
    again = convert(back, tmp_path / "again")
    assert_same_tensors(tensors, read_folder(export_hf(again, tmp_path / "back_again")))


def test_progress_counts_every_block_once(tmp_path: Path) -> None:
    source = write_tiny_llava(tmp_path / "hf")
    steps: list[tuple[int, int, str]] = []
    checkpoint = convert(
        source, tmp_path / "qj", progress=lambda i, n, name: steps.append((i, n, name))
    )
    names = open_checkpoint(checkpoint).block_names
    assert steps == [(i, len(names), name) for i, name in enumerate(names, start=1)]


def test_export_refuses_what_it_cannot_write(tmp_path: Path) -> None:
    checkpoint = convert(write_tiny_llava(tmp_path / "hf"), tmp_path / "qj")
    (tmp_path / "taken").mkdir()
    with pytest.raises(QuotaError, match="taken already exists"):
        export_hf(checkpoint, tmp_path / "taken")
    with pytest.raises(QuotaError, match=r"layout 'other' is unknown; known: saved, hub"):
        export_hf(checkpoint, tmp_path / "new", layout="other")
    with pytest.raises(QuotaError, match="max_shard_size must be positive, got 0"):
        export_hf(checkpoint, tmp_path / "new", max_shard_size=0)
    with pytest.raises(QuotaError, match="is not a folder"):
        export_hf(checkpoint, tmp_path / "no" / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "qj", "taken"]


def test_odd_16_bit_tensors_leave_32_bit_ones_aligned(tmp_path: Path) -> None:
    """torch refuses views that are not aligned to their item size."""
    from converters.hf_writer import HfWriter, TensorSpec

    arrays = {
        "odd": np.arange(3, dtype=np.float16),
        "wide": np.arange(5, dtype=np.float32),
        "scalar": np.array(2.5, ml_dtypes.bfloat16),
        "wider": np.arange(4, dtype=np.float32).reshape(2, 2),
    }
    specs = {name: TensorSpec(shape=a.shape, dtype=a.dtype) for name, a in arrays.items()}
    writer = HfWriter(tmp_path, specs, 1e9)
    for name in reversed(arrays):
        writer.write(name, arrays[name])
    writer.finish()
    assert_same_tensors(arrays, read_folder(tmp_path))
    raw = (tmp_path / "model.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    assert size % 8 == 0
    assert all(header[name]["data_offsets"][0] % 4 == 0 for name in ("wide", "wider"))


@pytest.mark.torch
@pytest.mark.parametrize("case", sorted(SPECS))
def test_transformers_loads_the_export(tmp_path: Path, case: str) -> None:
    check_transformers_loads(tmp_path, LLAVA, **SPECS[case])
