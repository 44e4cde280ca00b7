"""Checkpoints that AWQ, GPTQ and compressed-tensors have quantized keep every code and scale."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import quota_jax as qj
from converters import convert
from quota_jax.checkpoint import Checkpoint, open_checkpoint
from quota_jax.cli import main
from quota_jax.errors import QuotaError
from quota_jax.models.params import build_model, flatten_params
from quota_jax.nn.linear import Linear
from quota_jax.quant.blocks import Block, forward
from quota_jax.quant.calibration_data import Sample, make_batches
from quota_jax.quantization import QuantizationConfig
from tests.tiny_models import draw_picture, write_tiny_llava
from tests.tiny_quantized import (
    awq,
    compressed_tensors,
    gptq,
    is_decoder_linear,
    quantize_folder,
)
from tests.tiny_qwen import write_tiny_qwen
from tests.tiny_tensors import read_folder, write_tensors

PARTS = {
    "attn.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.o": ("self_attn.o_proj",),
    "mlp.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down": ("mlp.down_proj",),
}
BF16 = ml_dtypes.bfloat16
FORMATS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "awq": (awq(), {}, {}),
    "awq, whole rows": (awq(0), {"group": 0}, {}),
    "gptq": (gptq(), {"act_order": True}, {"dtype": "float16"}),
    "gptq v2": (gptq(checkpoint_format="gptq_v2"), {"scale_dtype": BF16}, {"layout": "hub"}),
    "ct": (compressed_tensors(), {"scale_dtype": BF16}, {"dtype": "bfloat16"}),
    "ct symmetric": (compressed_tensors(symmetric=True), {"symmetric": True}, {"head_dim": 24}),
    "ct rows": (compressed_tensors(0, symmetric=True), {"group": 0, "symmetric": True}, {}),
    "ct g_idx": (compressed_tensors(actorder="group"), {"act_order": True}, {"layout": "memory"}),
}


def written(
    tmp_path: Path, family: str, name: str, **more: Any
) -> tuple[Path, dict[str, np.ndarray]]:
    config, options, changes = FORMATS[name]
    write = write_tiny_llava if family == "llava" else write_tiny_qwen
    folder = write(tmp_path / "hf", **changes)
    return folder, quantize_folder(folder, config, **options, **more)


def multiplied_by(checkpoint: Checkpoint, block: str, linear: str, dtype: Any) -> np.ndarray:
    """The weight that a linear's own forward pass multiplies by: its product with the identity."""
    params, prefix = checkpoint.read_block(block), f"decoder.layers.{linear}."
    mine = {k.removeprefix(prefix): v for k, v in params.items() if k.startswith(prefix)}
    mine.pop("bias", None)
    text = checkpoint.config.text
    query, key = text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
    ffn = text.intermediate_size
    parts = {"attn.qkv": (query, key, key), "mlp.gate_up": (ffn, ffn)}.get(linear, ())
    module = Linear(
        {k: jnp.asarray(v)[None] for k, v in mine.items()},
        weight_bits=4,
        groups=checkpoint.quantization.groups,
        parts=parts,
    )
    columns = 2 * mine["packed"].shape[1]
    return np.asarray(module(jnp.eye(columns, dtype=dtype), 0)).T


@pytest.mark.parametrize(
    ("family", "name"),
    [("llava", name) for name in FORMATS] + [("qwen", "awq"), ("qwen", "gptq")],
)
def test_dequantized_weights_are_those_of_the_format_bit_for_bit(
    tmp_path: Path, family: str, name: str
) -> None:
    folder, references = written(tmp_path, family, name)
    checkpoint = open_checkpoint(convert(folder, tmp_path / "ckpt"))
    assert checkpoint.quantization.modules == ("decoder",)
    assert checkpoint.quantization.act_order == FORMATS[name][1].get("act_order", False)
    assert checkpoint.quantization.symmetric == FORMATS[name][1].get("symmetric", False)
    dtype = FORMATS[name][1].get("scale_dtype", np.float16)
    for layer in (1,):
        for linear, sources in PARTS.items():
            found = multiplied_by(
                checkpoint, f"decoder_layer_{layer:03d}", linear, jnp.dtype(dtype)
            )
            stems = [f"layers.{layer}.{source}.weight" for source in sources]
            names = [next(n for n in references if n.endswith(stem)) for stem in stems]
            np.testing.assert_array_equal(found, np.concatenate([references[n] for n in names]))


