"""Name rules of Qwen2.5-VL: window-attention tower, patch merger, Qwen2.5 decoder.

Canonical names are those that transformers 5 saves, which are also those of the hub's files. The
other layout is that of files written from the model in memory, which start with `model.`.
"""

from __future__ import annotations

from converters.rule_parts import AFFINE, RMS_NORM, decoder_rows, decoder_rules, plain, stacked
from converters.rules import Layout, RuleTable
from quota_jax.config import QwenVlConfig

_TOWER = "visual."
_TOWER_LAYER = _TOWER + "blocks.{layer}."
_MERGER = _TOWER + "merger."
_DECODER = "model."
_HEAD = "lm_head.weight"
_EMBEDDING = _DECODER + "embed_tokens.weight"

_RULES = (
    *plain("vision.patch_embed", _TOWER + "patch_embed.proj", AFFINE[0]),
    *plain("vision.layers.norm1", _TOWER_LAYER + "norm1", *RMS_NORM),
    *plain("vision.layers.attn.qkv", _TOWER_LAYER + "attn.qkv", *AFFINE),
    *plain("vision.layers.attn.o", _TOWER_LAYER + "attn.proj", *AFFINE),
    *plain("vision.layers.norm2", _TOWER_LAYER + "norm2", *RMS_NORM),
    *stacked(
        "vision.layers.mlp.gate_up",
        _TOWER_LAYER + "mlp.",
        {"gate_proj": "vision_ffn", "up_proj": "vision_ffn"},
    ),
    *plain("vision.layers.mlp.down", _TOWER_LAYER + "mlp.down_proj", *AFFINE),
    *plain("projector.norm", _MERGER + "ln_q", *RMS_NORM),
    *plain("projector.linear_1", _MERGER + "mlp.0", *AFFINE),
    *plain("projector.linear_2", _MERGER + "mlp.2", *AFFINE),
    *decoder_rules(_DECODER, _EMBEDDING, _HEAD),
)


def _row_sizes(config: QwenVlConfig) -> dict[str, int]:
    return {"vision_ffn": config.vision.intermediate_size, **decoder_rows(config.text)}


QWEN_RULES = RuleTable(
    rules=_RULES,
    layouts=(
        Layout(name="saved"),
        Layout(name="hub"),
        Layout(
            name="memory",
            prefixes=(("visual.", "model.visual."), ("model.", "model.language_model.")),
        ),
    ),
    row_sizes=_row_sizes,
    # Buffers that transformers computes from the config.
    ignored=(".rotary_emb.inv_freq", ".rotary_pos_emb.inv_freq"),
    tied_copy=(_HEAD, _EMBEDDING),
)
