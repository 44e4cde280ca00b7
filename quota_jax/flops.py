"""Multiply-accumulates of a prefill under any recipe (QUOTA's Eq. 10-13; papers say FLOPs).

Two protocols. ``paper_flops``: the language model alone, each layer counted at one number of
tokens, as the tables of the pruning papers do. ``executed_flops``: all matrix products of this
implementation: vision tower, projector, decoder with each layer's attention on its incoming tokens
and its feed-forward on the kept ones, head. Masked query-key pairs below the length count (they are
computed), padding does not. Integers throughout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quota_jax.config import LlavaConfig, ModelConfig, QwenVlConfig, TextConfig
from quota_jax.errors import QuotaError
from quota_jax.recipe import MERGING, Recipe, Stage

COUNTED = ("entry", "exit")
GATED, PLAIN = 3, 2
"""Matrices of a feed-forward block: gate, up and down, or up and down."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerFlops:
    """One decoder layer: tokens (visual and text) in its two halves, and its cost."""

    attention_tokens: int
    mlp_tokens: int
    flops: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Flops:
    """Cost of one prefill; ``vision``, ``projector`` and ``head`` are 0 in the paper's protocol."""

    layers: tuple[LayerFlops, ...]
    vision: int = 0
    projector: int = 0
    head: int = 0

    @property
    def decoder(self) -> int:
        return sum(layer.flops for layer in self.layers)

    @property
    def total(self) -> int:
        return self.vision + self.projector + self.decoder + self.head

    def percent_of(self, base: Flops) -> float:
        """``100 * total / base.total`` (Eq. 12)."""
        return 100 * self.total / base.total


def attention_flops(text: TextConfig, tokens: int) -> int:
    """``n (2 d^2 + 2 d d_kv) + 2 n^2 d``: projections, query-key and weight-value products."""
    queries, keys = text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
    return tokens * text.hidden_size * 2 * (queries + keys) + 2 * tokens**2 * queries


def mlp_flops(text: TextConfig, tokens: int, matrices: int = GATED) -> int:
    """``g n d m`` for a feed-forward block of g matrices."""
    return matrices * tokens * text.hidden_size * text.intermediate_size


def paper_flops(
    text: TextConfig,
    recipe: Recipe,
    *,
    visual_tokens: int,
    text_tokens: int,
    matrices: int = GATED,
    counted: str = "entry",
) -> Flops:
    """The papers' count: ``sum_l F(K_l + T)``, ``F(n) = n (2 d^2 + 2 d d_kv) + 2 n^2 d + g n d m``.

    ``matrices`` is g: 3 in PyramidDrop, SparseVLM and BTP, 2 in FastV and DivPrune. ``counted``
    says where a stage inside a layer counts: ``entry`` takes K_l of the layer's own stage (QUOTA),
    ``exit`` lets it count from the next layer on (FastV's K layers at full length). QUOTA's paper
    fixes neither g, T nor ``counted``.
    """
    if counted not in COUNTED:
        raise QuotaError(f"counted must be one of {COUNTED}, got {counted!r}")
    if matrices < 1:
        raise QuotaError(f"matrices of the feed-forward block must be positive, got {matrices}")
    place = 1 if counted == "entry" else 0
    layers = []
    for pair in _tokens(text, recipe, visual_tokens, text_tokens):
        n = pair[place]
        flops = attention_flops(text, n) + mlp_flops(text, n, matrices)
        layers.append(LayerFlops(attention_tokens=n, mlp_tokens=n, flops=flops))
    return Flops(layers=tuple(layers))


def executed_flops(
    config: ModelConfig,
    recipe: Recipe,
    *,
    visual_tokens: int,
    text_tokens: int,
    grids: Sequence[tuple[int, int]] | None = None,
) -> Flops:
    """What a prefill of one sample computes; logits for the last token only.

    ``text_tokens``: every token of the prompt that is not visual. ``grids``: (rows, columns) of
    visual tokens of each picture, for Qwen2.5-VL; without it, one picture whose windows are all
    full.
    """
    text = config.text
    counts = _tokens(text, recipe, visual_tokens, text_tokens)
    recipe = recipe.canonical()  # a stage that drops nothing scores nothing
    scores = _score_flops(config, recipe, counts, visual_tokens + text_tokens)
    layers = tuple(
        LayerFlops(
            attention_tokens=incoming,
            mlp_tokens=left,
            flops=attention_flops(text, incoming) + mlp_flops(text, left) + scores[layer],
        )
        for layer, (incoming, left) in enumerate(counts)
    )
    if isinstance(config, QwenVlConfig):
        vision, projector = _qwen_vision(config, visual_tokens, grids)
    elif grids is not None:
        raise QuotaError(f"grids are for models with pictures of any size, got {list(grids)}")
    else:
        merging = next((s for s in recipe.stages if s.selector.name in MERGING), None)
        vision, projector = _llava_vision(config, visual_tokens, merging, recipe)
    return Flops(
        layers=layers,
        vision=vision,
        projector=projector,
        head=text.hidden_size * text.vocab_size,
    )


