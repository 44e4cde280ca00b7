"""What a benchmark family hands to the writer: question files and the pictures they name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from quota_jax.testbed.world.layout import Difficulty

SPLITS: dict[str, int] = {"dev": 1, "test": 2}
"""Seed of each split. Training draws from jax.random, so its scenes are others."""
_STREAM = 77
_UNSEEN = (1, 4, 8)
_ROUND = 10
"""Of every ten scenes these three are drawn in the style that training never shows:
a model that has learned the training styles by heart would find the benchmarks easy."""


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """One family's content.

    files: path inside the family's folder -> bytes. pictures: path -> scene index.
    uniforms, difficulty: the scenes. assemble: for formats that carry pictures inside, makes
    further files from the PNG bytes of `pictures`, which then are no files of their own.
    """

    files: Mapping[str, bytes]
    pictures: Mapping[str, int]
    uniforms: np.ndarray
    difficulty: Difficulty
    questions: int
    assemble: Callable[[Callable[[str], bytes]], Mapping[str, bytes]] | None = None
    extra_hashed: Mapping[str, bytes] = field(default_factory=dict)
    """Content that stands for assembled files in hashes of questions: all but the pictures."""

    def unseen(self) -> tuple[str, ...]:
        """The pictures that the benchmarks draw in the held-out style."""
        return tuple(sorted(path for path, scene in self.pictures.items() if is_unseen(scene)))

    def question_hashes(self) -> dict[str, str]:
        """sha256 of every question file, by path; the same on every platform."""
        content = {**self.files, **self.extra_hashed}
        return {path: hashlib.sha256(data).hexdigest() for path, data in sorted(content.items())}


def is_unseen(scene: int) -> bool:
    """Whether the benchmarks draw a scene in the held-out style; three of ten."""
    return scene % _ROUND in _UNSEEN


def generator(family: str, split: str) -> np.random.Generator:
    """The random generator of a family and split."""
    name = int.from_bytes(hashlib.sha256(family.encode()).digest()[:4], "little")
    return np.random.default_rng([_STREAM, SPLITS[split], name])


def json_bytes(value: object) -> bytes:
    """JSON as the official files have it, one line, keys in order of insertion."""
    return (json.dumps(value) + "\n").encode()
