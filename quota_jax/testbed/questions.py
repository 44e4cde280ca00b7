"""Questions about scenes, as rows of word ids, with the one true answer of each.

Like the layouts, one definition for numpy and jax.numpy. A row has a fixed number of word slots;
unused slots hold HOLE, so that all types share one shape [B, Q, slots]. The answer is always
computed from the scene after the question is chosen, never assumed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from quota_jax.testbed.layout import IMAGE_SIZE, MAX_OBJECTS, Layout, Uniforms, pick
from quota_jax.testbed.vocabulary import (
    ANSWER_SUFFIX,
    COLORS,
    COLUMNS,
    ID,
    KINDS,
    PLURALS,
    ROWS,
    SIGN_WORDS,
    build_tokenizer,
)

TYPES: tuple[str, ...] = (
    "presence", "color", "position", "count", "relation", "neighbor", "shape", "reading",
)  # fmt: skip
"""Question types in the order of `Questions.type`."""

HOLE = -1
QUESTION_SLOTS = 12
ANSWER_SLOTS = 2
BORDER = 6.0
"""Positions are asked only of objects this far (pixels) from the lines of the 3 x 3 grid."""
APART = 24.0
"""Two objects are left/right (above/below) of each other from this distance in pixels on."""

KIND_IDS = np.array([ID[word] for word in KINDS], np.int32)
_PLURAL_IDS = np.array([ID[word] for word in PLURALS], np.int32)
COLOR_IDS = np.array([ID[word] for word in COLORS], np.int32)
ROW_IDS = np.array([ID[word] for word in ROWS], np.int32)
COLUMN_IDS = np.array([ID[word] for word in COLUMNS], np.int32)
_SIGN_IDS = np.array([ID[word] for word in SIGN_WORDS], np.int32)
_DIGIT_IDS = np.array([ID[digit] for digit in "0123456789"], np.int32)
_PIECE_IDS = np.array([ID["##" + digit] for digit in "0123456789"], np.int32)
_VOWEL = np.zeros(max(ID.values()) + 1, bool)
_VOWEL[[index for word, index in ID.items() if word[0] in "aeiou"]] = True
# left of, right of, above, below
_RELATION_IDS = np.array(
    [[ID["left"], ID["of"]], [ID["right"], ID["of"]], [ID["above"], HOLE], [ID["below"], HOLE]],
    np.int32,
)
_SUFFIX_IDS = np.array(
    build_tokenizer().encode(ANSWER_SUFFIX, add_special_tokens=False).ids, np.int32
)

UNIFORMS_PER_QUESTION = 12 + 3 * MAX_OBJECTS + MAX_OBJECTS**2 + len(KINDS) + len(COLORS)


class Questions(NamedTuple):
    """Word ids [B, Q, QUESTION_SLOTS + suffix], answers [B, Q, 2], type [B, Q] (index into TYPES).

    `possible` [B, Q, 8] says which types the scene allows (presence: always).
    """

    words: Any
    answers: Any
    type: Any
    possible: Any


def grid_cell(xp: Any, x: Any, y: Any) -> tuple[Any, Any]:
    """Row and column (0..2) of a point in the 3 x 3 grid of the picture."""
    third = IMAGE_SIZE / 3
    row = xp.clip((y / third).astype(np.int32), 0, 2)
    return row, xp.clip((x / third).astype(np.int32), 0, 2)


def _pairwise(layout: Layout) -> tuple[Any, Any, Any]:
    """Same-kind and same-color tables [B, M, M] over present objects, and presence itself."""
    both = layout.present[:, :, None] & layout.present[:, None, :]
    same_kind = both & (layout.kind[:, :, None] == layout.kind[:, None, :])
    same_color = both & (layout.color[:, :, None] == layout.color[:, None, :])
    return same_kind, same_color, both


def ask_layout(
    layout: Layout, uniforms: Any, types: Any, xp: Any = np, suffix_share: float = 0.0
) -> Questions:
    """One question per entry of `types` [B, Q] from uniforms [B, Q * UNIFORMS_PER_QUESTION].

    Where the scene does not allow a type, a presence question stands in (`Questions.type` tells).
    `suffix_share` of the questions end with ANSWER_SUFFIX.
    """
    batch, count = types.shape
    u = Uniforms(uniforms.reshape(batch * count, UNIFORMS_PER_QUESTION))

    def take(*shape: int) -> Any:
        values = u.take(*shape)
        return values.reshape((batch, count, *values.shape[1:]))

    coins = take(12)
    any_score, first_score, third_score = take(MAX_OBJECTS), take(MAX_OBJECTS), take(MAX_OBJECTS)
    pair_score = take(MAX_OBJECTS**2)
    kind_score, color_score = take(len(KINDS)), take(len(COLORS))

    kind_ids, plural_ids, color_ids = (xp.asarray(t) for t in (KIND_IDS, _PLURAL_IDS, COLOR_IDS))
    present = layout.present[:, None]  # B 1 M
    kind, color = layout.kind[:, None], layout.color[:, None]
    same_kind, same_color, both = _pairwise(layout)
    same_pair = same_kind & same_color
    unique_kind = (layout.present & (same_kind.sum(-1) == 1))[:, None]
    unique_color = (layout.present & (same_color.sum(-1) == 1))[:, None]
    unique_pair = (layout.present & (same_pair.sum(-1) == 1))[:, None]

    def choose(score: Any, allowed: Any) -> tuple[Any, Any]:
        """Index of the best-scored allowed entry, and whether any entry is allowed."""
        allowed = xp.broadcast_to(allowed, score.shape)
        return xp.argmax(xp.where(allowed, score, -1.0), axis=-1), xp.any(allowed, axis=-1)

    def at(values: Any, index: Any) -> Any:
        """values [B, 1, n] at index [B, Q]."""
        return xp.take_along_axis(values[:, 0], index, axis=1)

    def word(text: str) -> Any:
        return xp.full((batch, count), ID[text], dtype=np.int32)

    def when(condition: Any, column: Any) -> Any:
        return xp.where(condition, column, HOLE)

    hole = xp.full((batch, count), HOLE, dtype=np.int32)

    def row(columns: list[Any], slots: int) -> Any:
        return xp.stack(columns + [hole] * (slots - len(columns)), axis=-1)

    def yes_no(truth: Any) -> Any:
        return row([xp.where(truth, ID["yes"], ID["no"]), hole], ANSWER_SLOTS)

    def one(column: Any) -> Any:
        return row([column, hole], ANSWER_SLOTS)

    def referring(index: Any, coin: Any) -> tuple[Any, Any]:
        """Color (or hole) and kind words that single out a pair-unique object."""
        needs_color = ~at(unique_kind, index) | (coin < 0.5)
        return when(needs_color, color_ids[at(color, index)]), kind_ids[at(kind, index)]

    def presence() -> tuple[Any, Any, Any]:
        subject, _ = choose(any_score, present)
        form = xp.where(coins[..., 0] < 0.35, 0, xp.where(coins[..., 0] < 0.85, 1, 2))
        asked_kind, asked_color = at(kind, subject), at(color, subject)
        negative = coins[..., 1] < 0.5
        kinds, colors = xp.arange(len(KINDS)), xp.arange(len(COLORS))
        has_kind = (present[..., None] & (kind[..., None] == kinds)).any(2)
        has_color = (present[..., None] & (color[..., None] == colors)).any(2)
        # Hard negatives keep the kind or the color of a real object.
        with_color = (present & (color == asked_color[..., None]))[..., None]
        with_kind = (present & (kind == asked_kind[..., None]))[..., None]
        taken_kinds = (with_color & (kind[..., None] == kinds)).any(2)
        taken_colors = (with_kind & (color[..., None] == colors)).any(2)
        near = has_kind & (coins[..., 2] < 0.5)[..., None]
        new_kind, _ = choose(kind_score + near, ~taken_kinds)
        absent_kind, _ = choose(kind_score, ~has_kind)
        near = has_color & (coins[..., 2] < 0.5)[..., None]
        new_color, _ = choose(color_score + near, ~taken_colors)
        absent_color, _ = choose(color_score, ~has_color)
        swap_kind = coins[..., 3] < 0.5
        pair = negative & (form == 1)
        asked_kind = xp.where(pair & swap_kind, new_kind, asked_kind)
        asked_color = xp.where(pair & ~swap_kind, new_color, asked_color)
        asked_kind = xp.where(negative & (form == 0), absent_kind, asked_kind)
        asked_color = xp.where(negative & (form == 2), absent_color, asked_color)
        match = present
        match = match & ((form == 2)[..., None] | (kind == asked_kind[..., None]))
        match = match & ((form == 0)[..., None] | (color == asked_color[..., None]))
        noun = xp.where(form == 2, ID["object"], kind_ids[asked_kind])
        adjective = when(form > 0, color_ids[asked_color])
        first = xp.where(adjective == HOLE, noun, adjective)
        article = xp.where(xp.asarray(_VOWEL)[first], ID["an"], ID["a"])
        tail = coins[..., 4] < 0.5
        columns = [word("is"), word("there"), article, adjective, noun]
        columns += [when(tail, word(text)) for text in ("in", "the", "image")] + [word("?")]
        return row(columns, QUESTION_SLOTS), yes_no(match.any(-1)), xp.full((batch, count), True)

    def color_of() -> tuple[Any, Any, Any]:
        subject, possible = choose(first_score, unique_kind)
        columns = [word("what"), word("color"), word("is"), word("the")]
        columns += [kind_ids[at(kind, subject)], word("?")]
        return row(columns, QUESTION_SLOTS), one(color_ids[at(color, subject)]), possible

    def position() -> tuple[Any, Any, Any]:
        third = IMAGE_SIZE / 3
        clear = present
        for centre in (layout.x[:, None], layout.y[:, None]):
            for line in (third, 2 * third):
                clear = clear & (xp.abs(centre - line) >= BORDER)
        subject, possible = choose(first_score, unique_pair & clear)
        adjective, noun = referring(subject, coins[..., 5])
        y_cell, x_cell = grid_cell(
            xp, at(layout.x[:, None], subject), at(layout.y[:, None], subject)
        )
        answer = [xp.asarray(ROW_IDS)[y_cell], xp.asarray(COLUMN_IDS)[x_cell]]
        columns = [word("where"), word("is"), word("the"), adjective, noun, word("?")]
        return row(columns, QUESTION_SLOTS), row(answer, ANSWER_SLOTS), possible

    def counting() -> tuple[Any, Any, Any]:
        subject, _ = choose(any_score, present)
        random_kind = coins[..., 6] < 0.12
        asked_kind = xp.where(random_kind, pick(xp, coins[..., 7], len(KINDS)), at(kind, subject))
        asked_color = at(color, subject)
        by_kind = coins[..., 8] < 0.6
        by_color = (coins[..., 8] >= 0.5) & (coins[..., 8] < 0.9)
        match = present & (~by_kind[..., None] | (kind == asked_kind[..., None]))
        match = match & (~by_color[..., None] | (color == asked_color[..., None]))
        noun = xp.where(by_kind, plural_ids[asked_kind], ID["objects"])
        adjective = when(by_color, color_ids[asked_color])
        columns = [
            word("how"),
            word("many"),
            adjective,
            noun,
            word("are"),
            word("there"),
            word("?"),
        ]
        answer = xp.asarray(_DIGIT_IDS)[match.sum(-1)]
        return row(columns, QUESTION_SLOTS), one(answer), xp.full((batch, count), True)

    dx = layout.x[:, :, None] - layout.x[:, None, :]  # B i j: how far i is right of j
    dy = layout.y[:, :, None] - layout.y[:, None, :]
    relations = xp.stack([dx < -APART, dx > APART, dy < -APART, dy > APART], axis=1)

    def relation() -> tuple[Any, Any, Any]:
        unique = unique_pair[:, 0]
        distinct = both & ~xp.eye(MAX_OBJECTS, dtype=bool)
        far = relations.any(1) & distinct & unique[:, :, None] & unique[:, None, :]
        chosen, possible = choose(pair_score, far.reshape(batch, 1, -1))
        first, second = chosen // MAX_OBJECTS, chosen % MAX_OBJECTS
        holds = xp.stack([at(relations[:, k].reshape(batch, 1, -1), chosen) for k in range(4)], -1)
        horizontal = holds[..., 0] | holds[..., 1]
        vertical = holds[..., 2] | holds[..., 3]
        across = horizontal & (~vertical | (coins[..., 5] < 0.5))
        side = xp.where(coins[..., 9] < 0.5, 0, 1) + xp.where(across, 0, 2)
        truth = xp.take_along_axis(holds, side[..., None], axis=-1)[..., 0]
        words = xp.asarray(_RELATION_IDS)[side]
        columns = [word("is"), word("the"), *referring(first, coins[..., 10]), words[..., 0]]
        columns += [words[..., 1], word("the"), *referring(second, coins[..., 11]), word("?")]
        return row(columns, QUESTION_SLOTS), yes_no(truth), possible

    def neighbor() -> tuple[Any, Any, Any]:
        # Exactly one object lies in the 90-degree cone on the asked side of the reference.
        wide = xp.abs(dx) >= xp.abs(dy)
        cones = xp.stack(
            [
                relations[:, 0] & wide,
                relations[:, 1] & wide,
                relations[:, 2] & ~wide,
                relations[:, 3] & ~wide,
            ],
            axis=1,
        )
        cones = cones & both[:, None]  # B 4 i j: i lies on that side of j
        only = (cones.sum(2) == 1) & unique_pair  # B 4 j
        score = pair_score[..., : 4 * MAX_OBJECTS]
        chosen, possible = choose(score, only.reshape(batch, 1, -1))
        side, reference = chosen // MAX_OBJECTS, chosen % MAX_OBJECTS
        found = xp.argmax(cones, axis=2).reshape(batch, 1, -1)  # B 1 4j
        words = xp.asarray(_RELATION_IDS)[side]
        columns = [word("what"), word("is"), words[..., 0], words[..., 1], word("the")]
        columns += [*referring(reference, coins[..., 10]), word("?")]
        answer = kind_ids[at(kind, at(found, chosen))]
        return row(columns, QUESTION_SLOTS), one(answer), possible

    def shape() -> tuple[Any, Any, Any]:
        subject, possible = choose(third_score, unique_color)
        columns = [word("what"), word("is"), word("the"), color_ids[at(color, subject)]]
        columns += [word("object"), word("?")]
        return row(columns, QUESTION_SLOTS), one(kind_ids[at(kind, subject)]), possible

    def reading() -> tuple[Any, Any, Any]:
        columns = [word(text) for text in ("what", "does", "the", "sign", "say", "?")]
        answers = xp.broadcast_to(sign_words(layout, xp)[:, None], (batch, count, ANSWER_SLOTS))
        possible = xp.broadcast_to(layout.sign_present[:, None], (batch, count))
        return row(columns, QUESTION_SLOTS), answers, possible

    builders = (presence, color_of, position, counting, relation, neighbor, shape, reading)
    built = [build() for build in builders]
    possible = xp.stack([parts[2] for parts in built], axis=-1)
    allowed = xp.take_along_axis(possible, types[..., None], axis=-1)[..., 0]
    types = xp.where(allowed, types, 0)
    words, answers = built[0][0], built[0][1]
    for index in range(1, len(TYPES)):
        here = (types == index)[..., None]
        words = xp.where(here, built[index][0], words)
        answers = xp.where(here, built[index][1], answers)
    with_suffix = (coins[..., 11:12] * 7919.0) % 1.0 < suffix_share
    suffix = xp.where(with_suffix, xp.asarray(_SUFFIX_IDS), HOLE)
    words = xp.concatenate([words, suffix], axis=-1).astype(np.int32)
    return Questions(words=words, answers=answers.astype(np.int32), type=types, possible=possible)


def sign_words(layout: Layout, xp: Any = np) -> Any:
    """Word ids [B, 2] of the signs' text: a word and HOLE, or two digit pieces."""
    number = layout.sign_number
    is_word = layout.sign_word >= 0
    word = xp.asarray(_SIGN_IDS)[xp.maximum(layout.sign_word, 0)]
    first = xp.where(is_word, word, xp.asarray(_DIGIT_IDS)[number // 10])
    return xp.stack([first, xp.where(is_word, HOLE, xp.asarray(_PIECE_IDS)[number % 10])], axis=-1)
