"""Speed and memory of a model at its real shape, with random weights.

Nothing here is about answers: weights are random, so only shapes, bytes and times are real.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from quota_jax.batch import Batch
from quota_jax.config import LlavaConfig, ModelConfig, QwenVlConfig
from quota_jax.generation import DecodeState, decode_chunk, prefill, room_for, start
from quota_jax.models.params import abstract_params, build_model
from quota_jax.models.vision_language import VisionLanguageModel
from quota_jax.processing.buckets import Buckets, Shape, assemble
from quota_jax.processing.pictures import Picture
from quota_jax.processing.qwen_pictures import QwenPictures
from quota_jax.quantization import QuantizationConfig
from quota_jax.recipe import Recipe
from quota_jax.sampling import Sampling


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BenchResult:
    """One model and recipe at one batch size; seconds are medians of warm runs.

    first_token: pixels on the host to the first token on the host. decode_step: one step for the
    whole batch. peak_bytes: most device memory of the process so far (None where the platform does
    not tell), so run larger models later. compile: first call of prefill and decode, together.
    """

    label: str
    keep: float
    batch_size: int
    visual_tokens: int
    text_tokens: int
    first_token: float
    decode_step: float
    weight_bytes: int
    cache_bytes: int
    peak_bytes: int | None
    compile: float

    @property
    def tokens_per_second(self) -> float:
        return self.batch_size / self.decode_step


def random_model(
    config: ModelConfig, quantization: QuantizationConfig, dtype: Any, *, seed: int = 0
) -> VisionLanguageModel:
    """A model of this shape with random weights, made on the device array by array."""
    key = jax.random.key(seed)
    params = {}
    specs = abstract_params(config, quantization, dtype)
    for place, (name, spec) in enumerate(specs.items()):
        stem, _, leaf = name.rpartition(".")
        quantized = f"{stem}.packed" in specs or f"{stem}.codes" in specs
        params[name] = _random(jax.random.fold_in(key, place), leaf, quantized, spec)
    return build_model(config, quantization, params)


def _random(key: Any, leaf: str, quantized: bool, spec: jax.ShapeDtypeStruct) -> jax.Array:
    shape, dtype = spec.shape, spec.dtype
    if dtype in (jnp.uint8, jnp.int8):
        return jax.jit(lambda k: jax.random.bits(k, shape, jnp.uint8).astype(dtype))(key)
    if leaf == "scale":
        # Codes of 4 bits have a spread of 4.6: rows of some thousands then keep their size.
        return jnp.full(shape, 0.003 if quantized else 1.0, dtype)
    if leaf == "clip":
        return jnp.ones(shape, dtype)
    if leaf == "bias" or len(shape) < 2:
        return jnp.zeros(shape, dtype)
    # One layer at a time: float32 draws of a whole stack would be the largest arrays of all.
    scale = shape[-1] ** -0.5
    rows = shape[0]

    @jax.jit
    def draw(key):
        def one(index):
            part = jax.random.normal(jax.random.fold_in(key, index), shape[1:], jnp.float32)
            return (part * scale).astype(dtype)

        return jax.lax.map(one, jnp.arange(rows))

    return draw(key)


def example_batch(
    config: ModelConfig, batch_size: int, text_tokens: int, *, seed: int = 0
) -> Batch:
    """Prompts of one picture each: 336 x 336 for LLaVA-1.5, 1008 x 1008 for Qwen2.5-VL."""
    rng = np.random.default_rng(seed)
    image = config.image_token_id
    ids = rng.integers(0, min(image, config.text.vocab_size) - 1, (batch_size, text_tokens + 1))
    ids[:, 4] = image
    visual = ids[0] == image
    _, tokens = config.reference_picture
    if isinstance(config, QwenVlConfig):
        side = round(tokens**0.5) * config.vision.spatial_merge_size
        shape = (1, side * side, config.vision.patch_values)
        pixels: Any = rng.standard_normal(shape, np.float32)
        picture = Picture(pixels=pixels, num_tokens=tokens, grid=(1, side, side))
        reader = QwenPictures(image_processor=None, config=config)
        packed, rows = reader.pack(
            [picture] * batch_size,
            Buckets(),
            Shape(image_slots=batch_size, patch_bucket=side * side),
        )
        places = reader.positions(visual, [picture])
    else:
        assert isinstance(config, LlavaConfig)
        side = config.vision.image_size
        packed = rng.standard_normal((batch_size, 3, side, side), np.float32)
        rows = list(np.arange(batch_size * tokens).reshape(batch_size, tokens))
        places = np.arange(text_tokens + tokens)
    return assemble(
        list(ids.astype(np.int32)),
        [[row] for row in rows],
        [places] * batch_size,
        packed,
        placeholders=[image],
        text_bucket=text_tokens,
        visual_bucket=tokens,
        batch_size=batch_size,
        filler_id=0,
    )


def measure(
    model: VisionLanguageModel,
    recipe: Recipe,
    *,
    batch_size: int = 1,
    text_tokens: int = 64,
    new_tokens: int = 32,
    repeats: int = 5,
) -> BenchResult:
    """Times prefill and decoding of one batch."""
    batch = example_batch(model.config, batch_size, text_tokens)
    host = jax.tree.map(np.asarray, batch)
    sampling = Sampling.make(batch_size, max_new=1 << 20)
    room = room_for(new_tokens + 1)

    def first() -> Any:
        logits, cache = prefill(model, jax.device_put(host), recipe=recipe, max_new_tokens=room)
        state = start(logits, cache, sampling, room=room, sampled=False)
        np.asarray(state.last)
        return state

    begun = time.perf_counter()
    state = first()
    cache_bytes = sum(group.nbytes for group in state.groups)
    state = decode_chunk(model, state, jnp.int32(1))
    np.asarray(state.last)
    compiled = time.perf_counter() - begun
    first_token = _median(first, repeats)

    def decode() -> float:
        state = first()
        begun = time.perf_counter()
        state = decode_chunk(model, state, jnp.int32(new_tokens))
        np.asarray(state.last)
        return (time.perf_counter() - begun) / new_tokens

    step = statistics.median(decode() for _ in range(max(2, repeats // 2)))
    stats = jax.devices()[0].memory_stats() or {}
    quantization = model.quantization
    return BenchResult(
        label="bf16" if quantization.is_none else quantization.label,
        keep=recipe.stages[-1].keep if recipe.stages else 1.0,
        batch_size=batch_size,
        visual_tokens=batch.visual_bucket,
        text_tokens=text_tokens,
        first_token=first_token,
        decode_step=step,
        weight_bytes=sum(array.nbytes for array in jax.tree.leaves(model)),
        cache_bytes=cache_bytes,
        peak_bytes=stats.get("peak_bytes_in_use"),
        compile=compiled,
    )


def filled_state(
    model: VisionLanguageModel,
    recipe: Recipe,
    *,
    batch_size: int,
    text_tokens: int = 64,
    new_tokens: int = 64,
) -> DecodeState:
    """Slots as after the prefill of ``example_batch``, which is not run: caches of its size hold
    zeros and are full but for the room for new tokens (at most 63 tokens more than it would
    leave)."""
    batch = example_batch(model.config, batch_size, text_tokens)
    sampling = Sampling.make(batch_size, max_new=1 << 20)
    room = room_for(new_tokens + 1)

    def begin(model, batch):
        logits, cache = prefill(model, batch, recipe=recipe, max_new_tokens=room)
        return start(logits, cache, sampling, room=room, sampled=False)

    empty = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(begin, model, batch))
    groups = tuple(
        dataclasses.replace(group, lengths=group.lengths + (group.capacity - room))
        for group in empty.groups
    )
    position = empty.position + jnp.asarray(batch.lengths)
    sampling = jax.tree.map(jnp.asarray, sampling)
    return dataclasses.replace(empty, groups=groups, position=position, sampling=sampling)


def measure_decoding(
    model: VisionLanguageModel, recipe: Recipe, *, new_tokens: int = 64, **shape: int
) -> float:
    """Seconds of one decode step for the whole batch, median of three warm runs, without a prefill
    to compile. ``shape``: see ``filled_state``."""

    def decode() -> float:
        state = filled_state(model, recipe, new_tokens=new_tokens, **shape)
        jax.block_until_ready(state)
        begun = time.perf_counter()
        np.asarray(decode_chunk(model, state, jnp.int32(new_tokens)).last)
        return (time.perf_counter() - begun) / new_tokens

    decode()
    return statistics.median(decode() for _ in range(3))


def _median(call: Callable[[], Any], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        call()
        times.append(time.perf_counter() - begun)
    return statistics.median(times)
