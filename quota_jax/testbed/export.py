"""Writes trained small models as Hugging Face LLaVA folders (safetensors shards and JSON)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from quota_jax.config import LlavaConfig
from quota_jax.testbed.vocabulary import write_processor_files

_VISION = "vision_tower.vision_model."
_TEXT = "language_model.model."
_SINGLE = {
    "vision.class_embed": _VISION + "embeddings.class_embedding",
    "vision.patch_embed.weight": _VISION + "embeddings.patch_embedding.weight",
    "vision.position_embed.weight": _VISION + "embeddings.position_embedding.weight",
    "vision.pre_norm.scale": _VISION + "pre_layrnorm.weight",
    "vision.pre_norm.bias": _VISION + "pre_layrnorm.bias",
    "vision.post_norm.scale": _VISION + "post_layernorm.weight",
    "vision.post_norm.bias": _VISION + "post_layernorm.bias",
    "projector.linear_1.weight": "multi_modal_projector.linear_1.weight",
    "projector.linear_1.bias": "multi_modal_projector.linear_1.bias",
    "projector.linear_2.weight": "multi_modal_projector.linear_2.weight",
    "projector.linear_2.bias": "multi_modal_projector.linear_2.bias",
    "decoder.embed.weight": _TEXT + "embed_tokens.weight",
    "decoder.norm.scale": _TEXT + "norm.weight",
    "decoder.head.weight": "language_model.lm_head.weight",
}
# Name inside a layer -> names of the equal row blocks it is cut into.
_VISION_LAYER = {
    "norm1": ("layer_norm1",),
    "norm2": ("layer_norm2",),
    "attn.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.o": ("self_attn.out_proj",),
    "mlp.up": ("mlp.fc1",),
    "mlp.down": ("mlp.fc2",),
}
_TEXT_LAYER = {
    "norm1": ("input_layernorm",),
    "norm2": ("post_attention_layernorm",),
    "attn.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.o": ("self_attn.o_proj",),
    "mlp.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down": ("mlp.down_proj",),
}


def hf_tensors(params: Mapping[str, Any], config: LlavaConfig) -> Iterator[tuple[str, np.ndarray]]:
    """(Hugging Face name, bfloat16 array) of every parameter; multi-head attention only.

    Every parameter must be known; `aux.*` heads are training aids and are refused too.
    """
    if config.text.num_kv_heads != config.text.num_heads:
        raise ValueError("the exporter of the testbed cuts query, key and value rows equally")
    for name, value in params.items():
        array = np.asarray(value).astype(ml_dtypes.bfloat16)
        if name in _SINGLE:
            yield _SINGLE[name], array
            continue
        for prefix, target, table in (
            ("vision.layers.", _VISION + "encoder.layers.", _VISION_LAYER),
            ("decoder.layers.", _TEXT + "layers.", _TEXT_LAYER),
        ):
            if name.startswith(prefix):
                inner, leaf = name.removeprefix(prefix).rsplit(".", 1)
                leaf = "weight" if leaf == "scale" else leaf
                for index, layer in enumerate(array):
                    parts = table[inner]
                    for part, rows in zip(parts, np.split(layer, len(parts)), strict=True):
                        yield f"{target}{index}.{part}.{leaf}", np.ascontiguousarray(rows)
                break
        else:
            raise ValueError(f"parameter {name!r} has no Hugging Face name")


def hf_config(config: LlavaConfig) -> dict[str, Any]:
    """`config.json` of the exported folder."""
    return config.to_hf() | {"dtype": "bfloat16", "torch_dtype": "bfloat16"}


def write_hf_folder(
    folder: Path,
    params: Mapping[str, Any],
    config: LlavaConfig,
    *,
    card: str,
    shard_bytes: int = 14_000_000,
) -> dict[str, int]:
    """Write a complete folder, shards of at most `shard_bytes`; returns the file sizes."""
    from safetensors.flax import save_file  # knows bfloat16

    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Any]] = [{}]
    filled = total = 0
    for name, array in hf_tensors(params, config):
        if filled + array.nbytes > shard_bytes and shards[-1]:
            shards.append({})
            filled = 0
        shards[-1][name] = array
        filled += array.nbytes
        total += array.nbytes
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)
        weight_map |= dict.fromkeys(sorted(shard), file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    (folder / "config.json").write_text(json.dumps(hf_config(config), indent=2) + "\n")
    (folder / "README.md").write_text(card)
    write_processor_files(folder)
    return {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
