"""Generation: ``prefill``, ``insert`` into slots, ``decode_chunk``, and ``generate`` on top of
them.

Compiled programs depend on the model's shapes, the batch's buckets, the recipe and the room for new
tokens (a ladder), never on prompts, temperature, stop ids or ``max_new``.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from quota_jax.batch import Batch
from quota_jax.errors import QuotaError
from quota_jax.kv_cache import CacheGroup
from quota_jax.models.decoder import cache_groups
from quota_jax.models.vision_language import VisionLanguageModel, sequence_of
from quota_jax.recipe import Recipe
from quota_jax.sampling import Sampling, greedy, sample

ROOMS = (128, 512, 2048, 8192)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("groups", "position", "kept_source", "kept_length"),
    meta_fields=(),
)
@dataclass(frozen=True, kw_only=True)
class Cache:
    """What prefill leaves behind for decoding.

    groups: key/value stacks in layer order. position: rotary position of the next token (before a
    group's shift). kept_source: input places of the tokens that survived the last stage, the first
    ``kept_length`` of each row.
    """

    groups: tuple[CacheGroup, ...]
    position: Int[Array, " B"]
    kept_source: Int[Array, "B R"]
    kept_length: Int[Array, " B"]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("groups", "position", "tokens", "count", "last", "done", "sampling"),
    meta_fields=("sampled",),
)
@dataclass(frozen=True, kw_only=True)
class DecodeState:
    """B generation slots. ``tokens[b, :count[b]]`` are the new tokens of slot b so far."""

    groups: tuple[CacheGroup, ...]
    position: Int[Array, " B"]
    tokens: Int[Array, "B room"]
    count: Int[Array, " B"]
    last: Int[Array, " B"]
    done: Bool[Array, " B"]
    sampling: Sampling
    sampled: bool


@dataclass(frozen=True, kw_only=True)
class Generation:
    """New tokens ``[B, max_new]`` (padded with 0) and how many each sample has, stop id
    included."""

    tokens: np.ndarray
    lengths: np.ndarray


def room_for(max_new: int) -> int:
    """The ladder step of cache room for ``max_new`` tokens, so that changing it rarely
    recompiles."""
    for room in ROOMS:
        if max_new <= room:
            return room
    raise QuotaError(f"max_new_tokens {max_new} exceeds {ROOMS[-1]}")


def prefill(
    model: VisionLanguageModel,
    batch: Batch,
    *,
    recipe: Recipe | None = None,
    max_new_tokens: int = ROOMS[0],
) -> tuple[Float[Array, "B vocab"], Cache]:
    """Logits at each last real token (float32) and the cache with room for ``max_new_tokens``."""
    return _prefill(model, batch, recipe=check_recipe(model, recipe), room=room_for(max_new_tokens))


def check_recipe(model: VisionLanguageModel, recipe: Recipe | None) -> Recipe:
    """The canonical recipe of this model; a recipe for another depth is refused."""
    layers = model.config.text.num_layers
    recipe = recipe or Recipe.none(layers)
    if recipe.num_layers != layers:
        raise QuotaError(f"recipe is for {recipe.num_layers} layers, the decoder has {layers}")
    return recipe.canonical()


@functools.partial(jax.jit, static_argnames=("recipe", "room"))
def _prefill(model: VisionLanguageModel, batch: Batch, *, recipe: Recipe, room: int):
    x, sequence, vision = model.decoder_input(batch, recipe)
    position = sequence.next_position
    x, final, caches = model.decoder.prefill(x, sequence, recipe, vision)
    last = jnp.maximum(final.lengths - 1, 0)[:, None, None]
    logits = model.decoder.logits(jnp.take_along_axis(x, last, axis=1)[:, 0])
    cache = Cache(
        groups=cache_groups(
            caches,
            room=room,
            bits=model.decoder.kv_bits,
            next_position=position,
            keep_positions=model.decoder.layers.cache.by_channel,
        ),
        position=position,
        kept_source=final.source,
        kept_length=final.lengths,
    )
    return logits, cache


@jax.jit
def forward(model: VisionLanguageModel, batch: Batch) -> Float[Array, "B S vocab"]:
    """Unpruned logits at every place, float32 (parity checks and scoring; not for long batches)."""
    x = model.embed(batch, model.visual_features(batch.pixels))
    recipe = Recipe.none(model.config.text.num_layers)
    x, _, _ = model.decoder.prefill(x, sequence_of(batch), recipe)
    return model.decoder.logits(x)


def _next(logits, sampling: Sampling, count, sampled: bool) -> Int[Array, " B"]:
    return sample(logits, sampling, count) if sampled else greedy(logits)


@functools.partial(jax.jit, static_argnames=("room", "sampled"))
def start(
    logits: Float[Array, "B vocab"], cache: Cache, sampling: Sampling, *, room: int, sampled: bool
) -> DecodeState:
    """Slots of freshly prefilled samples; their first token comes from the prefill logits."""
    batch = logits.shape[0]
    count = jnp.zeros((batch,), jnp.int32)
    token = _next(logits, sampling, count, sampled)
    stop = (token[:, None] == sampling.stop_ids).any(1)
    return DecodeState(
        groups=cache.groups,
        position=cache.position,
        tokens=jnp.zeros((batch, room), jnp.int32).at[:, 0].set(token),
        count=count + 1,
        last=token,
        done=stop | (sampling.max_new <= 1),
        sampling=jax.tree.map(jnp.asarray, sampling),
        sampled=sampled,
    )


@functools.partial(jax.jit, donate_argnums=0)
def insert(state: DecodeState, prefilled: DecodeState, slot: Int[Array, ""]) -> DecodeState:
    """Replaces slot ``slot`` of ``state`` by the only slot of ``prefilled`` (made by ``start``).

    Both must come from the same model, recipe and buckets; a slot is free when it is done.
    """

    def place(axis):
        return lambda whole, part: jax.lax.dynamic_update_slice_in_dim(
            whole, part.astype(whole.dtype), slot, axis
        )

    groups = tuple(
        dataclasses.replace(
            group,
            key=jax.tree.map(place(1), group.key, new.key),
            value=jax.tree.map(place(1), group.value, new.value),
            lengths=place(0)(group.lengths, new.lengths),
            shift=place(0)(group.shift, new.shift),
            positions=jax.tree.map(place(0), group.positions, new.positions),
        )
        for group, new in zip(state.groups, prefilled.groups, strict=True)
    )
    rest: dict[str, Any] = {
        name: place(0)(getattr(state, name), getattr(prefilled, name))
        for name in ("position", "tokens", "count", "last", "done")
    }
    sampling = jax.tree.map(place(0), state.sampling, prefilled.sampling)
    return dataclasses.replace(state, groups=groups, sampling=sampling, **rest)


@functools.partial(jax.jit, donate_argnums=1)
def decode_chunk(
    model: VisionLanguageModel, state: DecodeState, limit: Int[Array, ""]
) -> DecodeState:
    """Up to ``limit`` decode steps, fewer when every slot is done; one program for any limit."""
    batch, room = state.tokens.shape
    samples = jnp.arange(batch)

    def body(carry):
        step, state = carry
        active = ~state.done
        logits, groups = model.decoder.step(state.last, state.position, state.groups, active)
        token = _next(logits, state.sampling, state.count, state.sampled)
        token = jnp.where(active, token, state.last)
        place = jnp.where(active, state.count, room)
        count = state.count + active
        stop = (token[:, None] == state.sampling.stop_ids).any(1)
        full = (count >= state.sampling.max_new) | (count >= room)
        return step + 1, dataclasses.replace(
            state,
            groups=groups,
            position=state.position + active,
            tokens=state.tokens.at[samples, place].set(token, mode="drop"),
            count=count,
            last=token,
            done=state.done | (active & (stop | full)),
        )

    def more(carry):
        step, state = carry
        return (step < limit) & ~state.done.all()

    return jax.lax.while_loop(more, body, (jnp.int32(0), state))[1]


def begin(
    model: VisionLanguageModel,
    batch: Batch,
    *,
    recipe: Recipe | None = None,
    max_new_tokens: int | Sequence[int] = 32,
    temperature: float | Sequence[float] = 0.0,
    top_p: float | Sequence[float] = 1.0,
    top_k: int | Sequence[int] = 0,
    seed: int | Sequence[int] = 0,
    stop_ids: Sequence[int] = (),
) -> DecodeState:
    """Prefills a batch and takes the first token of each sample."""
    sampling = Sampling.make(
        batch.tokens.shape[0],
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        stop_ids=stop_ids,
        max_new=max_new_tokens,
    )
    longest = int(np.max(max_new_tokens))
    limit = model.config.text.max_position_embeddings
    reach = int(np.max(batch.lengths)) + longest
    if reach > limit:
        raise QuotaError(
            f"prompt of {int(np.max(batch.lengths))} tokens plus {longest} new ones exceeds the "
            f"model's {limit} positions"
        )
    logits, cache = prefill(model, batch, recipe=recipe, max_new_tokens=longest)
    sampled = bool(np.max(temperature) > 0)
    return start(logits, cache, sampling, room=room_for(longest), sampled=sampled)


def generate(
    model: VisionLanguageModel,
    batch: Batch,
    *,
    recipe: Recipe | None = None,
    max_new_tokens: int | Sequence[int] = 32,
    **sampling,
) -> Generation:
    """Generates for a whole batch: prefill and one chunk. Keyword arguments as in ``begin``."""
    longest = int(np.max(max_new_tokens))
    state = begin(model, batch, recipe=recipe, max_new_tokens=max_new_tokens, **sampling)
    state = decode_chunk(model, state, jnp.int32(longest))
    return Generation(tokens=np.asarray(state.tokens)[:, :longest], lengths=np.asarray(state.count))


def stream(
    model: VisionLanguageModel, batch: Batch, *, chunk: int = 1, max_new_tokens: int = 32, **kwargs
) -> Iterator[list[list[int]]]:
    """Yields the newly generated token ids of every sample, ``chunk`` steps at a time."""
    state = begin(model, batch, max_new_tokens=max_new_tokens, **kwargs)
    shown = np.zeros(batch.tokens.shape[0], np.int64)
    while True:
        tokens, count = np.asarray(state.tokens), np.asarray(state.count)
        yield [row[a:b].tolist() for row, a, b in zip(tokens, shown, count, strict=True)]
        shown = count
        if bool(np.asarray(state.done).all()):
            return
        state = decode_chunk(model, state, jnp.int32(chunk))
