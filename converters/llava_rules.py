"""Name rules of LLaVA-1.5: CLIP tower, two-layer projector, LLaMA decoder.

Canonical names are those that transformers 5 saves. The other layouts are older hub files, which
keep CLIP's `vision_model.`, and files written from the model in memory, which start with `model.`.
"""

from __future__ import annotations

from collections.abc import Mapping

from converters.rules import Layout, Rule, RuleTable
from quota_jax.config import LlavaConfig

_CLIP = "vision_tower."
_CLIP_LAYER = _CLIP + "encoder.layers.{layer}."
_PROJECTOR = "multi_modal_projector."
_LLAMA = "language_model.model."
_LLAMA_LAYER = _LLAMA + "layers.{layer}."
_HEAD = "language_model.lm_head.weight"
_EMBEDDING = _LLAMA + "embed_tokens.weight"


def _plain(target: str, source: str, *suffixes: tuple[str, str]) -> tuple[Rule, ...]:
    """One rule per (our suffix, their suffix)."""
    return tuple(
        Rule(target=f"{target}.{ours}", sources=(f"{source}.{theirs}",))
        for ours, theirs in suffixes
    )


def _stacked(target: str, prefix: str, parts: Mapping[str, str]) -> tuple[Rule, ...]:
    """Weight and bias of linears whose rows we join; `parts` maps their names to row sizes."""
    return tuple(
        Rule(
            target=f"{target}.{kind}",
            sources=tuple(f"{prefix}{part}.{kind}" for part in parts),
            rows=tuple(parts.values()),
        )
        for kind in ("weight", "bias")
    )


_AFFINE = (("weight", "weight"), ("bias", "bias"))
_LAYER_NORM = (("scale", "weight"), ("bias", "bias"))
_RMS_NORM = (("scale", "weight"),)

_RULES = (
    Rule(target="vision.class_embed", sources=(_CLIP + "embeddings.class_embedding",)),
    *_plain("vision.patch_embed", _CLIP + "embeddings.patch_embedding", _AFFINE[0]),
    *_plain("vision.position_embed", _CLIP + "embeddings.position_embedding", _AFFINE[0]),
    *_plain("vision.pre_norm", _CLIP + "pre_layrnorm", *_LAYER_NORM),
    *_plain("vision.layers.norm1", _CLIP_LAYER + "layer_norm1", *_LAYER_NORM),
    *_stacked(
        "vision.layers.attn.qkv",
        _CLIP_LAYER + "self_attn.",
        {"q_proj": "vision_width", "k_proj": "vision_width", "v_proj": "vision_width"},
    ),
    *_plain("vision.layers.attn.o", _CLIP_LAYER + "self_attn.out_proj", *_AFFINE),
    *_plain("vision.layers.norm2", _CLIP_LAYER + "layer_norm2", *_LAYER_NORM),
    *_plain("vision.layers.mlp.up", _CLIP_LAYER + "mlp.fc1", *_AFFINE),
    *_plain("vision.layers.mlp.down", _CLIP_LAYER + "mlp.fc2", *_AFFINE),
    *_plain("vision.post_norm", _CLIP + "post_layernorm", *_LAYER_NORM),
    *_plain("projector.linear_1", _PROJECTOR + "linear_1", *_AFFINE),
    *_plain("projector.linear_2", _PROJECTOR + "linear_2", *_AFFINE),
    Rule(target="decoder.embed.weight", sources=(_EMBEDDING,)),
    *_plain("decoder.layers.norm1", _LLAMA_LAYER + "input_layernorm", *_RMS_NORM),
    *_stacked(
        "decoder.layers.attn.qkv",
        _LLAMA_LAYER + "self_attn.",
        {"q_proj": "queries", "k_proj": "keys", "v_proj": "keys"},
    ),
    *_plain("decoder.layers.attn.o", _LLAMA_LAYER + "self_attn.o_proj", *_AFFINE),
    *_plain("decoder.layers.norm2", _LLAMA_LAYER + "post_attention_layernorm", *_RMS_NORM),
    *_stacked(
        "decoder.layers.mlp.gate_up",
        _LLAMA_LAYER + "mlp.",
        {"gate_proj": "ffn", "up_proj": "ffn"},
    ),
    *_plain("decoder.layers.mlp.down", _LLAMA_LAYER + "mlp.down_proj", *_AFFINE),
    *_plain("decoder.norm", _LLAMA + "norm", *_RMS_NORM),
    Rule(target="decoder.head.weight", sources=(_HEAD,)),
)

_HUB_TOWER = ("vision_tower.", "vision_tower.vision_model.")
_IN_MEMORY = (
    ("language_model.lm_head.", "lm_head."),
    ("language_model.model.", "model.language_model."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
)


def _row_sizes(config: LlavaConfig) -> dict[str, int]:
    text = config.text
    return {
        "vision_width": config.vision.hidden_size,
        "queries": text.num_heads * text.head_dim,
        "keys": text.num_kv_heads * text.head_dim,
        "ffn": text.intermediate_size,
    }


LLAVA_RULES = RuleTable(
    rules=_RULES,
    layouts=(
        Layout(name="saved"),
        Layout(name="hub", prefixes=(_HUB_TOWER,)),
        Layout(name="memory", prefixes=(*_IN_MEMORY, ("vision_tower.", "model.vision_tower."))),
        Layout(
            name="memory_vision_model",
            prefixes=(*_IN_MEMORY, ("vision_tower.", "model.vision_tower.vision_model.")),
        ),
    ),
    row_sizes=_row_sizes,
    # Buffers that older versions saved; transformers computes them from the config.
    ignored=(".embeddings.position_ids", ".rotary_emb.inv_freq"),
    tied_copy=(_HEAD, _EMBEDDING),
)
