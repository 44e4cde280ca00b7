"""The first questions of a task, with groups left whole."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")


def grouped(rows: Iterable[tuple[Hashable, T]]) -> list[list[T]]:
    """Rows of equal key together, groups in the order of their first rows."""
    groups: dict[Hashable, list[T]] = {}
    for key, row in rows:
        groups.setdefault(key, []).append(row)
    return list(groups.values())


def first(parts: Sequence[Sequence[Sequence[T]]], limit: int | None) -> list[T]:
    """At most ``limit`` rows of ``parts[file][group][row]``, file by file; all where it is None.

    Takes turns: one group of each file, then the next of each, up to the first group that does not
    fit, so no file is ahead by more than a group. The very first group comes whole in any case.
    """
    counts = [0] * len(parts)
    taken = 0
    turns = max(map(len, parts), default=0)
    for place, file in ((turn, file) for turn in range(turns) for file in range(len(parts))):
        if place >= len(parts[file]):
            continue
        size = len(parts[file][place])
        if limit is not None and taken and taken + size > limit:
            break
        counts[file] += 1
        taken += size
    return [
        row
        for part, count in zip(parts, counts, strict=True)
        for group in part[:count]
        for row in group
    ]
