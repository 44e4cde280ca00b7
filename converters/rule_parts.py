"""Pieces that the rule tables of several model families are made of."""

from __future__ import annotations

from collections.abc import Mapping

from converters.rules import Rule
from quota_jax.config import TextConfig

AFFINE = (("weight", "weight"), ("bias", "bias"))
LAYER_NORM = (("scale", "weight"), ("bias", "bias"))
RMS_NORM = (("scale", "weight"),)
"""(our suffix, their suffix) of a module's parameters. Biases that a model lacks are not asked
for."""


def plain(target: str, source: str, *suffixes: tuple[str, str]) -> tuple[Rule, ...]:
    """One rule per (our suffix, their suffix)."""
    return tuple(
        Rule(target=f"{target}.{ours}", sources=(f"{source}.{theirs}",))
        for ours, theirs in suffixes
    )


def stacked(target: str, prefix: str, parts: Mapping[str, str]) -> tuple[Rule, ...]:
    """Weight and bias of linears whose rows we join; `parts` maps their names to row sizes."""
    return tuple(
        Rule(
            target=f"{target}.{kind}",
            sources=tuple(f"{prefix}{part}.{kind}" for part in parts),
            rows=tuple(parts.values()),
        )
        for kind in ("weight", "bias")
    )


def decoder_rules(model: str, embedding: str, head: str) -> tuple[Rule, ...]:
    """A LLaMA-like decoder whose names start with `model`; `decoder_rows` has its row sizes."""
    layer = model + "layers.{layer}."
    return (
        Rule(target="decoder.embed.weight", sources=(embedding,)),
        *plain("decoder.layers.norm1", layer + "input_layernorm", *RMS_NORM),
        *stacked(
            "decoder.layers.attn.qkv",
            layer + "self_attn.",
            {"q_proj": "queries", "k_proj": "keys", "v_proj": "keys"},
        ),
        *plain("decoder.layers.attn.o", layer + "self_attn.o_proj", *AFFINE),
        *plain("decoder.layers.norm2", layer + "post_attention_layernorm", *RMS_NORM),
        *stacked(
            "decoder.layers.mlp.gate_up",
            layer + "mlp.",
            {"gate_proj": "ffn", "up_proj": "ffn"},
        ),
        *plain("decoder.layers.mlp.down", layer + "mlp.down_proj", *AFFINE),
        *plain("decoder.norm", model + "norm", *RMS_NORM),
        Rule(target="decoder.head.weight", sources=(head,)),
    )


def decoder_rows(text: TextConfig) -> dict[str, int]:
    """Heights of the linears that `decoder_rules` joins."""
    return {
        "queries": text.num_heads * text.head_dim,
        "keys": text.num_kv_heads * text.head_dim,
        "ffn": text.intermediate_size,
    }
