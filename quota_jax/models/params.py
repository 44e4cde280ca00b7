"""Parameters by name: form at a precision, checkpoint blocks, model <-> flat dict."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from quota_jax.config import ModelConfig, TextConfig
from quota_jax.errors import QuotaError
from quota_jax.models.alignment import align
from quota_jax.models.build import nest
from quota_jax.models.llava import Llava
from quota_jax.models.qwen2_5_vl import QwenVl
from quota_jax.models.shapes import parameter_shapes
from quota_jax.models.vision_language import VisionLanguageModel
from quota_jax.quant.flatquant import factor_pair
from quota_jax.quantization import QuantizationConfig

LINEARS = ("qkv", "o", "up", "down", "gate_up", "linear_1", "linear_2")
CACHE = "decoder.layers.cache"
"""Under this name stand the parameters of decoder layers that belong to their caches."""
JOINED = {"qkv": 3, "gate_up": 2}
"""Matrices of a Hugging Face model that one linear joins along its rows."""
MODELS: dict[str, Any] = {"llava": Llava, "qwen2_5_vl": QwenVl}


def abstract_params(
    config: ModelConfig, quantization: QuantizationConfig | None = None, dtype: Any = jnp.float32
) -> dict[str, jax.ShapeDtypeStruct]:
    """Every parameter of the stacked model by dotted name; float ones in ``dtype``."""
    shapes = parameter_shapes(config)
    quantization = quantization or QuantizationConfig.none
    check_quantization(config, quantization)
    tables = quantization.table_bits
    params = {}
    for name, shape in shapes.items():
        parts = name.split(".")
        if parts[-1] == "weight" and parts[-2] in LINEARS and quantization.quantizes(parts[0]):
            stem = name.removesuffix("weight")
            *stack, rows, columns = shape
            if quantization.packs:
                packed = (*stack, rows, columns // 2)
                params[stem + "packed"] = jax.ShapeDtypeStruct(packed, jnp.uint8)
            else:
                params[stem + "codes"] = jax.ShapeDtypeStruct(shape, jnp.int8)
            params |= _scales(stem, tuple(stack), rows, columns, quantization, dtype)
            if quantization.has_transforms:
                a, b = factor_pair(columns)
                small: dict[str, tuple[int, ...]] = {"left": (a, a), "right": (b, b), "clip": (2,)}
                if quantization.activation_bits == 16:
                    del small["clip"]
                if parts[-2] == "o" and quantization.output_transform == "heads":
                    heads = (config.vision if parts[0] == "vision" else config.text).num_heads
                    small["left"] = (heads, heads)
                    del small["right"]
                for part, size in small.items():
                    params[stem + part] = jax.ShapeDtypeStruct((*stack, *size), jnp.float32)
        elif tables.get(name.removesuffix(".weight")) == 8:
            stem = name.removesuffix("weight")
            params[stem + "codes"] = jax.ShapeDtypeStruct(shape, jnp.int8)
            params[stem + "scale"] = jax.ShapeDtypeStruct(shape[:1], jnp.dtype(dtype))
        else:
            params[name] = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
    for name, shape in _cache_shapes(config.text, quantization).items():
        params[name] = jax.ShapeDtypeStruct(shape, jnp.dtype(jnp.float32))
    return params


def _cache_shapes(text: TextConfig, quantization: QuantizationConfig) -> dict[str, tuple[int, ...]]:
    """What decoder layers hold of their caches, see ``nn.attention_cache.CacheQuantizer``."""
    stack, width = text.num_layers, text.head_dim
    shapes: dict[str, tuple[int, ...]] = {}
    if quantization.key_transform:
        shapes["query_transform"] = shapes["key_transform"] = (stack, width, width)
    if quantization.cache_clip:
        shapes["clip"] = (stack, 2, 2)
    if quantization.key_quantization == "channel":
        shapes["key_range"] = (stack, 2, text.num_kv_heads, width)
    return {f"{CACHE}.{part}": shape for part, shape in shapes.items()}


def check_quantization(config: ModelConfig, quantization: QuantizationConfig) -> None:
    """Refuses what this model cannot be quantized to."""
    bits = (quantization.embedding_bits, quantization.head_bits)
    if config.text.tie_word_embeddings and len(set(bits)) > 1:
        raise QuotaError(
            f"this model's head is its token embedding: it cannot have {bits[1]} bits and the "
            f"embedding {bits[0]}"
        )
    layers = config.text.num_layers
    if quantization.layer_bits and len(quantization.layer_bits) != layers:
        raise QuotaError(
            f"layer_bits are those of {len(quantization.layer_bits)} layers: the decoder has "
            f"{layers}"
        )


def _scales(
    stem: str,
    stack: tuple[int, ...],
    rows: int,
    columns: int,
    quantization: QuantizationConfig,
    dtype: Any,
) -> dict[str, jax.ShapeDtypeStruct]:
    """Scales of a quantized linear, and what else says how its codes are read."""
    groups, name = quantization.groups, stem.removesuffix(".")
    found: dict[str, tuple[tuple[int, ...], Any]] = {"scale": ((*stack, rows), jnp.float32)}
    if groups is not None:
        shape = (*stack, rows, groups.count(columns))
        found["scale"] = shape, groups.scale_dtype or dtype
        if not groups.symmetric:
            found["zeros"] = shape, jnp.uint8
        if quantization.act_order:
            parts = JOINED.get(name.rpartition(".")[2], 1)
            found["group_index"] = (*stack, parts, columns), jnp.int32
    if name in quantization.input_scales:
        found["input_scale"] = (*stack, columns), jnp.float32
    return {
        stem + part: jax.ShapeDtypeStruct(shape, jnp.dtype(kind))
        for part, (shape, kind) in found.items()
    }


def blocks(
    config: ModelConfig, quantization: QuantizationConfig | None = None, dtype: Any = jnp.float32
) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    """Checkpoint blocks in writing order; a layer block holds unstacked arrays (no leading L)."""
    out: dict[str, dict[str, jax.ShapeDtypeStruct]] = {}
    layers = {"vision": config.vision.num_layers, "decoder": config.text.num_layers}
    order = (
        "vision_embeddings",
        *(f"vision_layer_{i:03d}" for i in range(layers["vision"])),
        "vision_head",
        "projector",
        "embeddings",
        *(f"decoder_layer_{i:03d}" for i in range(layers["decoder"])),
        "head",
    )
    for block in order:
        out[block] = {}
    for name, spec in abstract_params(config, quantization, dtype).items():
        module, part = name.split(".")[:2]
        if part == "layers":
            for i in range(layers[module]):
                out[f"{module}_layer_{i:03d}"][name] = jax.ShapeDtypeStruct(
                    spec.shape[1:], spec.dtype
                )
        else:
            out[_block(module, part)][name] = spec
    return {block: params for block, params in out.items() if params}


def _block(module: str, part: str) -> str:
    if module == "vision":
        return "vision_head" if part == "post_norm" else "vision_embeddings"
    if module == "projector":
        return "projector"
    return "embeddings" if part == "embed" else "head"


def build_model(
    config: ModelConfig, quantization: QuantizationConfig | None, params: Mapping[str, Any]
) -> VisionLanguageModel:
    """The model over ``params`` (arrays or shapes). Float weights of a quantized module are
    simulated; packed feed-forward blocks may be widened, see ``models.alignment``.

    Raises:
      QuotaError: layers of different bits would have to be simulated.
    """
    if quantization is not None and quantization.layer_bits:
        floats = [name for name in params if name.startswith("decoder.layers.")]
        if any(name.endswith(".weight") for name in floats):
            raise QuotaError("method 'luq' runs from stored integers only, not from float weights")
    kind = MODELS[config.model_type]
    quantization = quantization or QuantizationConfig.none
    return kind(nest(align(params, quantization)), config, quantization)


def flatten_params(model: VisionLanguageModel) -> dict[str, jax.Array]:
    """The inverse of ``build_model``: dotted names to arrays (widened ones stay so)."""
    state = nnx.state(model, nnx.Param)
    flat = nnx.to_flat_state(state)
    return {".".join(map(str, path)): variable[...] for path, variable in flat}


def init_params(config: ModelConfig, key: jax.Array, dtype: Any = jnp.float32) -> dict[str, Any]:
    """Random parameters: matrices N(0, 1/fan_in), norm scales 1, biases 0. For benchmarks and
    tests."""
    params = {}
    for i, (name, spec) in enumerate(abstract_params(config, dtype=dtype).items()):
        leaf = name.rsplit(".", 1)[-1]
        if leaf == "scale":
            params[name] = jnp.ones(spec.shape, dtype)
        elif leaf == "bias":
            params[name] = jnp.zeros(spec.shape, dtype)
        else:
            fan_in = spec.shape[-1] if len(spec.shape) > 1 else 1
            if "patch_embed" in name:
                fan_in = math.prod(spec.shape[1:])
            draw = jax.random.normal(jax.random.fold_in(key, i), spec.shape, jnp.float32)
            params[name] = (draw * fan_in**-0.5).astype(dtype)
    return params