def test_an_imported_model_computes_what_its_dequantized_twin_does(tmp_path: Path, capsys) -> None:
    folder, references = written(tmp_path, "llava", "gptq", scale_dtype=np.float32)
    path = tmp_path / "ckpt"
    assert main(["convert", str(folder), "--out", str(path)]) == 0
    assert "W4A16KV16G16" in capsys.readouterr().out
    assert main(["inspect", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "groups of 16, with zero points, float32 scales, in activation order" in shown
    tensors = {n: v for n, v in read_folder(folder).items() if not n.endswith(QUANTIZED)}
    twin = tmp_path / "twin"
    twin.mkdir()
    write_tensors(twin, tensors | references)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (twin / "config.json").write_text(json.dumps(config))
    exact = open_checkpoint(convert(twin, tmp_path / "full", dtype="float32"))
    imported = open_checkpoint(path)
    processor = qj.load(path).processor
    data = make_batches(processor, [Sample(text="what is a car ?", image=draw_picture(0))], 1)
    block = Block(config=exact.config, kind="decoder")
    shape = (*data.batches[0].is_real.shape, 64)
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    name = "decoder_layer_001"
    found = forward(
        imported.read_block(name),
        x,
        data.batches[0],
        block=block,
        quantization=imported.quantization,
    )
    expected = forward(exact.read_block(name), x, data.batches[0], block=block)
    np.testing.assert_array_equal(found, expected)


QUANTIZED = ("qweight", "qzeros", "scales", "g_idx")
Q = "language_model.model.layers.1.self_attn.q_proj."

# change of the section -> what the line says
CONFIGS = [
    (awq(bits=8), r"has quantization_config \(awq\): bits are 8; only 4 is read"),
    (awq(version="gemv"), "version is 'gemv'"),
    (awq(group_size="128"), "group_size is '128'"),
    (gptq(checkpoint_format="marlin"), "checkpoint_format is 'marlin'"),
    (gptq(bits=None), "bits are None"),
    ({"quant_method": "bitsandbytes"}, r"\(bitsandbytes\): only awq, gptq"),
    ([4], r"\(unnamed method\): is list, not an object"),
    (compressed_tensors(num_bits=8), "weights have 8 bits of type 'int'"),
    (compressed_tensors(strategy="block"), "strategy is 'block'"),
    ({**compressed_tensors(), "format": "nvfp4-pack-quantized"}, "format is 'nvfp4-pack"),
    ({**compressed_tensors(), "kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
    ({**compressed_tensors(), "config_groups": {}}, "config_groups is missing"),
]


def test_damaged_missing_and_unsupported_is_one_line(tmp_path: Path) -> None:
    folder, _ = written(tmp_path, "llava", "gptq")
    config = json.loads((folder / "config.json").read_text())
    tensors = read_folder(folder)

    def refuse(match: str) -> None:
        with pytest.raises(QuotaError, match=match) as caught:
            convert(folder, tmp_path / "out")
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()

    for section, match in CONFIGS:
        (folder / "config.json").write_text(json.dumps({**config, "quantization_config": section}))
        refuse(match)
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": gptq()}))
    wide, order = tensors[Q + "scales"], tensors[Q + "g_idx"]
    broken = wide.copy()
    broken[1, 3] = np.nan
    damages: list[tuple[dict[str, Any], str]] = [
        ({Q + "qzeros": None}, "quantized .*q_proj.weight: qzeros is missing"),
        ({Q + "scales": wide[:-1].copy()}, r"scales is \(3, 64\), expected \(4, 64\)"),
        ({Q + "scales": broken}, "scales holds NaN or infinity"),
        ({Q + "scales": wide.astype(np.float64)}, "scales is F64, expected F32 or F16 or BF16"),
        ({Q + "g_idx": order + 1}, "g_idx names groups that do not exist"),
        ({Q + "g_idx": order[:-2].copy()}, r"g_idx is \(62,\), expected \(64,\)"),
        ({Q + "qweight": tensors[Q + "qweight"][:-1].copy()}, r"expected \(\d"),
        ({Q + "weight": np.zeros((64, 64), np.float16)}, "float weight stands beside it"),
        (
            {Q + part: None for part in QUANTIZED} | {Q + "weight": np.zeros((64, 64), np.float16)},
            "decoder: .* is quantized but .*q_proj.weight is not",
        ),
        ({Q + "bias": np.ones(64, np.float16)}, r"1 unknown tensor: .*q_proj\.bias"),
    ]
    for change, match in damages:
        changed = {**tensors, **change}
        write_tensors(folder, {name: v for name, v in changed.items() if v is not None})
        refuse(match)
    # Some quantizers add biases of zeros.
    write_tensors(folder, {**tensors, Q + "bias": np.zeros(64, np.float16)})
    convert(folder, tmp_path / "out")

    head = write_tiny_llava(tmp_path / "head")
    quantize_folder(
        head, awq(), chosen=lambda name: is_decoder_linear(name) or name.endswith("lm_head.weight")
    )
    with pytest.raises(QuotaError, match=r"lm_head\.weight: a quantized head is not supported"):
        convert(head, tmp_path / "headless")


def test_a_quantized_projector_comes_along(tmp_path: Path) -> None:
    folder = write_tiny_llava(tmp_path / "hf")
    quantize_folder(
        folder,
        compressed_tensors(symmetric=True),
        symmetric=True,
        chosen=lambda name: (
            is_decoder_linear(name) or ("projector.linear" in name and name.endswith("weight"))
        ),
    )
    checkpoint = open_checkpoint(convert(folder, tmp_path / "ckpt"))
    assert checkpoint.quantization == QuantizationConfig(
        method="compressed-tensors",
        weight_bits=4,
        modules=("projector", "decoder"),
        group=16,
        scale_dtype="float16",
    )
    params = flatten_params(checkpoint.load_model())
    assert params["projector.linear_1.packed"].shape == (64, 16)
    assert build_model(checkpoint.config, checkpoint.quantization, params).quantization
