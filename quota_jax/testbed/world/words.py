"""Word ids in tables: names of colors, kinds, counts and cells, and spelling of sign texts."""

from __future__ import annotations

from typing import Any

import numpy as np

from quota_jax.testbed.world.layout import MAX_LETTERS
from quota_jax.testbed.world.vocabulary import (
    COLORS,
    COLUMNS,
    ID,
    KINDS,
    NAMES,
    PLURALS,
    ROWS,
    WORDS,
)

HOLE = -1
"""Fills unused word slots."""
ANSWER_SLOTS = MAX_LETTERS
MAX_COUNT = 9

KIND_IDS = np.array([ID[word] for word in KINDS], np.int32)
PLURAL_IDS = np.array([ID[word] for word in PLURALS], np.int32)
COLOR_IDS = np.array([ID[word] for word in COLORS], np.int32)
ROW_IDS = np.array([ID[word] for word in ROWS], np.int32)
COLUMN_IDS = np.array([ID[word] for word in COLUMNS], np.int32)
SIDE_IDS = np.array(
    [[ID["left"], ID["of"]], [ID["right"], ID["of"]], [ID["above"], HOLE], [ID["below"], HOLE]],
    np.int32,
)
"""left of, right of, above, below."""
EXTREME_IDS = np.array(
    [ID[word] for word in ("leftmost", "rightmost", "highest", "lowest")], np.int32
)
_CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
FIRST_IDS = np.array([ID[c] for c in _CHARACTERS], np.int32)
PIECE_IDS = np.array([ID["##" + c] for c in _CHARACTERS], np.int32)
VOWEL = np.zeros(len(WORDS), bool)
VOWEL[[index for word, index in ID.items() if word[0] in "aeiou"]] = True

# Every answer that is not spelled is a row of one table; an answer space is a range of rows.
_ROWS: list[tuple[str, ...]] = [("yes",), ("no",)]
YES, NO = 0, 1
COLOR_START = len(_ROWS)
_ROWS += [(word,) for word in COLORS]
KIND_START = len(_ROWS)
_ROWS += [(word,) for word in KINDS]
COUNT_START = len(_ROWS)
_ROWS += [(str(n),) for n in range(MAX_COUNT + 1)]
CELL_START = len(_ROWS)
_ROWS += [(row, column) for row in ROWS for column in COLUMNS]
NAME_START = len(_ROWS)
_ROWS += [(name,) for name in NAMES]
NUM_VALUES = len(_ROWS)
SPACE = np.repeat(
    np.arange(6),
    np.diff([0, COLOR_START, KIND_START, COUNT_START, CELL_START, NAME_START, NUM_VALUES]),
)
"""int [NUM_VALUES]: the answer space of each value."""
VALUE_IDS = np.full((NUM_VALUES, ANSWER_SLOTS), HOLE, np.int32)
for _index, _row in enumerate(_ROWS):
    VALUE_IDS[_index, : len(_row)] = [ID[word] for word in _row]


def spell(codes: Any, xp: Any = np) -> Any:
    """Word ids [..., n] of texts given as codes [..., n] (indices into GLYPHS or -1)."""
    first = xp.asarray(FIRST_IDS)[xp.maximum(codes[..., :1], 0)]
    rest = xp.asarray(PIECE_IDS)[xp.maximum(codes[..., 1:], 0)]
    return xp.where(codes >= 0, xp.concatenate([first, rest], axis=-1), HOLE).astype(np.int32)


def number_codes(number: Any, xp: Any = np) -> Any:
    """Codes [..., 6] of numbers 0..999, without leading zeros."""
    digits = xp.stack([number // 100, number // 10 % 10, number % 10], axis=-1) + 26
    empty = xp.full((*number.shape, ANSWER_SLOTS), -1, dtype=np.int32)
    three = xp.concatenate([digits, empty[..., 3:]], axis=-1)
    two = xp.concatenate([digits[..., 1:], empty[..., 2:]], axis=-1)
    one = xp.concatenate([digits[..., 2:], empty[..., 1:]], axis=-1)
    big, middle = number[..., None] >= 100, number[..., None] >= 10
    return xp.where(big, three, xp.where(middle, two, one)).astype(np.int32)


def join_words(ids: Any) -> str:
    """Words of a row of ids as text: holes skipped, pieces and punctuation attached."""
    text = ""
    for index in ids:
        if index == HOLE:
            continue
        word = WORDS[int(index)]
        if word.startswith("##"):
            text += word.removeprefix("##")
        elif word in (".", ",", "?", ";", ":", "'") or not text:
            text += word
        else:
            text += " " + word
    return text