def _score_flops(
    config: ModelConfig, recipe: Recipe, counts: Sequence[tuple[int, int]], length: int
) -> list[int]:
    """Matrix products that scoring adds to each layer: query-key products once more for attention
    mass, the layer's projections on all incoming tokens for PyramidDrop, cosines for DivPrune and
    MMTok. What VisionZip adds is part of the vision tower."""
    text = config.text
    queries, keys = text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
    added = [0] * text.num_layers
    for stage in recipe.stages:
        name, layer = stage.selector.name, stage.layer
        prior = getattr(stage.selector.options, "prior", None)
        if name in ("quota", "text_attention", "sqap") or prior == "text_attention":
            added[layer] += queries * counts[layer][0] ** 2
        elif name == "pyramid_drop":
            incoming = counts[layer - 1][1] if layer else length
            added[layer] += incoming * text.hidden_size * (queries + keys)
        elif name == "div_prune":
            added[layer] += text.hidden_size * length**2
        elif name == "mmtok":
            added[layer] += (text.hidden_size + _tower_width(config)) * length**2
    return added


def _tower_width(config: ModelConfig) -> int:
    """Features of the vision tower that belong to one visual token."""
    if isinstance(config, QwenVlConfig):
        return config.vision.hidden_size * config.vision.merge_unit
    return config.vision.hidden_size * len(config.vision_feature_layers)


def _tokens(
    text: TextConfig, recipe: Recipe, visual_tokens: int, text_tokens: int
) -> list[tuple[int, int]]:
    """Tokens in each layer's attention and in its feed-forward block."""
    if recipe.num_layers != text.num_layers:
        raise QuotaError(
            f"recipe is for {recipe.num_layers} layers, the decoder has {text.num_layers}"
        )
    if visual_tokens < 0 or text_tokens < 0:
        raise QuotaError(
            f"token counts must not be negative, got {visual_tokens} visual and {text_tokens} text"
        )
    if visual_tokens + text_tokens == 0:
        raise QuotaError("no tokens: neither visual nor text")
    keep, left = {stage.layer: stage.keep for stage in recipe.stages}, visual_tokens
    counts = []
    for layer, incoming in enumerate(recipe.tokens_per_layer(visual_tokens)):
        left = recipe.target(visual_tokens, keep[layer]) if layer in keep else left
        counts.append((incoming + text_tokens, left + text_tokens))
    return counts


def _llava_vision(
    config: LlavaConfig, visual_tokens: int, merging: Stage | None, recipe: Recipe
) -> tuple[int, int]:
    """CLIP runs up to the last feature layer, over the patches and the class token.

    VisionZip projects that layer's input once more, compares keys, adds up states, and sends fewer
    of them through the projector.
    """
    vision, width = config.vision, config.text.hidden_size
    pictures, rest = divmod(visual_tokens, config.tokens_per_image)
    if rest:
        raise QuotaError(
            f"{visual_tokens} visual tokens are no whole pictures of {config.tokens_per_image}"
        )
    d, n = vision.hidden_size, vision.num_patches + 1
    layer = 4 * n * d * d + 2 * n * n * d + PLAIN * n * d * vision.intermediate_size
    patches = vision.num_patches * vision.num_channels * vision.patch_size**2 * d
    tower = patches + max(config.feature_states) * layer
    features = _tower_width(config)
    projected = config.tokens_per_image
    if merging is not None:
        tower += 3 * n * d * d + n * n * (vision.head_dim + features)
        projected = recipe.target(projected, merging.keep)
    return pictures * tower, pictures * projected * width * (features + width)


def _qwen_vision(
    config: QwenVlConfig, visual_tokens: int, grids: Sequence[tuple[int, int]] | None
) -> tuple[int, int]:
    """Window and full attention layers over ``merge_unit`` patches per visual token."""
    vision, width = config.vision, config.text.hidden_size
    d, n = vision.hidden_size, visual_tokens * vision.merge_unit
    if grids is None:
        window_pairs, full_pairs = n * min(vision.window_patches, n), n * n
    else:
        if min(map(min, grids), default=1) < 1 or sum(r * c for r, c in grids) != visual_tokens:
            raise QuotaError(f"grids {list(grids)} do not make {visual_tokens} visual tokens")
        side, unit = vision.window_units, vision.merge_unit
        window_pairs = unit**2 * sum(_squares(r, side) * _squares(c, side) for r, c in grids)
        full_pairs = unit**2 * sum((r * c) ** 2 for r, c in grids)
    full = len(vision.full_attention_layers)
    pairs = full * full_pairs + (vision.num_layers - full) * window_pairs
    tower = n * vision.patch_values * d + 2 * d * pairs
    tower += vision.num_layers * n * d * (4 * d + GATED * vision.intermediate_size)
    merged = d * vision.merge_unit
    return tower, visual_tokens * merged * (merged + width)


def _squares(length: int, side: int) -> int:
    """Sum of squared lengths of the pieces when ``length`` is cut every ``side``."""
    return length // side * side**2 + (length % side) ** 2
