"""Name rules of LLaVA-1.5: CLIP tower, two-layer projector, LLaMA decoder.

Canonical names are those that transformers 5 saves. The other layouts are older hub files, which
keep CLIP's `vision_model.`, and files written from the model in memory, which start with `model.`.
"""

from __future__ import annotations

from converters.rule_parts import (
    AFFINE,
    LAYER_NORM,
    decoder_rows,
    decoder_rules,
    plain,
    stacked,
)
from converters.rules import Layout, Rule, RuleTable
from quota_jax.config import LlavaConfig

_CLIP = "vision_tower."
_CLIP_LAYER = _CLIP + "encoder.layers.{layer}."
_PROJECTOR = "multi_modal_projector."
_LLAMA = "language_model.model."
_HEAD = "language_model.lm_head.weight"
_EMBEDDING = _LLAMA + "embed_tokens.weight"

_RULES = (
    Rule(target="vision.class_embed", sources=(_CLIP + "embeddings.class_embedding",)),
    *plain("vision.patch_embed", _CLIP + "embeddings.patch_embedding", AFFINE[0]),
    *plain("vision.position_embed", _CLIP + "embeddings.position_embedding", AFFINE[0]),
    *plain("vision.pre_norm", _CLIP + "pre_layrnorm", *LAYER_NORM),
    *plain("vision.layers.norm1", _CLIP_LAYER + "layer_norm1", *LAYER_NORM),
    *stacked(
        "vision.layers.attn.qkv",
        _CLIP_LAYER + "self_attn.",
        {"q_proj": "vision_width", "k_proj": "vision_width", "v_proj": "vision_width"},
    ),
    *plain("vision.layers.attn.o", _CLIP_LAYER + "self_attn.out_proj", *AFFINE),
    *plain("vision.layers.norm2", _CLIP_LAYER + "layer_norm2", *LAYER_NORM),
    *plain("vision.layers.mlp.up", _CLIP_LAYER + "mlp.fc1", *AFFINE),
    *plain("vision.layers.mlp.down", _CLIP_LAYER + "mlp.fc2", *AFFINE),
    *plain("vision.post_norm", _CLIP + "post_layernorm", *LAYER_NORM),
    *plain("projector.linear_1", _PROJECTOR + "linear_1", *AFFINE),
    *plain("projector.linear_2", _PROJECTOR + "linear_2", *AFFINE),
    *decoder_rules(_LLAMA, _EMBEDDING, _HEAD),
)

_HUB_TOWER = ("vision_tower.", "vision_tower.vision_model.")
_IN_MEMORY = (
    ("language_model.lm_head.", "lm_head."),
    ("language_model.model.", "model.language_model."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
)


def _row_sizes(config: LlavaConfig) -> dict[str, int]:
    return {"vision_width": config.vision.hidden_size, **decoder_rows(config.text)}


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
