"""Names and shapes of every parameter, how they fall into checkpoint blocks, and model <-> flat
dict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from quota_jax.config import LlavaConfig, ModelConfig
from quota_jax.models.build import nest
from quota_jax.models.llava import Llava
from quota_jax.quantization import QuantizationConfig

LINEARS = ("qkv", "o", "up", "down", "gate_up", "linear_1", "linear_2")


def abstract_params(
    config: ModelConfig, quantization: QuantizationConfig | None = None, dtype: Any = jnp.float32
) -> dict[str, jax.ShapeDtypeStruct]:
    """Every parameter of the stacked model by dotted name; float ones in ``dtype``."""
    shapes = _full_precision(config)
    quantization = quantization or QuantizationConfig.none
    params = {}
    for name, shape in shapes.items():
        parts = name.split(".")
        if parts[-1] == "weight" and parts[-2] in LINEARS and quantization.quantizes(parts[0]):
            stem = name.removesuffix("weight")
            *stack, rows, columns = shape
            if quantization.weight_bits == 4:
                packed = (*stack, rows, columns // 2)
                params[stem + "packed"] = jax.ShapeDtypeStruct(packed, jnp.uint8)
            else:
                params[stem + "codes"] = jax.ShapeDtypeStruct(shape, jnp.int8)
            params[stem + "scale"] = jax.ShapeDtypeStruct((*stack, rows), jnp.float32)
        else:
            params[name] = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
    return params


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
    return out


def _block(module: str, part: str) -> str:
    if module == "vision":
        return "vision_head" if part == "post_norm" else "vision_embeddings"
    if module == "projector":
        return "projector"
    return "embeddings" if part == "embed" else "head"


def build_model(
    config: ModelConfig, quantization: QuantizationConfig | None, params: Mapping[str, Any]
) -> Llava:
    """The model over ``params`` (arrays or shapes). Float weights of a quantized module are
    simulated."""
    return Llava(nest(params), config, quantization or QuantizationConfig.none)


def flatten_params(model: Llava) -> dict[str, jax.Array]:
    """The inverse of ``build_model``: dotted names to arrays."""
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
            draw = jax.random.normal(jax.random.fold_in(key, i), spec.shape, jnp.float32)
            params[name] = (draw * fan_in**-0.5).astype(dtype)
    return params


def _full_precision(config: LlavaConfig) -> dict[str, tuple[int, ...]]:
    v, t = config.vision, config.text
    shapes: dict[str, tuple[int, ...]] = {}

    def add(name, *shape):
        shapes[name] = shape

    def dense(name, stack, rows, columns, bias):
        add(f"{name}.weight", *stack, rows, columns)
        if bias:
            add(f"{name}.bias", *stack, rows)

    def layer_norm(name, *shape):
        add(f"{name}.scale", *shape)
        add(f"{name}.bias", *shape)

    patch = (v.num_channels, v.patch_size, v.patch_size)
    add("vision.class_embed", v.hidden_size)
    add("vision.patch_embed.weight", v.hidden_size, *patch)
    add("vision.position_embed.weight", v.num_patches + 1, v.hidden_size)
    layer_norm("vision.pre_norm", v.hidden_size)
    stack = (v.num_layers,)
    layer_norm("vision.layers.norm1", *stack, v.hidden_size)
    dense("vision.layers.attn.qkv", stack, 3 * v.hidden_size, v.hidden_size, True)
    dense("vision.layers.attn.o", stack, v.hidden_size, v.hidden_size, True)
    layer_norm("vision.layers.norm2", *stack, v.hidden_size)
    dense("vision.layers.mlp.up", stack, v.intermediate_size, v.hidden_size, True)
    dense("vision.layers.mlp.down", stack, v.hidden_size, v.intermediate_size, True)
    layer_norm("vision.post_norm", v.hidden_size)

    features = v.hidden_size * len(config.vision_feature_layers)
    dense("projector.linear_1", (), t.hidden_size, features, config.projector_bias)
    dense("projector.linear_2", (), t.hidden_size, t.hidden_size, config.projector_bias)

    stack = (t.num_layers,)
    q_size, kv_size = t.num_heads * t.head_dim, t.num_kv_heads * t.head_dim
    add("decoder.embed.weight", t.vocab_size, t.hidden_size)
    add("decoder.layers.norm1.scale", *stack, t.hidden_size)
    dense("decoder.layers.attn.qkv", stack, q_size + 2 * kv_size, t.hidden_size, t.attention_bias)
    dense("decoder.layers.attn.o", stack, t.hidden_size, q_size, t.attention_bias)
    add("decoder.layers.norm2.scale", *stack, t.hidden_size)
    dense("decoder.layers.mlp.gate_up", stack, 2 * t.intermediate_size, t.hidden_size, t.mlp_bias)
    dense("decoder.layers.mlp.down", stack, t.hidden_size, t.intermediate_size, t.mlp_bias)
    add("decoder.norm.scale", t.hidden_size)
    if not t.tie_word_embeddings:
        add("decoder.head.weight", t.vocab_size, t.hidden_size)
    return shapes
