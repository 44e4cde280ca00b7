"""The decoder-only language model: LLaMA, or the text half of Qwen2.5-VL."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quota_jax.config.fields import build, check_activation, check_positive, integer, integers
from quota_jax.errors import QuotaError

ROPE_TYPES = ("default", "linear", "llama3")
LLAMA3_FIELDS = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


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
class TextConfig:
    """Decoder-only language model (Hugging Face ``LlamaConfig`` or ``Qwen2_5_VLTextConfig``).

    ``attention_bias`` is on q, k and v, ``output_bias`` on the attention's output: LLaMA has both
    or none, Qwen2.5-VL only the first. With ``mrope_section`` positions have three streams (frame,
    row, column), and the rotary pairs of a head are shared out among them in sections of these
    sizes.
    """

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
    output_bias: bool = False
    mlp_bias: bool = False
    mrope_section: tuple[int, ...] | None = None

    def __post_init__(self):
        check_positive(
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
        check_activation(self.hidden_act)
        if self.num_heads % self.num_kv_heads:
            raise QuotaError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise QuotaError(
                f"head_dim {self.head_dim} is odd: rotary embeddings need an even size"
            )
        sections = self.mrope_section
        if sections is not None and (
            len(sections) != 3 or min(sections) < 0 or 2 * sum(sections) != self.head_dim
        ):
            raise QuotaError(
                f"mrope_section {list(sections)} must be three sizes that add up to half of "
                f"head_dim {self.head_dim}"
            )

    @property
    def position_shape(self) -> tuple[int, ...]:
        """Trailing shape of a token's position: ``()``, or ``(3,)`` with multimodal rotation."""
        return () if self.mrope_section is None else (3,)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TextConfig:
        """Reads what ``dataclasses.asdict`` gave, after a round trip through JSON."""
        fields = dict(data)
        if fields.get("rope_scaling"):
            fields["rope_scaling"] = build(RopeScaling, fields["rope_scaling"], "rope_scaling")
        if fields.get("mrope_section") is not None:
            fields["mrope_section"] = tuple(fields["mrope_section"])
        return build(cls, fields, "text")


def llama_from_hf(text: Mapping[str, Any], *, tied: bool) -> TextConfig:
    """Reads a LLaMA decoder section; absent fields take the defaults of ``LlamaConfig``.

    Tying follows the outer config as transformers 5 does for composite models, or the section
    itself.
    """
    kind = text.get("model_type", "llama")
    if kind != "llama":
        raise QuotaError(f"language model {kind!r} is not supported; expected llama")
    hidden = integer(text, "hidden_size", 4096)
    heads = integer(text, "num_attention_heads", 32)
    theta, scaling = _rope(text, 10000.0)
    bias = bool(text.get("attention_bias", False))
    return TextConfig(
        vocab_size=integer(text, "vocab_size", 32000),
        hidden_size=hidden,
        intermediate_size=integer(text, "intermediate_size", 11008),
        num_layers=integer(text, "num_hidden_layers", 32),
        num_heads=heads,
        num_kv_heads=integer(text, "num_key_value_heads", heads),
        head_dim=integer(text, "head_dim", max(1, hidden // max(1, heads))),
        rms_norm_eps=float(text.get("rms_norm_eps", 1e-6)),
        rope_theta=theta,
        rope_scaling=scaling,
        max_position_embeddings=integer(text, "max_position_embeddings", 2048),
        hidden_act=text.get("hidden_act", "silu"),
        tie_word_embeddings=tied or bool(text.get("tie_word_embeddings", False)),
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=bool(text.get("mlp_bias", False)),
    )


def llama_to_hf(text: TextConfig) -> dict[str, Any]:
    """A LLaMA decoder section, in the spelling of transformers 5."""
    return {
        "model_type": "llama",
        **_sizes_to_hf(text),
        "head_dim": text.head_dim,
        "attention_bias": text.attention_bias,
        "mlp_bias": text.mlp_bias,
    }


def qwen_text_from_hf(text: Mapping[str, Any], *, tied: bool) -> TextConfig:
    """Reads the text half of Qwen2.5-VL; absent fields take ``Qwen2_5_VLTextConfig``'s defaults."""
    if text.get("use_sliding_window"):
        raise QuotaError("use_sliding_window is not supported: set it to false")
    hidden = integer(text, "hidden_size", 8192)
    heads = integer(text, "num_attention_heads", 64)
    if heads < 1 or hidden % heads:
        raise QuotaError(f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    theta, scaling = _rope(text, 1000000.0)
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    return TextConfig(
        vocab_size=integer(text, "vocab_size", 152064),
        hidden_size=hidden,
        intermediate_size=integer(text, "intermediate_size", 29568),
        num_layers=integer(text, "num_hidden_layers", 80),
        num_heads=heads,
        num_kv_heads=integer(text, "num_key_value_heads", 8),
        head_dim=hidden // heads,
        rms_norm_eps=float(text.get("rms_norm_eps", 1e-5)),
        rope_theta=theta,
        rope_scaling=scaling,
        max_position_embeddings=integer(text, "max_position_embeddings", 32768),
        hidden_act=text.get("hidden_act", "silu"),
        tie_word_embeddings=tied,
        attention_bias=True,
        mrope_section=integers(rope, "mrope_section", (16, 24, 24)),
    )


def qwen_text_to_hf(text: TextConfig) -> dict[str, Any]:
    """The text section of a Qwen2.5-VL config, in the spelling of transformers 5."""
    section: dict[str, Any] = {
        "model_type": "qwen2_5_vl_text",
        **_sizes_to_hf(text),
        "use_sliding_window": False,
    }
    section["rope_parameters"] |= {"mrope_section": list(text.mrope_section or ())}
    return section


def _sizes_to_hf(text: TextConfig) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": text.rope_theta}
    if text.rope_scaling is not None:
        rope |= {"rope_type": text.rope_scaling.rope_type, "factor": text.rope_scaling.factor}
        if text.rope_scaling.rope_type == "llama3":
            rope |= {key: getattr(text.rope_scaling, key) for key in LLAMA3_FIELDS}
    return {
        "vocab_size": text.vocab_size,
        "hidden_size": text.hidden_size,
        "intermediate_size": text.intermediate_size,
        "num_hidden_layers": text.num_layers,
        "num_attention_heads": text.num_heads,
        "num_key_value_heads": text.num_kv_heads,
        "rms_norm_eps": text.rms_norm_eps,
        "rope_parameters": rope,
        "max_position_embeddings": text.max_position_embeddings,
        "hidden_act": text.hidden_act,
        "tie_word_embeddings": text.tie_word_embeddings,
    }


def _rope(text: Mapping[str, Any], default_theta: float) -> tuple[float, RopeScaling | None]:
    """Base and scaling; ``rope_parameters`` (new) wins over ``rope_theta/rope_scaling`` (old)."""
    scaling = text.get("rope_parameters") or text.get("rope_scaling") or {}
    theta = float(scaling.get("rope_theta", text.get("rope_theta", default_theta)))
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind in ("default", "mrope"):  # old Qwen files call the default frequencies "mrope"
        return theta, None
    if kind not in ROPE_TYPES:
        raise QuotaError(f"rope type {kind!r} is not supported; known: {ROPE_TYPES}")
    names = ("factor", *LLAMA3_FIELDS)
    return theta, RopeScaling(rope_type=kind, **{n: scaling[n] for n in names if n in scaling})
