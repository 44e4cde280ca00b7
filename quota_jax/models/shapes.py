"""Name and shape of every parameter of a full-precision model, layers stacked ``[L, ...]``."""

from __future__ import annotations

from quota_jax.config import LlavaConfig, ModelConfig, QwenVlConfig, TextConfig

Shapes = dict[str, tuple[int, ...]]


def parameter_shapes(config: ModelConfig) -> Shapes:
    """Every parameter by dotted name, in the order of the forward pass."""
    vision = _qwen_vision(config) if isinstance(config, QwenVlConfig) else _llava_vision(config)
    return {**vision, **_decoder(config.text)}


def _linear(name: str, stack: tuple[int, ...], rows: int, columns: int, bias: bool) -> Shapes:
    weight: Shapes = {f"{name}.weight": (*stack, rows, columns)}
    return {**weight, f"{name}.bias": (*stack, rows)} if bias else weight


def _rms_norm(name: str, *shape: int) -> Shapes:
    return {f"{name}.scale": shape}


def _layer_norm(name: str, *shape: int) -> Shapes:
    return {f"{name}.scale": shape, f"{name}.bias": shape}


def _llava_vision(config: LlavaConfig) -> Shapes:
    v, width = config.vision, config.text.hidden_size
    d, stack = v.hidden_size, (v.num_layers,)
    features = d * len(config.vision_feature_layers)
    return {
        "vision.class_embed": (d,),
        "vision.patch_embed.weight": (d, v.num_channels, v.patch_size, v.patch_size),
        "vision.position_embed.weight": (v.num_patches + 1, d),
        **_layer_norm("vision.pre_norm", d),
        **_layer_norm("vision.layers.norm1", *stack, d),
        **_linear("vision.layers.attn.qkv", stack, 3 * d, d, True),
        **_linear("vision.layers.attn.o", stack, d, d, True),
        **_layer_norm("vision.layers.norm2", *stack, d),
        **_linear("vision.layers.mlp.up", stack, v.intermediate_size, d, True),
        **_linear("vision.layers.mlp.down", stack, d, v.intermediate_size, True),
        **_layer_norm("vision.post_norm", d),
        **_linear("projector.linear_1", (), width, features, config.projector_bias),
        **_linear("projector.linear_2", (), width, width, config.projector_bias),
    }


def _qwen_vision(config: QwenVlConfig) -> Shapes:
    v = config.vision
    d, stack = v.hidden_size, (v.num_layers,)
    merged = d * v.merge_unit
    patch = (v.num_channels, v.temporal_patch_size, v.patch_size, v.patch_size)
    return {
        "vision.patch_embed.weight": (d, *patch),
        **_rms_norm("vision.layers.norm1", *stack, d),
        **_linear("vision.layers.attn.qkv", stack, 3 * d, d, True),
        **_linear("vision.layers.attn.o", stack, d, d, True),
        **_rms_norm("vision.layers.norm2", *stack, d),
        **_linear("vision.layers.mlp.gate_up", stack, 2 * v.intermediate_size, d, True),
        **_linear("vision.layers.mlp.down", stack, d, v.intermediate_size, True),
        **_rms_norm("projector.norm", d),
        **_linear("projector.linear_1", (), merged, merged, True),
        **_linear("projector.linear_2", (), config.text.hidden_size, merged, True),
    }


def _decoder(t: TextConfig) -> Shapes:
    d, stack = t.hidden_size, (t.num_layers,)
    queries, keys = t.num_heads * t.head_dim, t.num_kv_heads * t.head_dim
    shapes: Shapes = {
        "decoder.embed.weight": (t.vocab_size, d),
        **_rms_norm("decoder.layers.norm1", *stack, d),
        **_linear("decoder.layers.attn.qkv", stack, queries + 2 * keys, d, t.attention_bias),
        **_linear("decoder.layers.attn.o", stack, d, queries, t.output_bias),
        **_rms_norm("decoder.layers.norm2", *stack, d),
        **_linear("decoder.layers.mlp.gate_up", stack, 2 * t.intermediate_size, d, t.mlp_bias),
        **_linear("decoder.layers.mlp.down", stack, d, t.intermediate_size, t.mlp_bias),
        **_rms_norm("decoder.norm", d),
    }
    if not t.tie_word_embeddings:
        shapes["decoder.head.weight"] = (t.vocab_size, d)
    return shapes
