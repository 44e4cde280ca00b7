"""Decoder of LLaMA and Qwen2.5-VL: prefill in segments between pruning points, and decode.

Layers are stacked; inside a segment ``lax.scan`` runs over the layer *index* and every operation
picks its layer from the whole stack. A pruning stage is a gather between two segments.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from pallas_kernels.attention import operand_dtype, sequence_attention
from pallas_kernels.stable import summed
from quota_jax.config import TextConfig
from quota_jax.kv_cache import CacheGroup, grow, round_up, with_room
from quota_jax.models import fused_layers, fused_prefill
from quota_jax.models.build import attention, mlp, module_bits, norm, tree
from quota_jax.models.fused_decode import obstacle, run_layers
from quota_jax.nn.attention_cache import Angles, CacheQuantizer, Stored
from quota_jax.nn.rope import rotary_angles, token_positions
from quota_jax.nn.vocabulary import VocabularyTable
from quota_jax.prune.scores import Signals, residual, score
from quota_jax.prune.select import Sequence, budget, gather, select
from quota_jax.quantization import QuantizationConfig
from quota_jax.recipe import Recipe, Stage


class LayerCache(NamedTuple):
    """Prefill keys and values of a run of layers ``[L, B, S, K, ...]``, the tokens they belong to,
    and the rotary positions that these had in the layers."""

    stored: Stored
    sequence: Sequence
    positions: Array


class Projected(NamedTuple):
    """A layer's normed input, rotated queries, deployed keys and values, and what is stored."""

    normed: Array
    query: Array
    key: Array
    value: Array
    stored: Stored


