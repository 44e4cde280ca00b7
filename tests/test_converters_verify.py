"""`verify` finds damage and differences, and says which checks did not run and why."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from converters import convert, export_hf, verify
from quota_jax.checkpoint import CheckpointWriter, open_checkpoint
from quota_jax.config import LlavaConfig
from quota_jax.errors import QuotaError
from quota_jax.models.params import blocks
from quota_jax.quantization import QuantizationConfig
from tests.converter_checks import LLAVA, QWEN, Family, change_config
from tests.tiny_models import TinyLlava, hf_config, write_tiny_llava
from tests.tiny_qwen import write_tiny_qwen
from tests.tiny_tensors import write_tensors

NAMES = ["checksums", "coverage", "tensors", "logits"]
FAMILIES = pytest.mark.parametrize("family", [LLAVA, QWEN], ids=["llava", "qwen"])


@pytest.fixture
def no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    # The package's attribute of this name is the function.
    module = importlib.import_module("converters.verify")
    monkeypatch.setattr(module, "_installed", lambda package: False)


def quantized_checkpoint(path: Path) -> Path:
    """A W4A8KV4 checkpoint with random codes."""
    config = LlavaConfig.from_hf(hf_config(TinyLlava()))
    quantization = QuantizationConfig.parse("W4A8KV4")
    rng = np.random.default_rng(0)
    with CheckpointWriter(
        path, config=config, quantization=quantization, provenance={}, assets={}, fingerprint="x"
    ) as writer:
        for block, params in blocks(config, quantization).items():
            arrays = {}
            for name, spec in params.items():
                if np.issubdtype(spec.dtype, np.integer):
                    arrays[name] = rng.integers(0, 127, spec.shape).astype(spec.dtype)
                else:
                    arrays[name] = rng.random(spec.shape, dtype=np.float32).astype(spec.dtype)
            writer.write_block(block, arrays)
        writer.finish()
    return path


def test_without_a_source_integrity_alone_is_checked(tmp_path: Path) -> None:
    checkpoint = convert(write_tiny_llava(tmp_path / "hf"), tmp_path / "qj")
    steps: list[tuple[int, int, str]] = []
    report = verify(checkpoint, progress=lambda i, n, name: steps.append((i, n, name)))
    assert report.ok
    assert [check.name for check in report.checks] == NAMES
    assert [check.status for check in report.checks] == ["passed"] * 2 + ["skipped"] * 2
    assert "no source to compare with" in report["tensors"].detail
    names = open_checkpoint(checkpoint).block_names
    assert steps == [(i, len(names), name) for i, name in enumerate(names, start=1)]
    assert str(report).count("\n") == 3


def test_a_flipped_bit_fails_the_checksums(tmp_path: Path) -> None:
    checkpoint = convert(write_tiny_llava(tmp_path / "hf"), tmp_path / "qj")
    file = max((checkpoint / "state" / "projector").rglob("*"), key=lambda f: f.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    report = verify(checkpoint)
    assert not report.ok
    assert report["checksums"].status == "failed"
    assert str(file) in report["checksums"].detail


@pytest.mark.usefixtures("no_torch")
@FAMILIES
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_the_source_compares_bit_for_bit(tmp_path: Path, family: Family, dtype: str | None) -> None:
    spec = family.spec(layout="hub", num_shards=2)
    source = family.write(tmp_path / "hf", spec)
    checkpoint = convert(source, tmp_path / "qj", dtype=dtype)
    report = verify(checkpoint, against=source)
    assert report.ok
    assert report["tensors"].status == "passed"
    count = len(family.tensors(spec))
    assert report["tensors"].detail.startswith(f"{count} tensors equal the source")
    assert ("after casting float32 to bfloat16" in report["tensors"].detail) == (dtype is not None)
    assert report["logits"].status == "skipped"
    assert "torch is not installed" in report["logits"].detail


@pytest.mark.usefixtures("no_torch")
@pytest.mark.parametrize(
    ("family", "param", "name"),
    [
        (
            LLAVA,
            "decoder.layers.attn.qkv.weight",
            "language_model.model.layers.1.self_attn.v_proj.weight",
        ),
        (QWEN, "vision.layers.mlp.gate_up.weight", "visual.blocks.1.mlp.up_proj.weight"),
    ],
    ids=["llava", "qwen"],
)
def test_a_source_that_differs_is_named(
    tmp_path: Path, family: Family, param: str, name: str
) -> None:
    spec = family.spec()
    source = family.write(tmp_path / "hf", spec)
    checkpoint = convert(source, tmp_path / "qj")
    tensors = family.tensors(spec)
    tensors[name][-1, -1] = np.nextafter(tensors[name][-1, -1], np.float32(9))
    write_tensors(source, tensors)
    report = verify(checkpoint, against=source)
    assert not report.ok
    assert report["checksums"].status == "passed"
    assert f"{param} differs from {name}" in report["tensors"].detail

    other = family.write(tmp_path / "other", num_layers=3)
    report = verify(checkpoint, against=other)
    assert "describes another model" in report["tensors"].detail


def test_quantized_checkpoints(tmp_path: Path) -> None:
    checkpoint = quantized_checkpoint(tmp_path / "w4")
    report = verify(checkpoint, against=write_tiny_llava(tmp_path / "hf"))
    assert report.ok
    assert [check.status for check in report.checks] == ["passed"] * 2 + ["skipped"] * 2
    assert "quantized (W4A8KV4)" in report["logits"].detail
    with pytest.raises(QuotaError, match=r"w4 is quantized \(W4A8KV4\)"):
        export_hf(checkpoint, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_what_cannot_be_opened_is_raised(tmp_path: Path) -> None:
    with pytest.raises(QuotaError, match="no such checkpoint"):
        verify(tmp_path / "absent")
    checkpoint = convert(write_tiny_llava(tmp_path / "hf"), tmp_path / "qj")
    with pytest.raises(QuotaError, match="neither a folder nor a hub id"):
        verify(checkpoint, against=tmp_path / "absent")


@pytest.mark.torch
@FAMILIES
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("tied", [False, True])
def test_logits_agree_with_transformers(
    tmp_path: Path, family: Family, tied: bool, dtype: str | None
) -> None:
    source = family.write(tmp_path / "hf", tie_word_embeddings=tied, layout="hub")
    report = verify(convert(source, tmp_path / "qj", dtype=dtype), against=source)
    assert report.ok, str(report)
    assert [check.status for check in report.checks] == ["passed"] * 4
    assert "same first token in 2" in report["logits"].detail


@pytest.mark.torch
@pytest.mark.parametrize(
    "fields",
    [
        {"old_config": True, "dtype": "float16", "num_shards": 2},
        {"head_dim": 40, "num_heads": 6, "num_kv_heads": 3, "full_attention_layers": ()},
        {"window_size": 56, "vision_head_dim": 20, "spatial_merge_size": 1, "patch_size": 8},
    ],
)
def test_logits_of_other_qwen_checkpoints(tmp_path: Path, fields: dict[str, Any]) -> None:
    source = write_tiny_qwen(tmp_path / "hf", **fields)
    report = verify(convert(source, tmp_path / "qj"), against=source)
    assert [check.status for check in report.checks] == ["passed"] * 4, str(report)


@pytest.mark.torch
@pytest.mark.parametrize(
    ("family", "name"),
    [
        (LLAVA, "language_model.model.layers.1.post_attention_layernorm.weight"),
        (QWEN, "model.layers.1.post_attention_layernorm.weight"),
        (QWEN, "visual.merger.ln_q.weight"),
    ],
)
def test_other_logits_fail(tmp_path: Path, family: Family, name: str) -> None:
    """One norm's weights are 1 % larger: far more than 2e-4 of the logits."""
    spec = family.spec()
    source = family.write(tmp_path / "hf", spec)
    checkpoint = convert(source, tmp_path / "qj")
    tensors = family.tensors(spec)
    tensors[name] *= 1.01
    write_tensors(source, tensors)
    report = verify(checkpoint, against=source)
    assert report["tensors"].status == "failed"
    assert report["logits"].status == "failed"
    assert "max |difference|" in report["logits"].detail


