"""What an accelerator draws and holds while something runs: NVML, and the allocator's own count."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax

INTERVAL = 0.002
"""Seconds between two looks at the memory in use."""


@dataclass(frozen=True, kw_only=True)
class PowerMeter:
    """The power of one NVIDIA GPU as a whole, whoever uses it, by NVML."""

    library: Any
    handle: Any

    @classmethod
    def open(cls, device: jax.Device) -> PowerMeter | None:
        """The meter of a device; None where there is none: no NVIDIA GPU, no NVML, a MIG slice."""
        return cls.open_number(device.local_hardware_id) if device.platform == "gpu" else None

    @classmethod
    def open_number(cls, number: int) -> PowerMeter | None:
        """The meter of the GPU with this number among those that this process sees; else as
        ``open``."""
        name = visible_name(number, os.environ.get("CUDA_VISIBLE_DEVICES"))
        if name is None:
            return None
        try:
            library = ctypes.CDLL("libnvidia-ml.so.1")
        except OSError:
            return None
        return cls.of(library, name)

    @classmethod
    def of(cls, library: Any, name: int | str) -> PowerMeter | None:
        """The GPU with this number or UUID; None if it does not tell its power."""
        handle = ctypes.c_void_p()
        if library.nvmlInit_v2():
            return None
        if isinstance(name, int):
            failed = library.nvmlDeviceGetHandleByIndex_v2(name, ctypes.byref(handle))
        else:
            failed = library.nvmlDeviceGetHandleByUUID(name.encode(), ctypes.byref(handle))
        meter = cls(library=library, handle=handle)
        return None if failed or meter.watts() is None else meter

    def watts(self) -> float | None:
        """Power now; on recent GPUs NVML gives the mean of the last second."""
        value = ctypes.c_uint()
        if self.library.nvmlDeviceGetPowerUsage(self.handle, ctypes.byref(value)):
            return None
        return value.value / 1000

    def joules(self) -> float | None:
        """Energy since the driver was loaded; None on GPUs before Volta."""
        value = ctypes.c_ulonglong()
        if self.library.nvmlDeviceGetTotalEnergyConsumption(self.handle, ctypes.byref(value)):
            return None
        return value.value / 1000


def visible_name(number: int, visible: str | None) -> int | str | None:
    """Number or UUID by which NVML knows a device of this process; None for a MIG slice."""
    if visible is None:
        return number
    names = [name.strip() for name in visible.split(",") if name.strip()]
    if number >= len(names) or names[number].startswith("MIG"):
        return None
    return int(names[number]) if names[number].isdecimal() else names[number]


class DeviceMeter:
    """In its `with` block: seconds, mean power of all devices together, and the most memory
    that one of them had in use.

    Power is energy over time where the GPU counts energy, else the mean of samples. Memory is the
    largest of samples of the allocator's bytes in use: arrays and temporaries of this process,
    without what the driver itself takes. Both are None where a device does not tell.
    """

    def __init__(self, devices: Sequence[jax.Device] | None = None):
        self._devices = jax.local_devices() if devices is None else list(devices)
        found = [PowerMeter.open(device) for device in self._devices]
        self._meters = [meter for meter in found if meter is not None]
        if len(self._meters) < len(found):
            self._meters = []
        self.seconds = 0.0
        self.peak_bytes: int | None = None
        self.watts: float | None = None
        self._powers: list[float] = []

    @property
    def has_power(self) -> bool:
        return bool(self._meters)

    def __enter__(self) -> DeviceMeter:
        self._begun, self._energy = time.perf_counter(), self._joules()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        energy = self._joules()
        self.seconds = time.perf_counter() - self._begun
        self._ended.set()
        self._thread.join()
        if self._energy is not None and energy is not None:
            self.watts = (energy - self._energy) / self.seconds
        elif self._powers:
            self.watts = sum(self._powers) / len(self._powers)

    def _joules(self) -> float | None:
        values = [meter.joules() for meter in self._meters]
        return None if not values or None in values else sum(filter(None, values))

    def _sample(self) -> None:
        looks = 0
        while True:
            for device in self._devices:
                if (used := (device.memory_stats() or {}).get("bytes_in_use")) is not None:
                    self.peak_bytes = max(self.peak_bytes or 0, used)
            if looks % 25 == 0:
                powers = [meter.watts() for meter in self._meters]
                if powers and None not in powers:
                    self._powers.append(sum(filter(None, powers)))
            looks += 1
            if self._ended.wait(INTERVAL):
                return