class Decoder(nnx.Module):
    """Embedding, stacked decoder layers, final norm, head (absent where tied)."""

    def __init__(self, params: dict, config: TextConfig, quantization: QuantizationConfig):
        bits = module_bits(quantization, "decoder")
        layers, eps = params["layers"], config.rms_norm_eps
        self.config = config
        self.kv_bits = quantization.kv_bits
        self.embed = VocabularyTable(params["embed"], bits=quantization.embedding_bits)
        self.layers = tree(
            norm1=norm(layers["norm1"], eps),
            norm2=norm(layers["norm2"], eps),
            attn=attention(
                layers["attn"], bits, config.num_heads, config.num_kv_heads, config.head_dim
            ),
            mlp=mlp(layers["mlp"], bits, config.hidden_act),
            cache=CacheQuantizer(layers.get("cache", {}), quantization),
        )
        self.norm = norm(params["norm"], eps)
        if not config.tie_word_embeddings:
            self.head = VocabularyTable(params["head"], bits=quantization.head_bits)

    def logits(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows vocab"]:
        """Final norm and head; float32."""
        head = self.embed if self.config.tie_word_embeddings else self.head
        x = self.norm(x)
        out = head.products(x.reshape(-1, x.shape[-1]))
        return out.reshape(*x.shape[:-1], out.shape[-1])

    def prefill(
        self,
        x: Float[Array, "B S D"],
        sequence: Sequence,
        recipe: Recipe,
        vision: Float[Array, "B S F"] | None = None,
        weights: Mapping[str, Float[Array, ""]] | None = None,
    ) -> tuple[Float[Array, "B R D"], Sequence, list[LayerCache]]:
        """Runs all layers under ``recipe``; returns final states, the surviving tokens and the
        caches. ``vision``: what a stage at the input may read; ``weights``: of the score in place
        of the recipe's; see ``Signals``."""
        caches: list[LayerCache] = []
        done = 0
        for stage in recipe.stages:
            x, done = self._segment(x, sequence, done, stage.layer, caches)
            layer = jnp.int32(stage.layer)
            inside = stage.point == "after_attention"
            inner = None
            if inside or stage.selector.name == "pyramid_drop":
                inner = self.project(x, sequence, layer)
            seen = vision if stage.point == "input" else None
            signals = self._signals(x, sequence, layer, inner, seen, weights)
            if not inside or inner is None:
                x, sequence, _ = self._prune(x, sequence, stage, recipe, signals)
                continue
            x = self._attend(x, sequence, layer, inner)
            stored = jax.tree.map(lambda array: array[None], inner.stored)
            before, positions = sequence, sequence.positions
            x, sequence, order = self._prune(x, sequence, stage, recipe, signals)
            if stage.trim_own_cache:
                stored = jax.tree.map(lambda array, o=order: gather(array[0], o)[None], stored)
                before, positions = sequence, gather(positions, order)
            caches.append(LayerCache(stored, before, positions))
            x = self._feed_forward(x, layer)
            done = stage.layer + 1
        x, _ = self._segment(x, sequence, done, self.config.num_layers, caches)
        return x, sequence, caches

    def _segment(self, x, sequence: Sequence, start: int, stop: int, caches: list[LayerCache]):
        """Layers ``start`` to ``stop`` on the same tokens."""
        if start >= stop:
            return x, start

        if fused_layers.obstacle(self.layers) is None:
            angles = rotary_angles(self.config, sequence.positions)
            pair, stored = fused_prefill.run_layers(
                self.layers, x, sequence, angles, start, stop - start, sm_scale=self._sm_scale
            )
        else:
            pair, stored = jax.lax.scan(
                functools.partial(self._plain_layer, sequence),
                (x, jnp.zeros_like(x)),
                jnp.arange(start, stop, dtype=jnp.int32),
            )
        caches.append(LayerCache(stored, sequence, sequence.positions))
        # A layer's last sum is left to the next one: see ``_run_layers``.
        return summed(*pair), stop

    def _plain_layer(self, sequence: Sequence, carry: tuple[Array, Array], at: Array):
        """``layer`` of states to which something is still to be added, and what it adds itself."""
        x = summed(*carry)
        inner = self.project(x, sequence, at)
        x = self._attend(x, sequence, at, inner)
        return (x, self.layers.mlp(self.layers.norm2(x, at), at)), inner.stored

    def layer(self, x: Float[Array, "B S D"], sequence: Sequence, index: Array):
        """One layer on all its tokens: the new states, and what its cache stores."""
        (x, added), stored = self._plain_layer(sequence, (x, jnp.zeros_like(x)), index)
        return summed(x, added), stored

    def project(self, x, sequence: Sequence, layer: Array) -> Projected:
        """Queries, keys and values of a layer; the latter two read back from what is stored."""
        angles = rotary_angles(self.config, sequence.positions)
        normed = self.layers.norm1(x, layer)
        heads = self.layers.attn.project(normed, layer)
        return Projected(normed, *self.layers.cache(heads, angles, layer, x.dtype))

    def _attend(self, x, sequence: Sequence, layer: Array, inner: Projected):
        """Adds the attention sublayer's output."""
        heads = sequence_attention(
            inner.query, inner.key, inner.value, sequence.lengths, sm_scale=self._sm_scale
        )
        return summed(x, self.layers.attn.output(heads.astype(x.dtype), layer))

    def _feed_forward(self, x, layer: Array):
        return summed(x, self.layers.mlp(self.layers.norm2(x, layer), layer))

    @property
    def _sm_scale(self) -> float:
        return self.config.head_dim**-0.5

    def _signals(
        self,
        x,
        sequence: Sequence,
        layer: Array,
        inner: Projected | None,
        vision: Array | None = None,
        weights: Mapping[str, Array] | None = None,
    ) -> Signals:
        """What a stage at this layer can be scored by (Eq. 6); ``inner`` None: not by its heads."""
        qkv = self.layers.attn.qkv
        error, key = None, None
        if inner is not None:
            # As attention reads them: its kernels round what was read of the cache to 16 bits.
            key = inner.key.astype(operand_dtype(inner.query.dtype, self.config.head_dim))
            if qkv.activation_bits < 16:
                rows = qkv.transformed(inner.normed.reshape(-1, x.shape[-1]), layer)
                error = residual(rows, qkv.activation_bits, qkv.clipping(layer))
                error = error.reshape(x.shape[:2])
        return Signals(
            hidden=x,
            sequence=sequence,
            query=None if inner is None else inner.query,
            key=key,
            residual=error,
            vision=vision,
            sm_scale=self._sm_scale,
            weights=weights,
        )

    def chosen(
        self, x: Float[Array, "B S D"], sequence: Sequence, layer: Array, stage: Stage, recipe
    ) -> tuple[Sequence, Int[Array, "B R"]]:
        """What a stage inside a layer keeps of the layer's input ``x``, as ``prefill`` chooses it:
        the remaining tokens and the places to gather them from."""
        inner = self.project(x, sequence, layer)
        signals = self._signals(x, sequence, layer, inner)
        _, sequence, order = self._prune(x, sequence, stage, recipe, signals)
        return sequence, order

    def _prune(self, x, sequence: Sequence, stage: Stage, recipe: Recipe, signals: Signals):
        target = budget(sequence, recipe, stage.keep)
        limit = recipe.target(sequence.original_bucket, stage.keep)
        scores = score(stage.selector, signals, target, limit)
        sequence, order = select(sequence, scores, stage, recipe)
        return gather(x, order), sequence, order

    def step(
        self,
        tokens: Int[Array, " B"],
        position: Int[Array, " B"],
        groups: tuple[CacheGroup, ...],
        active: Array,
    ) -> tuple[Float[Array, "B vocab"], tuple[CacheGroup, ...]]:
        """One new token per sample; caches of inactive samples do not grow.

        Layers run fused (``models.fused_decode``) where that is possible, else module by module.
        """
        x = self.embed.rows(tokens)
        first, grown = 0, []
        fused = obstacle(self.layers) is None
        for group in groups:
            positions = token_positions(self.config, position - group.shift)
            angles = rotary_angles(self.config, positions)
            group = group.place(positions)
            if fused:
                x, (key, value) = run_layers(
                    self.layers, x, group, angles, first, sm_scale=self._sm_scale
                )
            else:
                x, (key, value) = self._run_layers(x, group, angles, first)
            grown.append(grow(dataclasses.replace(group, key=key, value=value), active))
            first += group.num_layers
        return self.logits(x), tuple(grown)

    def _run_layers(self, x: Float[Array, "B D"], group: CacheGroup, angles: Angles, first: int):
        """``fused_decode.run_layers``, for layers of any kind.

        A layer's last sum is left to the next one here too: inside the layer XLA on CPU contracts
        it with the products before it, which is one rounding less.
        """
        cache, lengths, cached = self.layers.cache, group.lengths + 1, None
        if group.positions is not None:
            cached = rotary_angles(self.config, group.positions)

        def layer(carry, index):
            x, added, key, value = carry
            x = summed(x, added)
            here = dataclasses.replace(group, key=key, value=value)
            at = first + index
            heads = self.layers.attn.project(self.layers.norm1(x, at), at)
            new = cache(heads, angles, at, group.key[0].dtype)
            here = here.append(index, *new.stored)
            channels = cache.reading(at, cached)
            heads = here.attend(index, new.query, lengths, self._sm_scale, channels)
            x = summed(x, self.layers.attn.output(heads.astype(x.dtype), at))
            added = self.layers.mlp(self.layers.norm2(x, at), at)
            return (x, added, here.key, here.value), None

        start = (x, jnp.zeros_like(x), group.key, group.value)
        (x, added, key, value), _ = jax.lax.scan(
            layer, start, jnp.arange(group.num_layers, dtype=jnp.int32)
        )
        return summed(x, added), (key, value)


def cache_groups(
    caches: list[LayerCache],
    *,
    room: int,
    bits: int,
    next_position: Int[Array, " B"],
    keep_positions: bool = False,
) -> tuple[CacheGroup, ...]:
    """Cache groups with space for ``room`` new tokens; neighbouring runs on the same tokens are
    joined. ``keep_positions``: keys are rotated when they are read."""
    runs: list[LayerCache] = []
    for cache in caches:
        last = runs[-1] if runs else None
        # A trimmed layer's own keys keep the positions they were made with.
        if (
            last is not None
            and last.sequence is cache.sequence
            and (last.positions is cache.positions or not keep_positions)
        ):
            joined = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), last.stored, cache.stored)
            runs[-1] = cache._replace(stored=joined)
        else:
            runs.append(cache)
    groups = []
    for stored, sequence, positions in runs:
        capacity = round_up(sequence.source.shape[1] + room)
        kept = None
        if keep_positions:
            free = capacity - positions.shape[1]
            kept = jnp.pad(positions, [(0, 0), (0, free)] + [(0, 0)] * (positions.ndim - 2))
        groups.append(
            CacheGroup(
                key=with_room(stored[0], capacity),
                value=with_room(stored[1], capacity),
                lengths=sequence.lengths,
                shift=next_position - sequence.next_position,
                positions=kept,
                bits=bits,
            )
        )
    return tuple(groups)
