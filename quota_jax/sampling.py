"""Choosing the next token, with per-slot parameters as arrays so that changing them recompiles
nothing."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from quota_jax.errors import QuotaError

MAX_STOP_IDS = 8


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("temperature", "top_p", "top_k", "seed", "stop_ids", "max_new"),
    meta_fields=(),
)
@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Per-slot generation parameters. ``temperature`` 0 is greedy; ``top_k`` 0 and ``top_p`` 1 are
    off.

    ``stop_ids`` is padded with -1 to a fixed width. Generation stops after a stop id (which is
    kept) or after ``max_new`` tokens.
    """

    temperature: Float[Array, " B"]
    top_p: Float[Array, " B"]
    top_k: Int[Array, " B"]
    seed: Int[Array, " B"]
    stop_ids: Int[Array, "B stops"]
    max_new: Int[Array, " B"]

    @classmethod
    def make(
        cls,
        batch_size: int,
        *,
        temperature: float | Sequence[float] = 0.0,
        top_p: float | Sequence[float] = 1.0,
        top_k: int | Sequence[int] = 0,
        seed: int | Sequence[int] = 0,
        stop_ids: Sequence[int] = (),
        max_new: int | Sequence[int] = 32,
    ) -> Sampling:
        """Broadcasts scalars over the slots and checks ranges."""
        if len(stop_ids) > MAX_STOP_IDS:
            raise QuotaError(f"{len(stop_ids)} stop ids; at most {MAX_STOP_IDS} are supported")
        stops: Any = np.full((batch_size, MAX_STOP_IDS), -1, np.int32)
        stops[:, : len(stop_ids)] = np.asarray(stop_ids, np.int32)

        def slots(name, value, dtype, low, high) -> Any:
            # Checked before the cast: an integer too large for int32 must not wrap or raise.
            array = np.broadcast_to(np.asarray(value), (batch_size,))
            if not ((array >= low) & (array <= high)).all():
                raise QuotaError(f"{name} must lie in [{low}, {high}], got {value}")
            return array.astype(dtype)

        return cls(
            temperature=slots("temperature", temperature, np.float32, 0, 100),
            top_p=slots("top_p", top_p, np.float32, 1e-6, 1),
            top_k=slots("top_k", top_k, np.int32, 0, 2**30),
            seed=slots("seed", seed, np.int32, -(2**31), 2**31 - 1),
            stop_ids=stops,
            max_new=slots("max_new", max_new, np.int32, 1, 2**30),
        )


def greedy(logits: Float[Array, "B vocab"]) -> Int[Array, " B"]:
    """The most likely token; ties go to the lowest id."""
    return jnp.argmax(logits.astype(jnp.float32), axis=-1).astype(jnp.int32)


def sample(
    logits: Float[Array, "B vocab"], sampling: Sampling, step: Int[Array, " B"]
) -> Int[Array, " B"]:
    """Temperature, then top-k, then top-p (the smallest set whose mass reaches it), then one draw.

    The draw of a slot depends on its own seed and step alone, never on the slot or the batch.
    """

    def one(logits, temperature, top_p, top_k, seed, step):
        order = jnp.argsort(-logits, stable=True)
        ranked = logits[order] / jnp.maximum(temperature, 1e-6)
        rank = jnp.arange(ranked.shape[0])
        ranked = jnp.where((top_k > 0) & (rank >= top_k), -jnp.inf, ranked)
        probability = jax.nn.softmax(ranked)
        before = jnp.cumsum(probability) - probability
        ranked = jnp.where((before >= top_p) & (rank > 0), -jnp.inf, ranked)
        key = jax.random.fold_in(jax.random.key(seed), step)
        drawn = order[jax.random.categorical(key, ranked)]
        return jnp.where(temperature > 0, drawn, order[0]).astype(jnp.int32)

    return jax.vmap(one)(
        logits.astype(jnp.float32),
        sampling.temperature,
        sampling.top_p,
        sampling.top_k,
        sampling.seed,
        step,
    )
