"""Fills the stacked ``[L, ...]`` device buffers of a model one block at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

ShardingLike = Sharding | Callable[[str], Sharding | None] | None
Array = jax.Array


def stack_blocks(
    blocks: Iterable[Mapping[str, np.ndarray]],
    specs: Mapping[str, jax.ShapeDtypeStruct],
    sharding: ShardingLike = None,
) -> dict[str, Array]:
    """Device arrays with the shapes and dtypes of ``specs``, filled from ``blocks`` in order.

    A parameter whose spec has one more leading axis than the block's array is stacked: its n-th
    occurrence becomes row n. Buffers are donated from block to block, so device memory peaks at the
    model plus one block, host memory at one block. Casts happen on the device.
    """
    arrays: dict[str, Array] = {}
    rows: dict[str, int] = {}
    for block in blocks:
        layers = {k: v for k, v in block.items() if v.ndim < len(specs[k].shape)}
        for name, value in block.items():
            if name not in layers:
                arrays[name] = _place(value, specs[name], _sharding_of(sharding, name))
        if layers:
            missing = [name for name in layers if name not in arrays]
            arrays |= _allocator(
                tuple(
                    (k, specs[k].shape, specs[k].dtype, _sharding_of(sharding, k)) for k in missing
                )
            )()
            rows |= {name: rows.get(name, -1) + 1 for name in layers}
            stacked = {name: arrays.pop(name) for name in layers}
            shardings = {name: _sharding_of(sharding, name) for name in layers}
            values = {k: jax.device_put(v, _row_sharding(shardings[k])) for k, v in layers.items()}
            index = {name: np.int32(rows[name]) for name in layers}
            arrays |= _updater(tuple(shardings.items()))(stacked, values, index)
        # Without this the host runs ahead and holds the arrays of several blocks.
        jax.block_until_ready(list(arrays.values()))
    return arrays


def _sharding_of(sharding: ShardingLike, name: str) -> Sharding | None:
    return sharding if sharding is None or isinstance(sharding, Sharding) else sharding(name)


def _place(value: np.ndarray, spec: jax.ShapeDtypeStruct, sharding: Sharding | None) -> Array:
    array = jax.device_put(value, sharding)
    return array if array.dtype == spec.dtype else array.astype(spec.dtype)


@lru_cache(maxsize=64)
def _allocator(
    buffers: tuple[tuple[str, tuple[int, ...], np.dtype, Sharding | None], ...],
) -> Callable[[], dict[str, Array]]:
    """A jitted function that makes zeroed buffers where they are to live."""
    return jax.jit(
        lambda: {name: jnp.zeros(shape, dtype) for name, shape, dtype, _ in buffers},
        out_shardings={name: sharding for name, _, _, sharding in buffers},
    )


def _row_sharding(sharding: Sharding | None) -> Sharding | None:
    """Where one row of a stacked buffer goes, so that a sharded layer is never replicated."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))


@lru_cache(maxsize=64)
def _updater(shardings: tuple[tuple[str, Sharding | None], ...]) -> Callable[..., dict[str, Array]]:
    """A jitted update of one row of several buffers that keeps their shardings."""

    def update(buffers, values, rows):
        return {
            name: jax.lax.dynamic_update_index_in_dim(
                buffer, values[name].astype(buffer.dtype), rows[name], 0
            )
            for name, buffer in buffers.items()
        }

    return jax.jit(update, donate_argnums=0, out_shardings=dict(shardings))