@pytest.mark.torch
@pytest.mark.parametrize(
    ("section", "change"),
    [
        ("vision_config", {"fullatt_block_indexes": [0]}),
        ("vision_config", {"window_size": 56}),
        ("text_config", {"rope_parameters": {"rope_type": "default", "mrope_section": [3, 3, 2]}}),
    ],
)
def test_random_prompts_show_windows_and_positions(
    tmp_path: Path, section: str, change: dict[str, Any]
) -> None:
    """The same weights under another attention or rotation: the prompts tell them apart."""
    source = write_tiny_qwen(tmp_path / "hf")
    checkpoint = convert(source, tmp_path / "qj")
    report = verify(checkpoint, against=change_config(source, section, **change))
    assert "describes another model" in report["tensors"].detail
    assert report["logits"].status == "failed"


@pytest.mark.torch
@pytest.mark.parametrize(
    ("family", "fields"), [(LLAVA, {"vocab_size": 256}), (QWEN, {})], ids=["size", "family"]
)
def test_the_source_of_another_model_fails_every_comparison(
    tmp_path: Path, family: Family, fields: dict[str, Any]
) -> None:
    checkpoint = convert(write_tiny_llava(tmp_path / "hf"), tmp_path / "qj")
    report = verify(checkpoint, against=family.write(tmp_path / "other", **fields))
    for name in ("tensors", "logits"):
        assert report[name].status == "failed"
        assert report[name].detail.endswith("config.json describes another model")
