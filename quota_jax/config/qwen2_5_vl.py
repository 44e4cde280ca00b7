"""Qwen2.5-VL: window-attention tower, patch merger, decoder with multimodal rotation."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quota_jax.config.fields import (
    build,
    check_activation,
    check_positive,
    integer,
    integers,
    section,
)
from quota_jax.config.text import TextConfig, qwen_text_from_hf, qwen_text_to_hf
from quota_jax.errors import QuotaError

REFERENCE_PIXELS = 1008
"""Side of the square picture that tables speak of: 1296 tokens with patch 14 and merge 2."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QwenVisionConfig:
    """Vision tower of Qwen2.5-VL (Hugging Face ``Qwen2_5_VLVisionConfig``).

    Pictures of any size come as patches of ``temporal_patch_size x patch_size x patch_size``
    pixels. ``spatial_merge_size`` squared neighbours become one visual token. Layers attend inside
    windows of ``window_size`` pixels, but for ``full_attention_layers``, which see the whole frame.
    ``tokens_per_second``: steps of the temporal position per second of video.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    patch_size: int = 14
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    window_size: int = 112
    full_attention_layers: tuple[int, ...] = (7, 15, 23, 31)
    num_channels: int = 3
    hidden_act: str = "silu"
    rope_theta: float = 10000.0
    tokens_per_second: int = 4
    norm_eps: float = 1e-6

    def __post_init__(self):
        check_positive(
            self,
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "patch_size",
            "temporal_patch_size",
            "spatial_merge_size",
            "window_size",
            "num_channels",
            "tokens_per_second",
        )
        check_activation(self.hidden_act)
        if self.hidden_size % self.num_heads or self.head_dim % 4:
            raise QuotaError(
                f"vision hidden_size {self.hidden_size} with {self.num_heads} heads: a head must "
                "have a multiple of 4 values"
            )
        if self.window_units < 1:
            raise QuotaError(
                f"window_size {self.window_size} is smaller than a visual token "
                f"({self.spatial_merge_size} x {self.patch_size} pixels)"
            )
        for layer in self.full_attention_layers:
            if not 0 <= layer < self.num_layers:
                raise QuotaError(
                    f"fullatt_block_indexes {list(self.full_attention_layers)}: the tower has "
                    f"{self.num_layers} layers"
                )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def merge_unit(self) -> int:
        """Patches that become one visual token."""
        return self.spatial_merge_size**2

    @property
    def window_units(self) -> int:
        """Side of an attention window in visual tokens."""
        return self.window_size // self.spatial_merge_size // self.patch_size

    @property
    def window_patches(self) -> int:
        """Most patches of one attention window."""
        return self.window_units**2 * self.merge_unit

    @property
    def patch_values(self) -> int:
        """Values of one patch."""
        return self.num_channels * self.temporal_patch_size * self.patch_size**2


@dataclass(frozen=True, kw_only=True, slots=True)
class QwenVlConfig:
    """Qwen2.5-VL (Hugging Face ``Qwen2_5_VLConfig``)."""

    vision: QwenVisionConfig
    text: TextConfig
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653

    def __post_init__(self):
        if self.text.mrope_section is None:
            raise QuotaError("Qwen2.5-VL needs an mrope_section")

    @property
    def model_type(self) -> str:
        return "qwen2_5_vl"

    @property
    def reference_picture(self) -> tuple[str, int]:
        """A picture to talk about in tables, and its visual tokens."""
        side = REFERENCE_PIXELS // (self.vision.patch_size * self.vision.spatial_merge_size)
        return f"a picture of {REFERENCE_PIXELS} x {REFERENCE_PIXELS} pixels", side * side

    @property
    def vision_summary(self) -> str:
        """The vision tower in a few words."""
        v = self.vision
        edge = v.patch_size * v.spatial_merge_size
        full = ", ".join(map(str, v.full_attention_layers)) or "none"
        return (
            f"{v.num_layers} layers, width {v.hidden_size}, windows of {v.window_size} px (full "
            f"attention in layers {full}), one token per {edge} x {edge} px"
        )

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> QwenVlConfig:
        """Reads a ``config.json`` dictionary, with a ``text_config`` or flat as hub files are."""
        vision = section(hf, "vision_config")
        text = section(hf, "text_config") if hf.get("text_config") is not None else hf
        rope = vision.get("rope_parameters") or {}
        channels = integer(vision, "in_channels", integer(vision, "in_chans", 3))
        config = cls(
            vision=QwenVisionConfig(
                hidden_size=integer(vision, "hidden_size", 3584),
                intermediate_size=integer(vision, "intermediate_size", 3420),
                num_layers=integer(vision, "depth", 32),
                num_heads=integer(vision, "num_heads", 16),
                patch_size=integer(vision, "patch_size", 14),
                temporal_patch_size=integer(vision, "temporal_patch_size", 2),
                spatial_merge_size=integer(vision, "spatial_merge_size", 2),
                window_size=integer(vision, "window_size", 112),
                full_attention_layers=integers(vision, "fullatt_block_indexes", (7, 15, 23, 31)),
                num_channels=channels,
                hidden_act=vision.get("hidden_act", "silu"),
                rope_theta=float(rope.get("rope_theta", 10000.0)),
                tokens_per_second=integer(vision, "tokens_per_second", 4),
            ),
            text=qwen_text_from_hf(
                text,
                tied=bool(hf.get("tie_word_embeddings") or text.get("tie_word_embeddings")),
            ),
            image_token_id=integer(hf, "image_token_id", 151655),
            video_token_id=integer(hf, "video_token_id", 151656),
            vision_start_token_id=integer(hf, "vision_start_token_id", 151652),
            vision_end_token_id=integer(hf, "vision_end_token_id", 151653),
        )
        out = integer(vision, "out_hidden_size", 3584)
        if out != config.text.hidden_size:
            raise QuotaError(
                f"vision out_hidden_size {out} differs from the decoder's hidden_size "
                f"{config.text.hidden_size}"
            )
        return config

    def to_hf(self) -> dict[str, Any]:
        """A ``config.json`` dictionary that transformers 5 loads."""
        vision = self.vision
        return {
            "architectures": ["Qwen2_5_VLForConditionalGeneration"],
            "model_type": "qwen2_5_vl",
            "image_token_id": self.image_token_id,
            "video_token_id": self.video_token_id,
            "vision_start_token_id": self.vision_start_token_id,
            "vision_end_token_id": self.vision_end_token_id,
            "tie_word_embeddings": self.text.tie_word_embeddings,
            "vision_config": {
                "model_type": "qwen2_5_vl_vision",
                "depth": vision.num_layers,
                "hidden_size": vision.hidden_size,
                "intermediate_size": vision.intermediate_size,
                "num_heads": vision.num_heads,
                "patch_size": vision.patch_size,
                "temporal_patch_size": vision.temporal_patch_size,
                "spatial_merge_size": vision.spatial_merge_size,
                "window_size": vision.window_size,
                "fullatt_block_indexes": list(vision.full_attention_layers),
                "in_channels": vision.num_channels,
                "hidden_act": vision.hidden_act,
                "tokens_per_second": vision.tokens_per_second,
                "out_hidden_size": self.text.hidden_size,
                "rope_parameters": {"rope_type": "axial", "rope_theta": vision.rope_theta},
            },
            "text_config": qwen_text_to_hf(self.text),
        }

    def to_json(self) -> dict[str, Any]:
        return {"model_type": self.model_type, **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> QwenVlConfig:
        fields = {k: v for k, v in data.items() if k != "model_type"}
        vision = dict(section(fields, "vision"))
        vision["full_attention_layers"] = tuple(vision.get("full_attention_layers", ()))
        fields["vision"] = build(QwenVisionConfig, vision, "vision")
        fields["text"] = TextConfig.from_json(section(fields, "text"))
        return build(cls, fields, "model config")


def _qwen2_5_vl(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocab: int, tied: bool
) -> QwenVlConfig:
    return QwenVlConfig(
        vision=QwenVisionConfig(
            hidden_size=1280,
            intermediate_size=3420,
            num_layers=32,
            num_heads=16,
            tokens_per_second=2,
        ),
        text=TextConfig(
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=128,
            rms_norm_eps=1e-6,
            rope_theta=1000000.0,
            max_position_embeddings=128000,
            tie_word_embeddings=tied,
            attention_bias=True,
            mrope_section=(16, 24, 24),
        ),
    )


QWEN_PRESETS: dict[str, QwenVlConfig] = {
    "qwen2_5_vl_3b": _qwen2_5_vl(2048, 11008, 36, 16, 2, 151936, True),
    "qwen2_5_vl_7b": _qwen2_5_vl(3584, 18944, 28, 28, 4, 152064, False),
}
