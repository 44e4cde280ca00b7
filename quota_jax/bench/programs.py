"""The programs of an answer, lowered and compiled ahead of time, and the seconds it takes."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import jax.stages
import numpy as np

from quota_jax.batch import Batch
from quota_jax.generation import DecodeState, decode_chunk, prefill, room_for, start
from quota_jax.models.vision_language import VisionLanguageModel
from quota_jax.recipe import Recipe
from quota_jax.sampling import Sampling

CACHE_HIT = "/jax/compilation_cache/cache_hits"


@dataclass(frozen=True, kw_only=True, slots=True)
class Compilation:
    """Seconds of Python tracing and lowering to StableHLO, and of XLA from there to an executable.

    cached: an executable came out of JAX's persistent compilation cache, so that ``compiling`` is
    (in part) the time to read it.
    """

    lowering: float
    compiling: float
    cached: bool


@dataclass(frozen=True, kw_only=True)
class Programs:
    """Executables for one model, batch shape and recipe. They are called as they are: nothing is
    compiled a second time.

    to_first: of the prefill and of the choice of the first token. to_decode: of the decode steps.
    """

    run_prefill: jax.stages.Compiled
    run_start: jax.stages.Compiled
    run_decode: jax.stages.Compiled
    sampling: Sampling
    to_first: Compilation
    to_decode: Compilation

    def first(self, model: VisionLanguageModel, batch: Batch) -> DecodeState:
        """Slots with the first token of each sample; ``batch`` may lie on the host."""
        logits, cache = self.run_prefill(model, jax.device_put(batch))
        return self.run_start(logits, cache, self.sampling)

    def decode(
        self, model: VisionLanguageModel, state: DecodeState, limit: jax.Array
    ) -> DecodeState:
        """``limit`` more tokens; ``state`` is used up."""
        return self.run_decode(model, state, limit)


def compile_programs(
    model: VisionLanguageModel, batch: Batch, recipe: Recipe, *, new_tokens: int
) -> Programs:
    """Programs that answer ``batch`` (arrays or shapes) greedily, without stop ids, with room for
    ``new_tokens`` after the first one."""
    room = room_for(new_tokens + 1)
    sampling = Sampling.make(batch.tokens.shape[0], max_new=1 << 20)
    sampling = jax.tree.map(jnp.asarray, sampling)
    whole = jax.jit(functools.partial(prefill, recipe=recipe, max_new_tokens=room))
    (prefilled, run_prefill, one) = _compile(whole, model, batch)
    (started, run_start, two) = _compile(start, *prefilled, sampling, room=room, sampled=False)
    _, run_decode, to_decode = _compile(decode_chunk, model, started, jnp.int32(new_tokens))
    return Programs(
        run_prefill=run_prefill,
        run_start=run_start,
        run_decode=run_decode,
        sampling=sampling,
        to_first=Compilation(
            lowering=one.lowering + two.lowering,
            compiling=one.compiling + two.compiling,
            cached=one.cached or two.cached,
        ),
        to_decode=to_decode,
    )


def _compile(
    function: Any, *arguments: Any, **static: Any
) -> tuple[Any, jax.stages.Compiled, Compilation]:
    """Shapes of the results, the executable, and what it took."""
    begun = time.perf_counter()
    lowered = function.lower(*arguments, **static)
    lowering = time.perf_counter() - begun
    with _cache_hits() as hits:
        compiled = lowered.compile()
    compiling = time.perf_counter() - begun - lowering
    shapes = jax.tree.map(
        lambda info: jax.ShapeDtypeStruct(info.shape, info.dtype), lowered.out_info
    )
    return shapes, compiled, Compilation(lowering=lowering, compiling=compiling, cached=bool(hits))


@contextmanager
def _cache_hits() -> Iterator[list[str]]:
    """Collects the executables that are read from the persistent compilation cache."""
    hits: list[str] = []

    def listen(event: str, **_: Any) -> None:
        if event == CACHE_HIT:
            hits.append(event)

    jax.monitoring.register_event_listener(listen)
    try:
        yield hits
    finally:
        jax.monitoring.unregister_event_listener(listen)


def host_copy(batch: Batch) -> Batch:
    """The batch on the host, from where every measured prefill sends it to the device."""
    return jax.tree.map(np.asarray, batch)
