"""Token sequences for training: questions and answers turn by turn, and a closing caption."""

from __future__ import annotations

from typing import Any

import numpy as np

from quota_jax.testbed.layout import Layout
from quota_jax.testbed.questions import (
    ANSWER_SLOTS,
    COLOR_IDS,
    COLUMN_IDS,
    HOLE,
    KIND_IDS,
    ROW_IDS,
    Questions,
    grid_cell,
    sign_words,
)
from quota_jax.testbed.vocabulary import ASSISTANT, EOS, ID, USER


def turns(questions: Questions, xp: Any = np) -> tuple[Any, Any]:
    """Word ids [B, Q * slots] of "user: q assistant: a </s>" turns, and which are to be predicted.

    Predicted (True) are the answer and its `</s>`. The first turn begins without "user:", which
    in a prompt stands before the picture.
    """
    batch, count, _ = questions.words.shape

    def column(text: str) -> Any:
        return xp.full((batch, count, 1), ID[text], dtype=np.int32)

    user = xp.where(xp.arange(count)[None, :, None] > 0, column(USER), HOLE)
    words = xp.concatenate(
        [user, questions.words, column(ASSISTANT), questions.answers, column(EOS)], axis=-1
    )
    slots = words.shape[-1]
    predicted = xp.broadcast_to(xp.arange(slots) >= slots - ANSWER_SLOTS - 1, words.shape)
    return words.reshape(batch, -1), predicted.reshape(batch, -1)


def caption_turn(layout: Layout, xp: Any = np) -> tuple[Any, Any]:
    """A last turn that names everything in reading order; same form as `turns`."""
    batch = layout.x.shape[0]
    rows, columns = grid_cell(xp, layout.x, layout.y)
    rank = xp.where(layout.present, (rows * 3 + columns) * 1000.0 + layout.x, 1e6)
    order = xp.argsort(rank, axis=1)

    def sorted_words(table: np.ndarray, values: Any) -> Any:
        picked = xp.asarray(table)[xp.take_along_axis(values, order, axis=1)]
        return xp.where(xp.take_along_axis(layout.present, order, axis=1), picked, HOLE)

    comma = xp.where(xp.take_along_axis(layout.present, order, axis=1), ID[","], HOLE)
    objects = xp.stack(
        [
            sorted_words(COLOR_IDS, layout.color),
            sorted_words(KIND_IDS, layout.kind),
            sorted_words(ROW_IDS, rows),
            sorted_words(COLUMN_IDS, columns),
            comma,
        ],
        axis=-1,
    ).reshape(batch, -1)
    sign = xp.concatenate(
        [xp.full((batch, 1), ID["sign"], dtype=np.int32), sign_words(layout, xp)], 1
    )
    sign = xp.where(layout.sign_present[:, None], sign, HOLE)

    def fixed(*texts: str) -> Any:
        return xp.broadcast_to(
            xp.asarray([ID[text] for text in texts], dtype=np.int32), (batch, len(texts))
        )

    ask = fixed(USER, "describe", "the", "image", ".", ASSISTANT)
    words = xp.concatenate([ask, objects, sign, fixed(EOS)], axis=1).astype(np.int32)
    predicted = xp.broadcast_to(xp.arange(words.shape[1]) >= ask.shape[1], words.shape)
    return words, predicted


def compact(words: Any, weights: Any, length: int, xp: Any = np) -> tuple[Any, Any]:
    """Remove holes: tokens [B, length] and their weights, both 0 behind the end of the words.

    Rows with more than `length` words lose the last ones; rows of fewer slots are not widened.
    """
    order = xp.argsort(words == HOLE, axis=1, stable=True)[:, :length]
    tokens = xp.take_along_axis(words, order, axis=1)
    real = tokens != HOLE
    return xp.where(real, tokens, 0), xp.where(real, xp.take_along_axis(weights, order, axis=1), 0)
