"""Times, memory and power of prefill and decoding of one batch."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from quota_jax.bench.programs import Compilation, Programs, compile_programs, host_copy
from quota_jax.bench.shapes import example_batch
from quota_jax.bench.work import CacheUse, Work, decode_work, prefill_work, weight_bytes
from quota_jax.generation import DecodeState, decode_chunk, prefill, room_for, start
from quota_jax.models.vision_language import VisionLanguageModel
from quota_jax.recipe import Recipe
from quota_jax.reproduce.power import DeviceMeter
from quota_jax.sampling import Sampling

POWER_SECONDS = 2.0
"""How long is decoded for a reading of power: energy counters move in steps of some 0.1 s."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BenchResult:
    """One model and recipe at one batch size; seconds are medians of warm runs.

    first_token: pixels on the host to the first token on the host. decode_step: one step for the
    whole batch. peak_bytes: most device memory of the process so far (None where the platform does
    not tell), so run larger models later. load: seconds to put the weights on the device. watts:
    mean power of the device while it decodes; joules_per_token: its energy over the tokens of all
    samples then; both None where it cannot be measured. prefill_work, decode_work: what must be
    moved and computed at least.
    """

    label: str
    keep: float
    batch_size: int
    visual_tokens: int
    text_tokens: int
    new_tokens: int
    first_token: float
    decode_step: float
    weight_bytes: int
    cache_bytes: int
    peak_bytes: int | None
    load: float | None
    prefill_compilation: Compilation
    decode_compilation: Compilation
    watts: float | None
    joules_per_token: float | None
    prefill_work: Work
    decode_work: Work

    @property
    def tokens_per_second(self) -> float:
        return self.batch_size / self.decode_step

    @property
    def lowering(self) -> float:
        """Seconds of lowering, prefill and decode together."""
        return self.prefill_compilation.lowering + self.decode_compilation.lowering

    @property
    def compile(self) -> float:
        """Seconds of compilation after lowering, prefill and decode together."""
        return self.prefill_compilation.compiling + self.decode_compilation.compiling


def measure(
    model: VisionLanguageModel,
    recipe: Recipe,
    *,
    batch_size: int = 1,
    text_tokens: int = 64,
    new_tokens: int = 32,
    repeats: int = 5,
    load: float | None = None,
) -> BenchResult:
    """Compiles prefill and decoding of one batch, and times them. ``load`` is only passed on."""
    batch = host_copy(example_batch(model.config, batch_size, text_tokens))
    programs = compile_programs(model, batch, recipe, new_tokens=new_tokens)

    def first() -> DecodeState:
        state = programs.first(model, batch)
        np.asarray(state.last)
        return state

    state = first()
    cache_bytes = sum(group.nbytes for group in state.groups)
    caches = [
        CacheUse(
            num_layers=group.num_layers,
            nbytes=group.nbytes,
            capacity=group.capacity,
            lengths=tuple(np.asarray(group.lengths).tolist()),
        )
        for group in state.groups
    ]
    del state  # one set of caches at a time, as in use
    first_token = _median(first, repeats)
    decoding = Decoding(model, programs, first(), new_tokens)
    decoding.run()
    step = statistics.median(decoding.run() for _ in range(max(2, repeats // 2))) / new_tokens
    watts, joules = decoding.power(batch_size)
    stats = jax.devices()[0].memory_stats() or {}
    config, quantization = model.config, model.quantization
    weights = weight_bytes(model)
    return BenchResult(
        label=precision(model),
        keep=recipe.stages[-1].keep if recipe.stages else 1.0,
        batch_size=batch_size,
        visual_tokens=batch.visual_bucket,
        text_tokens=text_tokens,
        new_tokens=new_tokens,
        first_token=first_token,
        decode_step=step,
        weight_bytes=sum(array.nbytes for array in jax.tree.leaves(model)),
        cache_bytes=cache_bytes,
        peak_bytes=stats.get("peak_bytes_in_use"),
        load=load,
        prefill_compilation=programs.to_first,
        decode_compilation=programs.to_decode,
        watts=watts,
        joules_per_token=joules,
        prefill_work=prefill_work(
            config,
            quantization,
            recipe,
            weights,
            caches,
            batch_size=batch_size,
            visual_tokens=batch.visual_bucket,
            text_tokens=text_tokens,
        ),
        decode_work=decode_work(
            config, quantization, weights, caches, batch_size=batch_size, new_tokens=new_tokens
        ),
    )


def precision(model: VisionLanguageModel) -> str:
    """Label of a quantized model; else the dtype, "bf16" for bfloat16."""
    if not model.quantization.is_none:
        return model.quantization.label
    return "bf16" if model.dtype == jnp.bfloat16 else jnp.dtype(model.dtype).name


class Decoding:
    """Decodes the same tokens again and again, from where ``state`` stands (which is used up).

    Between two runs lengths and counters are set back; what stands behind them in the caches is
    written again. So no prefill is part of it. ``state`` is what the last run left.
    """

    def __init__(
        self, model: VisionLanguageModel, programs: Programs, state: DecodeState, new_tokens: int
    ):
        self._model, self._programs, self._steps = model, programs, new_tokens
        self._limit = jnp.int32(new_tokens)
        self._lengths = [np.array(group.lengths) for group in state.groups]
        names = ("position", "count", "last", "done")
        self._counters = {name: np.array(getattr(state, name)) for name in names}
        self.state = state

    def run(self) -> float:
        """Seconds of all steps, from a state on the device to the last tokens on the host."""
        groups = tuple(
            # Copies: the state is donated, and an array that shares numpy's memory cannot be.
            dataclasses.replace(group, lengths=jnp.array(lengths))
            for group, lengths in zip(self.state.groups, self._lengths, strict=True)
        )
        counters: dict[str, Any] = {
            name: jnp.array(value) for name, value in self._counters.items()
        }
        state = dataclasses.replace(self.state, groups=groups, **counters)
        jax.block_until_ready(state)
        begun = time.perf_counter()
        self.state = self._programs.decode(self._model, state, self._limit)
        np.asarray(self.state.last)
        return time.perf_counter() - begun

    def power(self, batch_size: int) -> tuple[float | None, float | None]:
        """Mean watts over ``POWER_SECONDS`` of decoding, and joules per token of a sample."""
        meter = DeviceMeter(jax.devices()[:1])
        if not meter.has_power:
            return None, None
        runs = 0
        with meter:
            begun = time.perf_counter()
            while not runs or time.perf_counter() - begun < POWER_SECONDS:
                self.run()
                runs += 1
        if meter.watts is None:
            return None, None
        return meter.watts, meter.watts * meter.seconds / (runs * self._steps * batch_size)


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
