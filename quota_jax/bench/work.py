"""Bytes that a prefill or a decode step must move, and operations that it must do.

Both are lower bounds: every weight is read once, every cached token once, and nothing else moves.
Operations are those of ``flops.executed_flops``, two for each multiply-accumulate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from quota_jax.config import LlavaConfig, ModelConfig, QwenVlConfig
from quota_jax.flops import GATED, PLAIN, attention_flops, executed_flops, mlp_flops
from quota_jax.models.params import flatten_params
from quota_jax.models.vision_language import VisionLanguageModel
from quota_jax.quantization import QuantizationConfig
from quota_jax.recipe import Recipe

EMBEDDING, HEAD = "decoder.embed.", "decoder.head."


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """For the whole batch. float_ops: operations on floating-point operands, among them all of
    attention; integer_ops: those of linears whose weights and inputs are integers."""

    bytes: int
    float_ops: int
    integer_ops: int

    @property
    def operations(self) -> int:
        return self.float_ops + self.integer_ops

    @property
    def intensity(self) -> float:
        """Operations per byte."""
        return self.operations / self.bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheUse:
    """A run of layers whose caches hold the same tokens. nbytes: of its arrays, which have room for
    ``capacity`` tokens of each sample. lengths: tokens of each sample after the prefill."""

    num_layers: int
    nbytes: int
    capacity: int
    lengths: tuple[int, ...]

    def bytes_with(self, more: float) -> float:
        """Bytes of the filled part when each sample has ``more`` tokens than after the prefill."""
        filled = sum(self.lengths) + more * len(self.lengths)
        return self.nbytes * filled / (len(self.lengths) * self.capacity)


def weight_bytes(model: VisionLanguageModel) -> dict[str, int]:
    """Bytes of each parameter by dotted name."""
    return {name: array.nbytes for name, array in flatten_params(model).items()}


def uses_integers(quantization: QuantizationConfig, module: str) -> bool:
    """Whether the linears of a module multiply integers by integers."""
    return quantization.quantizes(module) and quantization.activation_bits < 16


def prefill_work(
    config: ModelConfig,
    quantization: QuantizationConfig,
    recipe: Recipe,
    weights: Mapping[str, int],
    caches: Sequence[CacheUse],
    *,
    batch_size: int,
    visual_tokens: int,
    text_tokens: int,
) -> Work:
    """The prefill of ``batch_size`` equal prompts. ``weights``: see ``weight_bytes``."""
    flops = executed_flops(config, recipe, visual_tokens=visual_tokens, text_tokens=text_tokens)
    text = config.text
    decoder = sum(
        attention_flops(text, layer.attention_tokens)
        - _pairs(config, layer.attention_tokens**2)
        + mlp_flops(text, layer.mlp_tokens)
        for layer in flops.layers
    )
    parts = {
        "vision": _tower_linears(config, visual_tokens),
        "projector": flops.projector,
        "decoder": decoder,
    }
    integer = sum(count for part, count in parts.items() if uses_integers(quantization, part))
    # Of a table of embeddings some rows are read, unless it is the head too.
    read = sum(weights.values())
    if _has_head(weights):
        read -= _of(weights, EMBEDDING)
    return Work(
        bytes=round(read + sum(cache.bytes_with(0) for cache in caches)),
        float_ops=2 * batch_size * (flops.total - integer),
        integer_ops=2 * batch_size * integer,
    )


def decode_work(
    config: ModelConfig,
    quantization: QuantizationConfig,
    weights: Mapping[str, int],
    caches: Sequence[CacheUse],
    *,
    batch_size: int,
    new_tokens: int,
) -> Work:
    """One step for the batch, the mean of the first ``new_tokens`` steps after a prefill: step i
    reads i tokens more than the prefill left."""
    more = (new_tokens + 1) / 2
    text = config.text
    linears = text.num_layers * (attention_flops(text, 1) - _pairs(config, 1) + mlp_flops(text, 1))
    pairs = sum(cache.num_layers * (sum(cache.lengths) + more * batch_size) for cache in caches)
    attention = _pairs(config, pairs)
    head = batch_size * text.hidden_size * text.vocab_size
    integer = batch_size * linears if uses_integers(quantization, "decoder") else 0
    total = batch_size * linears + attention + head
    read = _of(weights, "decoder.")
    if _has_head(weights):
        read -= _of(weights, EMBEDDING)
    return Work(
        bytes=round(read + sum(cache.bytes_with(more) for cache in caches)),
        float_ops=round(2 * (total - integer)),
        integer_ops=2 * integer,
    )


def _pairs(config: ModelConfig, count: float) -> int:
    """Multiply-accumulates of ``count`` query-key pairs in one layer: scores and weighted sum."""
    return round(2 * count * config.text.num_heads * config.text.head_dim)


def _tower_linears(config: ModelConfig, visual_tokens: int) -> int:
    """Multiply-accumulates of the vision tower's linears; patch embedding and attention apart."""
    vision = config.vision
    if isinstance(config, QwenVlConfig):
        tokens, layers = visual_tokens * config.vision.merge_unit, vision.num_layers
        matrices = GATED
    else:
        assert isinstance(config, LlavaConfig)
        pictures = visual_tokens // config.tokens_per_image
        tokens, layers = pictures * (config.vision.num_patches + 1), max(config.feature_states)
        matrices = PLAIN
    width = vision.hidden_size
    return layers * tokens * width * (4 * width + matrices * vision.intermediate_size)


def _has_head(weights: Mapping[str, int]) -> bool:
    return any(name.startswith(HEAD) for name in weights)


def _of(weights: Mapping[str, int], start: str) -> int:
    return sum(count for name, count in weights.items() if name.startswith(start))
