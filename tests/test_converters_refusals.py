"""Every kind of bad input to `convert` is one line that names it, and leaves nothing loadable."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from converters import convert, export_hf
from quota_jax.errors import QuotaError
from tests.converter_checks import Tensors, change_config, changed, refuse
from tests.tiny_models import DTYPES, write_tiny_llava

Q = "language_model.model.layers.1.self_attn.q_proj.weight"
K = "language_model.model.layers.1.self_attn.k_proj.weight"
DOWN = "language_model.model.layers.1.mlp.down_proj.weight"
FC1 = "vision_tower.encoder.layers.0.mlp.fc1.weight"
EMBED = "language_model.model.embed_tokens.weight"
HEAD = "language_model.lm_head.weight"


def test_missing_tensor(tmp_path: Path) -> None:
    refuse(changed(tmp_path, lambda t: t.pop(K)), rf"1 missing tensor: {K}$")


def test_unknown_tensor(tmp_path: Path) -> None:
    extra = {"language_model.model.layers.2.mlp.down_proj.weight": np.zeros((1, 1), np.float32)}
    refuse(changed(tmp_path, lambda t: t.update(extra)), rf"1 unknown tensor: {next(iter(extra))}$")


def test_wrong_shape(tmp_path: Path) -> None:
    source = changed(tmp_path, lambda t: t.update({DOWN: t[DOWN].T.copy()}))
    refuse(source, rf"1 of wrong shape: {DOWN} is \(96, 64\), expected \(64, 96\)$")


def test_swapped_rows_of_joined_tensors_are_a_wrong_shape(tmp_path: Path) -> None:
    """q and k have the right number of rows together, but not each."""
    source = changed(tmp_path, lambda t: t.update({Q: t[K].copy(), K: t[Q].copy()}))
    message = refuse(source, "2 of wrong shape")
    assert Q in message
    assert K in message


def test_many_problems_are_counted_and_a_few_named(tmp_path: Path) -> None:
    source = write_tiny_llava(tmp_path / "hf", num_layers=4)
    change_config(source, "text_config", num_hidden_layers=3, mlp_bias=True)
    message = refuse(source, "9 missing tensors: .* and 4 more; 9 unknown tensors: .* and 4 more")
    assert message.count("layers.3.") == 5


def test_layouts_are_not_mixed(tmp_path: Path) -> None:
    other = FC1.replace("vision_tower.", "vision_tower.vision_model.")
    source = changed(tmp_path, lambda t: t.update({other: t.pop(FC1)}))
    refuse(source, rf"1 missing tensor: {FC1}; 1 unknown tensor: {other}$")


def test_joined_tensors_of_different_dtypes(tmp_path: Path) -> None:
    source = changed(tmp_path, lambda t: t.update({K: t[K].astype(np.float16)}))
    message = refuse(source, r"decoder\.layers\.attn\.qkv\.weight differ in dtype")
    assert f"{Q} float32" in message
    assert f"{K} float16" in message
    convert(source, tmp_path / "cast", dtype="bfloat16")


def test_integer_tensor(tmp_path: Path) -> None:
    source = changed(tmp_path, lambda t: t.update({FC1: t[FC1].astype(np.int8)}))
    refuse(source, rf"tensor {FC1} is stored as I8")


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", [K, FC1, EMBED])
def test_nan_and_infinity(tmp_path: Path, dtype: str, value: float, name: str) -> None:
    def spoil(tensors: Tensors) -> None:
        tensors[name].reshape(-1)[-1] = value

    source = changed(tmp_path, spoil, dtype=dtype, num_layers=2, vision_layers=2)
    refuse(source, rf"model\.safetensors: tensor {name} holds NaN or infinity")


def test_float16_overflow(tmp_path: Path) -> None:
    source = changed(tmp_path, lambda t: t[K].__setitem__((0, 0), 70000.0))
    refuse(source, rf"tensor {K} overflows float16 \(largest finite 65504\)", dtype="float16")
    convert(source, tmp_path / "wide", dtype="bfloat16")


def test_tied_head_that_differs(tmp_path: Path) -> None:
    def spoil(tensors: Tensors) -> None:
        tensors[HEAD][3, 5] += 1

    source = changed(tmp_path, spoil, tie_word_embeddings=True, stored_head="copy")
    refuse(source, rf"config\.json ties the embeddings, but {HEAD} differs from {EMBED}")


def test_untied_head_that_is_absent(tmp_path: Path) -> None:
    refuse(changed(tmp_path, lambda t: t.pop(HEAD)), rf"1 missing tensor: {HEAD}")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"model_type": "qwen3_vl"}, r"config\.json: model_type 'qwen3_vl' is not supported"),
        ({"model_type": None}, r"config\.json: model_type None is not supported"),
        ({"text_config": None}, r"config\.json: config has no 'text_config' section"),
        ({"quantization_config": {"quant_method": "awq"}}, r"has quantization_config \(awq\)"),
        ({"compression_config": {}}, r"has compression_config \(unnamed method\)"),
        ({"image_token_index": "<image>"}, r"config\.json is not usable: .*'<image>'"),
        ({"vision_feature_layer": 9}, "vision_feature_layer 9 is outside"),
    ],
)
def test_configs(tmp_path: Path, change: dict[str, Any], match: str) -> None:
    refuse(change_config(write_tiny_llava(tmp_path / "hf"), **change), match)


def test_quantization_inside_a_section(tmp_path: Path) -> None:
    source = write_tiny_llava(tmp_path / "hf")
    change_config(source, "text_config", quantization_config={"quant_method": "gptq"})
    refuse(source, r"has quantization_config \(gptq\): bits are None; only 4 is read")


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00", "[" * 100_000])
def test_corrupt_config(tmp_path: Path, content: str) -> None:
    source = write_tiny_llava(tmp_path / "hf")
    (source / "config.json").write_text(content)
    refuse(source, r"config\.json (is not readable JSON|does not hold a JSON object)")


def test_absent_config(tmp_path: Path) -> None:
    source = write_tiny_llava(tmp_path / "hf")
    (source / "config.json").unlink()
    refuse(source, r"holds no config\.json")


def test_shards_that_cannot_be_read(tmp_path: Path) -> None:
    source = write_tiny_llava(tmp_path / "hf", num_shards=2)
    shard = source / "model-00002-of-00002.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    refuse(source, r"model-00002-of-00002\.safetensors is not a whole safetensors file")
    shard.unlink()
    refuse(source, r"model-00002-of-00002\.safetensors is missing")
    for file in source.glob("*.safetensors*"):
        file.unlink()
    (source / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    refuse(source, r"only pickled weights \(pytorch_model\.bin\).*python -c")


def test_options(tmp_path: Path) -> None:
    source = write_tiny_llava(tmp_path / "hf")
    refuse(source, r"dtype 'int8' is not one of float32, float16, bfloat16", dtype="int8")
    out = convert(source, tmp_path / "qj")
    with pytest.raises(QuotaError, match="qj already exists"):
        convert(source, out)
    with pytest.raises(QuotaError, match="hf already exists"):
        export_hf(out, source)
    with pytest.raises(QuotaError, match="is not a folder"):
        convert(source, tmp_path / "absent" / "out")
