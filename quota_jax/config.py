"""Model configurations: frozen, hashable, static under ``jit``.

``config_from_hf`` reads a Hugging Face ``config.json`` (old or new spelling); ``to_hf`` writes the
new one. Fields that mirror a Hugging Face field keep its meaning.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from quota_jax.errors import QuotaError

ACTIVATIONS = ("gelu", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu")
ROPE_TYPES = ("default", "linear", "llama3")
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeScaling:
    """Frequency scaling of rotary embeddings: ``linear`` or ``llama3`` (other types are
    refused)."""

    rope_type: str
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self):
        if self.rope_type not in ROPE_TYPES[1:]:
            raise QuotaError(f"rope type {self.rope_type!r} is not supported; known: {ROPE_TYPES}")
        if not self.factor > 0:
            raise QuotaError(f"rope scaling factor must be positive, got {self.factor}")


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
        _positive(self, "hidden_size", "intermediate_size", "num_layers", "num_heads", "patch_size")
        _known_activation(self.hidden_act)
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
class TextConfig:
    """Decoder-only language model of the LLaMA family (Hugging Face ``LlamaConfig``)."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int = 2048
    hidden_act: str = "silu"
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False

    def __post_init__(self):
        _positive(
            self,
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_position_embeddings",
        )
        _known_activation(self.hidden_act)
        if self.num_heads % self.num_kv_heads:
            raise QuotaError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise QuotaError(
                f"head_dim {self.head_dim} is odd: rotary embeddings need an even size"
            )


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
        _known_activation(self.projector_hidden_act)
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
    def feature_states(self) -> tuple[int, ...]:
        """``vision_feature_layers`` as non-negative indices: the state after that many tower
        layers."""
        states = self.vision.num_layers + 1
        return tuple(layer % states for layer in self.vision_feature_layers)

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> LlavaConfig:
        """Reads a Hugging Face ``config.json`` dictionary; absent fields take the class defaults
        of HF."""
        vision = _section(hf, "vision_config")
        if vision.get("model_type", "clip_vision_model") != "clip_vision_model":
            raise QuotaError(
                f"vision tower {vision['model_type']!r} is not supported; expected clip"
            )
        layer = hf.get("vision_feature_layer", -2)
        token = hf.get("image_token_index", hf.get("image_token_id", 32000))
        return cls(
            vision=VisionConfig(
                hidden_size=_int(vision, "hidden_size", 1024),
                intermediate_size=_int(vision, "intermediate_size", 4096),
                num_layers=_int(vision, "num_hidden_layers", 24),
                num_heads=_int(vision, "num_attention_heads", 16),
                image_size=_int(vision, "image_size", 336),
                patch_size=_int(vision, "patch_size", 14),
                num_channels=_int(vision, "num_channels", 3),
                layer_norm_eps=float(vision.get("layer_norm_eps", 1e-5)),
                hidden_act=vision.get("hidden_act", "quick_gelu"),
            ),
            text=text_config_from_hf(
                _section(hf, "text_config"), tied=bool(hf.get("tie_word_embeddings", False))
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
            "text_config": text_config_to_hf(text),
        }

    def to_json(self) -> dict[str, Any]:
        return {"model_type": self.model_type, **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LlavaConfig:
        fields = {k: v for k, v in data.items() if k != "model_type"}
        text = dict(_section(fields, "text_config", key="text"))
        if text.get("rope_scaling"):
            text["rope_scaling"] = build(RopeScaling, text["rope_scaling"], "rope_scaling")
        fields["vision"] = build(VisionConfig, _section(fields, "vision", key="vision"), "vision")
        fields["text"] = build(TextConfig, text, "text")
        fields["vision_feature_layers"] = tuple(fields.get("vision_feature_layers", (-2,)))
        return build(cls, fields, "model config")


ModelConfig = LlavaConfig


def text_config_from_hf(text: Mapping[str, Any], *, tied: bool) -> TextConfig:
    """Reads the decoder section. ``rope_parameters`` (new) wins over ``rope_theta/rope_scaling``
    (old).

    Tying follows the outer config as transformers 5 does for composite models, or the section
    itself.
    """
    kind = text.get("model_type", "llama")
    if kind != "llama":
        raise QuotaError(f"language model {kind!r} is not supported; expected llama")
    hidden = _int(text, "hidden_size", 4096)
    heads = _int(text, "num_attention_heads", 32)
    theta, scaling = _rope(text)
    return TextConfig(
        vocab_size=_int(text, "vocab_size", 32000),
        hidden_size=hidden,
        intermediate_size=_int(text, "intermediate_size", 11008),
        num_layers=_int(text, "num_hidden_layers", 32),
        num_heads=heads,
        num_kv_heads=_int(text, "num_key_value_heads", heads),
        head_dim=_int(text, "head_dim", max(1, hidden // heads)),
        rms_norm_eps=float(text.get("rms_norm_eps", 1e-6)),
        rope_theta=theta,
        rope_scaling=scaling,
        max_position_embeddings=_int(text, "max_position_embeddings", 2048),
        hidden_act=text.get("hidden_act", "silu"),
        tie_word_embeddings=tied or bool(text.get("tie_word_embeddings", False)),
        attention_bias=bool(text.get("attention_bias", False)),
        mlp_bias=bool(text.get("mlp_bias", False)),
    )


def text_config_to_hf(text: TextConfig) -> dict[str, Any]:
    """The decoder section of a Hugging Face config, in the spelling of transformers 5."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": text.rope_theta}
    if text.rope_scaling is not None:
        rope |= {"rope_type": text.rope_scaling.rope_type, "factor": text.rope_scaling.factor}
        if text.rope_scaling.rope_type == "llama3":
            rope |= {
                key: getattr(text.rope_scaling, key)
                for key in (
                    "low_freq_factor",
                    "high_freq_factor",
                    "original_max_position_embeddings",
                )
            }
    return {
        "model_type": "llama",
        "vocab_size": text.vocab_size,
        "hidden_size": text.hidden_size,
        "intermediate_size": text.intermediate_size,
        "num_hidden_layers": text.num_layers,
        "num_attention_heads": text.num_heads,
        "num_key_value_heads": text.num_kv_heads,
        "head_dim": text.head_dim,
        "rms_norm_eps": text.rms_norm_eps,
        "rope_parameters": rope,
        "max_position_embeddings": text.max_position_embeddings,
        "hidden_act": text.hidden_act,
        "tie_word_embeddings": text.tie_word_embeddings,
        "attention_bias": text.attention_bias,
        "mlp_bias": text.mlp_bias,
    }


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """The configuration of a Hugging Face checkpoint; an unsupported ``model_type`` is named."""
    kind = hf.get("model_type")
    if kind != "llava":
        raise QuotaError(f"model_type {kind!r} is not supported; supported: llava")
    return LlavaConfig.from_hf(hf)


def config_from_json(data: Mapping[str, Any]) -> ModelConfig:
    """The inverse of ``to_json``."""
    kind = data.get("model_type")
    if kind != "llava":
        raise QuotaError(f"model_type {kind!r} is not supported; supported: llava")
    return LlavaConfig.from_json(data)


def build(cls: type[T], fields: Mapping[str, Any], what: str) -> T:
    """Constructs a config class from JSON fields; unknown, missing or unusable fields are named."""
    known = {field.name for field in dataclasses.fields(cls)}  # pyrefly: ignore
    if unknown := sorted(set(fields) - known):
        raise QuotaError(f"{what}: unknown field {unknown[0]!r}")
    try:
        return cls(**fields)
    except (TypeError, ValueError) as error:
        raise QuotaError(f"{what}: {error}") from None


def _rope(text: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    scaling = text.get("rope_parameters") or text.get("rope_scaling") or {}
    theta = float(scaling.get("rope_theta", text.get("rope_theta", 10000.0)))
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind not in ROPE_TYPES:
        raise QuotaError(f"rope type {kind!r} is not supported; known: {ROPE_TYPES}")
    names = (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    )
    return theta, RopeScaling(rope_type=kind, **{n: scaling[n] for n in names if n in scaling})


def _section(data: Mapping[str, Any], name: str, *, key: str | None = None) -> Mapping[str, Any]:
    section = data.get(key or name)
    if not isinstance(section, Mapping):
        raise QuotaError(f"config has no {name!r} section")
    return section


def _int(data: Mapping[str, Any], name: str, default: int) -> int:
    value = data.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int):
        raise QuotaError(f"config field {name!r} must be an integer, got {value!r}")
    return value


def _positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise QuotaError(f"config field {name!r} must be a positive integer, got {value!r}")


def _known_activation(name: str) -> None:
    if name not in ACTIVATIONS:
        raise QuotaError(f"activation {name!r} is not supported; known: {ACTIVATIONS}")


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


PRESETS: dict[str, ModelConfig] = {
    "llava_1_5_7b": _llava_1_5(4096, 11008, 32, 32),
    "llava_1_5_13b": _llava_1_5(5120, 13824, 40, 40),
}
