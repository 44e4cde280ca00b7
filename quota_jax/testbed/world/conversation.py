"""Token sequences for training: questions with the benchmarks' prompts, and a closing caption."""

from __future__ import annotations

from typing import Any

import numpy as np

from quota_jax.testbed.world.layout import MAX_SIGNS, Layout, grid_cell
from quota_jax.testbed.world.questions import CHOICE, Questions
from quota_jax.testbed.world.vocabulary import (
    ASSISTANT,
    EOS,
    ID,
    OPTION_LETTERS,
    USER,
    build_tokenizer,
)
from quota_jax.testbed.world.words import (
    ANSWER_SLOTS,
    COLOR_IDS,
    COLUMN_IDS,
    HOLE,
    KIND_IDS,
    NO,
    ROW_IDS,
    VALUE_IDS,
    YES,
    spell,
)

SINGLE_WORD = "Answer the question using a single word or phrase."
YES_OR_NO = "Please answer yes or no."
LETTER = "Answer with the option's letter from the given choices directly."
SEVERAL = "There are several options:"


def _ids(text: str) -> np.ndarray:
    return np.array(build_tokenizer().encode(text, add_special_tokens=False).ids, np.int32)


_SINGLE_WORD, _YES_OR_NO, _LETTER, _SEVERAL = map(_ids, (SINGLE_WORD, YES_OR_NO, LETTER, SEVERAL))


def prompt_words(
    questions: Questions, uniforms: Any, xp: Any = np, suffix_share: float = 1.0
) -> Any:
    """The user's turn as word ids [B, Q, slots], worded as the benchmarks word it.

    uniforms [B, Q, 4] draw the variant: with or without "There are several options:" and
    "Context:", and for a share of 1 - `suffix_share` of the open and yes/no questions no request
    for a short answer. Choices always ask for the letter.
    """
    batch, count = questions.topic.shape
    choice = questions.form == CHOICE

    def when(condition: Any, ids: Any) -> Any:
        ids = xp.broadcast_to(xp.asarray(ids, dtype=np.int32), (batch, count, len(ids)))
        return xp.where(condition[..., None], ids, HOLE)

    hinted = (questions.hint != HOLE).any(-1)
    context = hinted & (uniforms[..., 0] < 0.7)
    parts = [when(context, [ID["context"], ID[":"]]), questions.hint, questions.words]
    parts.append(when(choice & (uniforms[..., 1] < 0.4), _SEVERAL))
    for index, letter in enumerate(OPTION_LETTERS):
        here = choice & (index < questions.num_options)
        parts += [when(here, [ID[letter], ID["."]]), questions.options[:, :, index]]
    parts.append(when(choice, _LETTER))
    answer = questions.answers[..., 0]
    yes_no = (answer == VALUE_IDS[YES, 0]) | (answer == VALUE_IDS[NO, 0])
    suffixed = ~choice & (uniforms[..., 2] < suffix_share)
    please = yes_no & (uniforms[..., 3] < 0.3)
    parts += [when(suffixed & ~please, _SINGLE_WORD), when(suffixed & please, _YES_OR_NO)]
    return xp.concatenate(parts, axis=-1).astype(np.int32)


def turns(prompts: Any, answers: Any, xp: Any = np) -> tuple[Any, Any]:
    """Word ids [B, Q * slots] of "user: q assistant: a </s>" turns, and which are to be predicted.

    Predicted (True) are the answer and its `</s>`. The first turn begins without "user:", which
    in a prompt stands before the picture.
    """
    batch, count, _ = prompts.shape

    def column(text: str) -> Any:
        return xp.full((batch, count, 1), ID[text], dtype=np.int32)

    user = xp.where(xp.arange(count)[None, :, None] > 0, column(USER), HOLE)
    words = xp.concatenate([user, prompts, column(ASSISTANT), answers, column(EOS)], axis=-1)
    slots = words.shape[-1]
    predicted = xp.broadcast_to(xp.arange(slots) >= slots - ANSWER_SLOTS - 1, words.shape)
    return words.reshape(batch, -1), predicted.reshape(batch, -1)


def caption_turn(layout: Layout, xp: Any = np) -> tuple[Any, Any]:
    """A last turn that names everything; same form as `turns`.

    Objects in reading order of the 3 x 3 grid ("red fish top left ,"), then the signs from top to
    bottom ("blue sign brolk middle right ,").
    """
    batch = layout.x.shape[0]

    def listed(present: Any, x: Any, y: Any, by_cell: bool, tables: list[Any]) -> Any:
        """Rows of words [B, n * slots] in order; tables are [B, n] or [B, n, k] ids."""
        rows, columns = grid_cell(xp, layout, x, y)
        rank = (rows * 3 + columns) * 1000.0 + x if by_cell else y
        order = xp.argsort(xp.where(present, rank, 1e6), axis=1)
        tables = [*tables, xp.asarray(ROW_IDS)[rows], xp.asarray(COLUMN_IDS)[columns]]
        tables = [t[..., None] if t.ndim == 2 else t for t in tables]
        words = xp.concatenate([*tables, xp.full_like(tables[0], ID[","])], axis=-1)
        words = xp.where(present[..., None], words, HOLE)
        return xp.take_along_axis(words, order[..., None], axis=1).reshape(batch, -1)

    objects = listed(
        layout.present,
        layout.x,
        layout.y,
        True,
        [xp.asarray(COLOR_IDS)[layout.color], xp.asarray(KIND_IDS)[layout.kind]],
    )
    sign = xp.full((batch, MAX_SIGNS), ID["sign"], dtype=np.int32)
    colors = xp.asarray(COLOR_IDS)[layout.sign_color]
    signs = listed(
        layout.sign_present,
        layout.sign_x,
        layout.sign_y,
        False,
        [colors, sign, spell(layout.sign_text, xp)],
    )

    def fixed(*texts: str) -> Any:
        return xp.broadcast_to(
            xp.asarray([ID[text] for text in texts], dtype=np.int32), (batch, len(texts))
        )

    ask = fixed(USER, "describe", "the", "image", ".", ASSISTANT)
    words = xp.concatenate([ask, objects, signs, fixed(EOS)], axis=1).astype(np.int32)
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
