"""What all questions are made with: random choices, phrases, and the form of a topic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from quota_jax.testbed.world.facts import find_facts
from quota_jax.testbed.world.layout import MAX_OBJECTS, MAX_SIGNS, Layout, Uniforms
from quota_jax.testbed.world.vocabulary import COLORS, ID, KINDS, NAMES
from quota_jax.testbed.world.words import (
    COLOR_IDS,
    HOLE,
    KIND_IDS,
    NO,
    NUM_VALUES,
    SIDE_IDS,
    VOWEL,
    YES,
)

QUESTION_SLOTS = 26
HINT_SLOTS = 36
MAX_OPTIONS = 5
_COINS = 40
_PAIRS = 16 * MAX_OBJECTS
UNIFORMS_PER_QUESTION = (
    _COINS + 3 * MAX_OBJECTS + _PAIRS + len(KINDS) + len(COLORS) + MAX_SIGNS + NUM_VALUES
    + 2 * MAX_OPTIONS + len(NAMES)
)  # fmt: skip

Column = Any
"""A word, word ids [B, Q], or word ids [B, Q, n]."""


class Topic(NamedTuple):
    """Questions of one topic [B, Q]: words, answer, whether the scene allows it, the claim.

    value: row of VALUE_IDS (hint topics: place among the options), or -1 where the answer is
    `codes` [B, Q, 6], a spelled text. claim: answer words [B, Q, 6] -> columns of the claim.
    hint, names: hint words [B, Q, HINT_SLOTS] and the names that stand as options [B, Q, 5].
    """

    columns: list[Column]
    value: Any
    possible: Any
    claim: Callable[[Any], list[Column]] | None = None
    codes: Any = None
    hint: Any = None
    names: Any = None
    num_names: Any = None


class Asker:
    """Random choices and phrases for `count` questions about each scene of a batch."""

    def __init__(self, layout: Layout, uniforms: Any, count: int, xp: Any) -> None:
        batch = layout.x.shape[0]
        self.xp, self.layout, self.facts = xp, layout, find_facts(layout, xp)
        self.batch, self.count = batch, count
        u = Uniforms(uniforms.reshape(batch * count, UNIFORMS_PER_QUESTION))

        def take(*shape: int) -> Any:
            values = u.take(*shape)
            return values.reshape((batch, count, *values.shape[1:]))

        self.coins = take(_COINS)
        self.any_score, self.first_score, self.second_score = (take(MAX_OBJECTS) for _ in range(3))
        self.pair_score = take(_PAIRS)
        self.kind_score, self.color_score = take(len(KINDS)), take(len(COLORS))
        self.sign_score = take(MAX_SIGNS)
        self.value_score = take(NUM_VALUES)
        self.option_score, self.order_score = take(MAX_OPTIONS), take(MAX_OPTIONS)
        self.name_score = take(len(NAMES))

    def coin(self, index: int) -> Any:
        """A uniform number per question."""
        return self.coins[..., index]

    def choose(self, score: Any, allowed: Any) -> tuple[Any, Any]:
        """Index of the best-scored allowed entry [B, Q], and whether any entry is allowed."""
        allowed = self.xp.broadcast_to(allowed, score.shape)
        best = self.xp.argmax(self.xp.where(allowed, score, -1e6), axis=-1)
        return best, self.xp.any(allowed, axis=-1)

    def at(self, values: Any, index: Any) -> Any:
        """values [B, n] at index [B, Q]."""
        return self.xp.take_along_axis(values, index, axis=1)

    def flat(self, values: Any) -> Any:
        """[B, ...] as [B, 1, n]."""
        return values.reshape(self.batch, 1, -1)

    def full(self, value: Any) -> Any:
        return self.xp.full((self.batch, self.count), value)

    def row(self, columns: list[Column], slots: int) -> Any:
        """Word ids [B, Q, slots] of columns one after another."""
        xp = self.xp
        parts = []
        for column in columns:
            ids = self.full(ID[column]) if isinstance(column, str) else column
            parts.append(ids[..., None] if ids.ndim == 2 else ids)
        words = xp.concatenate(parts, axis=-1).astype(np.int32)
        if words.shape[-1] > slots:
            raise ValueError(f"{words.shape[-1]} words do not fit {slots} slots")
        blank = xp.full((self.batch, self.count, slots - words.shape[-1]), HOLE, dtype=np.int32)
        return xp.concatenate([words, blank], axis=-1)

    def kind_of(self, index: Any) -> Any:
        return self.at(self.layout.kind, index)

    def color_of(self, index: Any) -> Any:
        return self.at(self.layout.color, index)

    def kind_word(self, index: Any) -> Any:
        return self.xp.asarray(KIND_IDS)[self.kind_of(index)]

    def color_word(self, index: Any) -> Any:
        return self.xp.asarray(COLOR_IDS)[self.color_of(index)]

    def referring(self, index: Any, coin: Any) -> list[Column]:
        """Color (or hole) and kind words that single out a pair-unique object."""
        needed = ~self.at(self.facts.unique_kind, index) | (coin < 0.5)
        return [self.xp.where(needed, self.color_word(index), HOLE), self.kind_word(index)]

    def article(self, word: Any) -> Any:
        """ "a" or "an" before a word id."""
        word = self.xp.maximum(word, 0)
        return self.xp.where(self.xp.asarray(VOWEL)[word], ID["an"], ID["a"])

    def side(self, index: Any) -> Any:
        """Words [B, Q, 2] of a side."""
        return self.xp.asarray(SIDE_IDS)[index]

    def yes_no(self, truth: Any) -> Any:
        return self.xp.where(truth, YES, NO)

    def sign_codes(self, index: Any) -> Any:
        """Codes [B, Q, 6] of the text of sign `index`."""
        return self.xp.take_along_axis(self.layout.sign_text, index[..., None], axis=1)
