"""Which accelerator is there, and running a kernel only where its platform is."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """Compute capability, as (9, 0), and multiprocessors of the first NVIDIA GPU."""

    capability: tuple[int, int]
    num_sms: int

    @property
    def is_hopper(self) -> bool:
        """Warpgroup matrix instructions (wgmma) exist on this capability alone."""
        return self.capability == (9, 0)


@functools.cache
def find_gpu() -> Gpu | None:
    """The GPU that jax sees; None without one."""
    try:
        device = jax.devices("cuda")[0]
    except RuntimeError:
        return None
    major, _, minor = str(device.compute_capability).partition(".")
    return Gpu(capability=(int(major), int(minor or 0)), num_sms=int(device.core_count or 1))


@functools.cache
def has_tpu() -> bool:
    """Whether jax sees a TPU."""
    try:
        return bool(jax.devices("tpu"))
    except RuntimeError:
        return False


def triton_refusal(count: int) -> str | None:
    """Why a Pallas-Triton kernel cannot reach all of ``count`` bytes one by one; None if it can.

    jax 0.11.2 makes offsets 64 bits wide for arrays of more than 4 GiB. Up to there they are signed
    numbers of 32 bits, and those of elements beyond 2^31 would point before the array.
    """
    if 1 << 31 < count <= 1 << 32:
        gib = count / (1 << 30)
        return f"{gib:.1f} GiB of codes: Pallas' Triton offsets are wrong between 2 and 4 GiB"
    return None


def on_platform(
    platform: str, kernel: Callable[..., Any], elsewhere: Callable[..., Any]
) -> Callable[..., Any]:
    """``kernel`` where the program is compiled for ``platform`` ("cuda", "tpu"), ``elsewhere`` on
    others.

    Chosen when a program is lowered: a process with a GPU may still run a program on its CPU.
    """
    return lambda *arrays: jax.lax.platform_dependent(
        *arrays, **{platform: kernel}, default=elsewhere
    )
