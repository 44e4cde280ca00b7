"""LLaVA-1.5: CLIP tower, two-layer projector, LLaMA decoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quota_jax.config.fields import build, check_activation, check_positive, integer, section
from quota_jax.config.text import TextConfig, llama_from_hf, llama_to_hf
from quota_jax.errors import QuotaError


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionConfig:
    """CLIP vision transformer (Hugging Face ``CLIPVisionConfig``)."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    image_size: int
    patch_size: int
    num_channels: int = 3
    layer_norm_eps: float = 1e-5
    hidden_act: str = "quick_gelu"

    def __post_init__(self):
        check_positive(
            self, "hidden_size", "intermediate_size", "num_layers", "num_heads", "patch_size"
        )
        check_activation(self.hidden_act)
        if self.hidden_size % self.num_heads:
            raise QuotaError(
                f"vision hidden_size {self.hidden_size} is not a multiple of num_heads "
                f"{self.num_heads}"
            )
        if self.image_size < self.patch_size:
            raise QuotaError(
                f"image_size {self.image_size} is smaller than patch_size {self.patch_size}"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True, kw_only=True, slots=True)
class LlavaConfig:
    """LLaVA-1.5: CLIP tower, two-layer projector, LLaMA decoder (Hugging Face ``LlavaConfig``).

    ``vision_feature_layers`` holds one or more indices into the tower's hidden states (index 0 is
    the embedding output, negative counts from the end); several are concatenated along the
    features.
    """

    vision: VisionConfig
    text: TextConfig
    image_token_id: int
    vision_feature_layers: tuple[int, ...] = (-2,)
    vision_feature_select_strategy: str = "default"
    projector_hidden_act: str = "gelu"
    projector_bias: bool = True

    def __post_init__(self):
        check_activation(self.projector_hidden_act)
        if self.vision_feature_select_strategy not in ("default", "full"):
            raise QuotaError(
                "vision_feature_select_strategy must be 'default' or 'full', got "
                f"{self.vision_feature_select_strategy!r}"
            )
        if not self.vision_feature_layers:
            raise QuotaError("vision_feature_layer is empty")
        states = self.vision.num_layers + 1
        for layer in self.vision_feature_layers:
            if not -states <= layer < states:
                raise QuotaError(
                    f"vision_feature_layer {layer} is outside the tower's {states} hidden states"
                )

    @property
    def model_type(self) -> str:
        return "llava"

    @property
    def tokens_per_image(self) -> int:
        """Visual tokens of one picture after the projector (576 for LLaVA-1.5)."""
        return self.vision.num_patches + (self.vision_feature_select_strategy == "full")

    @property
    def reference_picture(self) -> tuple[str, int]:
        """A picture to talk about in tables, and its visual tokens."""
        return "one picture", self.tokens_per_image

    @property
    def vision_summary(self) -> str:
        """The vision tower in a few words."""
        v = self.vision
        return (
            f"{v.num_layers} layers, width {v.hidden_size}, {v.image_size} px, patch "
            f"{v.patch_size}, {self.tokens_per_image} tokens per image"
        )

    @property
    def feature_states(self) -> tuple[int, ...]:
        """``vision_feature_layers`` as non-negative indices: the state after that many tower
        layers."""
        states = self.vision.num_layers + 1
        return tuple(layer % states for layer in self.vision_feature_layers)

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> LlavaConfig:
        """Reads a Hugging Face ``config.json`` dictionary; absent fields take the class defaults
        of HF."""
        vision = section(hf, "vision_config")
        if vision.get("model_type", "clip_vision_model") != "clip_vision_model":
            raise QuotaError(
                f"vision tower {vision['model_type']!r} is not supported; expected clip"
            )
        layer = hf.get("vision_feature_layer", -2)
        token = hf.get("image_token_index", hf.get("image_token_id", 32000))
        return cls(
            vision=VisionConfig(
                hidden_size=integer(vision, "hidden_size", 1024),
                intermediate_size=integer(vision, "intermediate_size", 4096),
                num_layers=integer(vision, "num_hidden_layers", 24),
                num_heads=integer(vision, "num_attention_heads", 16),
                image_size=integer(vision, "image_size", 336),
                patch_size=integer(vision, "patch_size", 14),
                num_channels=integer(vision, "num_channels", 3),
                layer_norm_eps=float(vision.get("layer_norm_eps", 1e-5)),
                hidden_act=vision.get("hidden_act", "quick_gelu"),
            ),
            text=llama_from_hf(
                section(hf, "text_config"), tied=bool(hf.get("tie_word_embeddings", False))
            ),
            image_token_id=int(token),
            vision_feature_layers=tuple(layer)
            if isinstance(layer, list | tuple)
            else (int(layer),),
            vision_feature_select_strategy=hf.get("vision_feature_select_strategy", "default"),
            projector_hidden_act=hf.get("projector_hidden_act", "gelu"),
            projector_bias=bool(hf.get("multimodal_projector_bias", True)),
        )

    def to_hf(self) -> dict[str, Any]:
        """A ``config.json`` dictionary that transformers 5 loads."""
        vision, text = self.vision, self.text
        layers = self.vision_feature_layers
        return {
            "architectures": ["LlavaForConditionalGeneration"],
            "model_type": "llava",
            "image_token_index": self.image_token_id,
            "image_seq_length": self.tokens_per_image,
            "vision_feature_layer": layers[0] if len(layers) == 1 else list(layers),
            "vision_feature_select_strategy": self.vision_feature_select_strategy,
            "projector_hidden_act": self.projector_hidden_act,
            "multimodal_projector_bias": self.projector_bias,
            "tie_word_embeddings": text.tie_word_embeddings,
            "vision_config": {
                "model_type": "clip_vision_model",
                "hidden_size": vision.hidden_size,
                "intermediate_size": vision.intermediate_size,
                "num_hidden_layers": vision.num_layers,
                "num_attention_heads": vision.num_heads,
                "image_size": vision.image_size,
                "patch_size": vision.patch_size,
                "num_channels": vision.num_channels,
                "layer_norm_eps": vision.layer_norm_eps,
                "hidden_act": vision.hidden_act,
            },
            "text_config": llama_to_hf(text),
        }

    def to_json(self) -> dict[str, Any]:
        return {"model_type": self.model_type, **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LlavaConfig:
        fields = {k: v for k, v in data.items() if k != "model_type"}
        fields["vision"] = build(VisionConfig, section(fields, "vision"), "vision")
        fields["text"] = TextConfig.from_json(section(fields, "text"))
        fields["vision_feature_layers"] = tuple(fields.get("vision_feature_layers", (-2,)))
        return build(cls, fields, "model config")


def _llava_1_5(hidden: int, intermediate: int, layers: int, heads: int) -> LlavaConfig:
    return LlavaConfig(
        vision=VisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_layers=24,
            num_heads=16,
            image_size=336,
            patch_size=14,
        ),
        text=TextConfig(
            vocab_size=32064,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=128,
            rms_norm_eps=1e-5,
            max_position_embeddings=4096,
        ),
        image_token_id=32000,
    )


LLAVA_PRESETS: dict[str, LlavaConfig] = {
    "llava_1_5_7b": _llava_1_5(4096, 11008, 32, 32),
    "llava_1_5_13b": _llava_1_5(5120, 13824, 40, 40),
}
