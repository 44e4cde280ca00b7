"""One batch over all devices of a process, and several processes beside each other.

Devices: the whole step (vision tower, prefill, decoding) runs under `jax.shard_map` over the batch
axis, because `jit` does not partition custom kernels. Every device holds the model and a batch of
its own, with its own picture slots, so a row is computed as on a single device.

Processes: each answers every n-th batch on its own devices; only the finished predictions travel.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from quota_jax.batch import Batch
from quota_jax.errors import QuotaError
from quota_jax.generation import decode_chunk, prefill, start
from quota_jax.models.vision_language import VisionLanguageModel
from quota_jax.recipe import Recipe
from quota_jax.sampling import Sampling

AXIS = "data"


def local_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """The devices of this process (or those given) in a row."""
    devices = jax.local_devices() if devices is None else list(devices)
    return jax.make_mesh((len(devices),), (AXIS,), devices=devices, axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device: the model's parameters."""
    return NamedSharding(mesh, PartitionSpec())


def put_rows(mesh: Mesh, shards: Sequence[Any]) -> Any:
    """Equally shaped trees of host arrays, one for each device, as one tree on the devices.

    Arrays are joined along their first axis. ``visual_index`` of a `Batch` keeps counting from its
    own device's first picture slot: inside the step that is all there is.
    """
    joined = shards[0]
    if len(shards) > 1:
        joined = jax.tree.map(lambda *parts: np.concatenate(parts), *shards)
    return jax.device_put(joined, NamedSharding(mesh, PartitionSpec(AXIS)))


@functools.partial(jax.jit, static_argnames=("mesh", "recipe", "room", "sampled"))
def answer_step(
    model: VisionLanguageModel,
    batch: Batch,
    sampling: Sampling,
    *,
    mesh: Mesh,
    recipe: Recipe,
    room: int,
    sampled: bool,
) -> tuple[Int[Array, "B room"], Int[Array, " B"]]:
    """New tokens of a batch and how many each row has: prefill and decoding in one program.

    Args:
        model: on every device of ``mesh`` (`replicated`).
        batch, sampling: rows of all devices (`put_rows`).
        room: places for new tokens, a step of `quota_jax.generation.ROOMS`.
        sampled: False computes greedy answers, whatever ``sampling`` says of temperatures.
    """

    def one_device(model, batch, sampling):
        logits, cache = prefill(model, batch, recipe=recipe, max_new_tokens=room)
        state = start(logits, cache, sampling, room=room, sampled=sampled)
        state = decode_chunk(model, state, jnp.int32(room))
        return state.tokens, state.count

    rows = PartitionSpec(AXIS)
    return jax.shard_map(
        one_device,
        mesh=mesh,
        in_specs=(PartitionSpec(), rows, rows),
        out_specs=rows,
        # Rows never meet: there is nothing that the check of replication could find, and the
        # kernels do not declare what they replicate.
        check_vma=False,
    )(model, batch, sampling)


def connect(coordinator: str, num_processes: int | None, process_id: int | None) -> None:
    """Joins the processes of one run; call it before anything else of jax.

    Args:
        coordinator: ``host:port`` of process 0, or ``auto`` where a cluster manager that jax knows
            started the processes.
    """
    options: dict[str, Any] = {}
    if coordinator != "auto":
        if num_processes is None or process_id is None:
            raise QuotaError("several processes need their number and the id of this one")
        if not 0 <= process_id < num_processes:
            raise QuotaError(f"process {process_id} is none of {num_processes}")
        options = {
            "coordinator_address": coordinator,
            "num_processes": num_processes,
            "process_id": process_id,
        }
    try:
        jax.distributed.initialize(**options)
    except (RuntimeError, ValueError) as error:
        raise QuotaError(f"cannot join the other processes: {error}") from None


def share(groups: Sequence[Any]) -> list[Any]:
    """This process's part of the batches: every n-th one."""
    return list(groups[jax.process_index() :: jax.process_count()])


@contextmanager
def together() -> Iterator[None]:
    """All processes enter and leave; bad input that one of them met is an error of all.

    So none waits for a process that has given up.
    """
    error = ""
    try:
        yield
    except QuotaError as caught:
        error = str(caught)
    told = [text.decode() for text in gather(error.encode())]
    if any(told):
        raise QuotaError(error or next(text for text in told if text))


def gather(payload: bytes) -> list[bytes]:
    """What each process gave, in the order of their ids; all processes must call it."""
    if jax.process_count() == 1:
        return [payload]
    from jax.experimental.multihost_utils import process_allgather

    lengths = np.asarray(process_allgather(np.int32(len(payload)))).reshape(-1)
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: len(payload)] = np.frombuffer(payload, np.uint8)
    rows = np.asarray(process_allgather(padded)).reshape(len(lengths), -1)
    return [row[:length].tobytes() for row, length in zip(rows, lengths, strict=True)]
