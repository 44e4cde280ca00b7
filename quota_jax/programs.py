"""Compiled programs of a long-lived process.

On a CPU each program holds some hundred memory maps, and Linux ends a process that asks for more
than ``vm.max_map_count`` of them (65,530 where nobody changed it) by a segmentation fault. Whoever
compiles program after program calls ``release_many_programs`` in between.
"""

from __future__ import annotations

import gc
from functools import cache
from pathlib import Path

import jax

DEFAULT_MAPS = 65_530
SHARE = 0.3
"""Of the maps that a process may have: programs compiled next may add as many at once."""


def memory_maps() -> int:
    """The memory maps of this process; 0 where the system does not tell."""
    try:
        with open("/proc/self/maps", "rb") as maps:
            return sum(1 for _ in maps)
    except OSError:
        return 0


@cache
def _most_maps() -> int:
    try:
        return int(Path("/proc/sys/vm/max_map_count").read_text())
    except (OSError, ValueError):
        return DEFAULT_MAPS


def many_programs() -> bool:
    """Whether programs hold so many maps that some should go."""
    return memory_maps() > SHARE * _most_maps()


def release_programs() -> None:
    """Drops every compiled program that nobody but JAX's caches holds; it is compiled again, or
    read from the persistent cache, when it is called again."""
    jax.clear_caches()
    gc.collect()


def release_many_programs() -> None:
    """``release_programs`` where there are many."""
    if many_programs():
        release_programs()
