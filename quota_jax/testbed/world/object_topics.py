"""Questions about objects: presence, attributes, places, relations, counts.

A builder chooses its subject, gives the question, the true answer and the claim that makes a yes/no
question of it. Answers are computed from the facts of the scene after the question is chosen.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from quota_jax.testbed.world.asker import Asker, Column, Topic
from quota_jax.testbed.world.layout import MAX_OBJECTS, pick
from quota_jax.testbed.world.vocabulary import COLORS, ID, KINDS
from quota_jax.testbed.world.words import (
    CELL_START,
    COLOR_IDS,
    COLOR_START,
    COUNT_START,
    HOLE,
    KIND_IDS,
    KIND_START,
    PLURAL_IDS,
    VALUE_IDS,
)


def presence(a: Asker) -> Topic:
    xp, layout = a.xp, a.layout
    present = layout.present[:, None]
    kind, color = layout.kind[:, None], layout.color[:, None]
    subject, _ = a.choose(a.any_score, present)
    asked_kind, asked_color = a.kind_of(subject), a.color_of(subject)
    plain, negative, near = a.coin(0) < 0.35, a.coin(1) < 0.5, a.coin(2) < 0.6
    has_kind, has_color = a.facts.kinds[:, None] > 0, a.facts.colors[:, None] > 0
    # Hard negatives keep the kind or the color of a real object, and name another that is there.
    with_color = (present & (color == asked_color[..., None]))[..., None]
    with_kind = (present & (kind == asked_kind[..., None]))[..., None]
    taken_kinds = (with_color & (kind[..., None] == xp.arange(len(KINDS)))).any(2)
    taken_colors = (with_kind & (color[..., None] == xp.arange(len(COLORS)))).any(2)
    new_kind, _ = a.choose(a.kind_score + (has_kind & near[..., None]), ~taken_kinds)
    new_color, _ = a.choose(a.color_score + (has_color & near[..., None]), ~taken_colors)
    absent_kind, _ = a.choose(a.kind_score, ~has_kind)
    # All ten colors of one kind may be taken; then the kind is exchanged.
    swap_kind = (a.coin(3) < 0.5) | taken_colors.all(-1)
    bound = negative & ~plain
    asked_kind = xp.where(bound & swap_kind, new_kind, asked_kind)
    asked_color = xp.where(bound & ~swap_kind, new_color, asked_color)
    asked_kind = xp.where(negative & plain, absent_kind, asked_kind)
    match = present & (kind == asked_kind[..., None])
    match = match & (plain[..., None] | (color == asked_color[..., None]))
    noun = xp.asarray(KIND_IDS)[asked_kind]
    adjective = xp.where(plain, HOLE, xp.asarray(COLOR_IDS)[asked_color])
    article = a.article(xp.where(plain, noun, adjective))
    tail = a.coin(4) < 0.6
    place = [xp.where(tail, ID[text], HOLE) for text in ("in", "the", "image")]
    columns = ["is", "there", article, adjective, noun, *place, "?"]
    return Topic(columns, a.yes_no(match.any(-1)), a.full(True))


def color(a: Asker) -> Topic:
    subject, possible = a.choose(a.first_score, a.facts.unique_kind[:, None])
    noun = a.kind_word(subject)
    return Topic(
        ["what", "color", "is", "the", noun, "?"],
        COLOR_START + a.color_of(subject),
        possible,
        lambda answer: ["is", "the", noun, answer, "?"],
    )


def position(a: Asker) -> Topic:
    allowed = a.facts.unique_pair & a.facts.cell_clear
    subject, possible = a.choose(a.first_score, allowed[:, None])
    thing = a.referring(subject, a.coin(5))
    cell = a.at(a.facts.row * 3 + a.facts.column, subject)
    return Topic(
        ["where", "is", "the", *thing, "?"],
        CELL_START + cell,
        possible,
        lambda answer: ["is", "the", *thing, "in", "the", answer, "of", "the", "image", "?"],
    )


def count(a: Asker) -> Topic:
    xp, layout = a.xp, a.layout
    # A number is drawn first, then something that comes close to it: large counts are not rare.
    wanted = pick(xp, a.coin(6), 8)[..., None]
    kind, _ = a.choose(0.5 * a.kind_score - xp.abs(a.facts.kinds[:, None] - wanted), True)
    color, _ = a.choose(0.5 * a.color_score - xp.abs(a.facts.colors[:, None] - wanted), True)
    subject, _ = a.choose(a.any_score, layout.present[:, None])
    pair = a.coin(7) < 0.25
    by_color = a.coin(8) < 0.45
    kind = xp.where(pair, a.kind_of(subject), kind)
    color = xp.where(pair & (a.coin(9) < 0.8), a.color_of(subject), color)
    match = layout.present[:, None]
    match = match & ((by_color & ~pair)[..., None] | (layout.kind[:, None] == kind[..., None]))
    match = match & ((~by_color & ~pair)[..., None] | (layout.color[:, None] == color[..., None]))
    noun = xp.where(by_color & ~pair, ID["objects"], xp.asarray(PLURAL_IDS)[kind])
    adjective = xp.where(by_color | pair, xp.asarray(COLOR_IDS)[color], HOLE)
    number = match.sum(-1)
    return Topic(
        ["how", "many", adjective, noun, "are", "there", "?"],
        COUNT_START + xp.minimum(number, 9),
        number <= 9,
        lambda answer: ["is", "the", "number", "of", adjective, noun, answer, "?"],
    )


def relation(a: Asker) -> Topic:
    xp, facts = a.xp, a.facts
    unique = facts.unique_pair
    allowed = facts.sides.any(1) & unique[:, :, None] & unique[:, None, :]
    chosen, possible = a.choose(a.pair_score[..., : MAX_OBJECTS**2], a.flat(allowed))
    first, second = chosen // MAX_OBJECTS, chosen % MAX_OBJECTS
    holds = xp.stack([a.at(facts.sides[:, k].reshape(a.batch, -1), chosen) for k in range(4)], -1)
    horizontal, vertical = holds[..., :2].any(-1), holds[..., 2:].any(-1)
    across = horizontal & (~vertical | (a.coin(5) < 0.5))
    side = xp.where(a.coin(9) < 0.5, 0, 1) + xp.where(across, 0, 2)
    truth = xp.take_along_axis(holds, side[..., None], axis=-1)[..., 0]
    columns = ["is", "the", *a.referring(first, a.coin(10)), a.side(side), "the"]
    columns += [*a.referring(second, a.coin(11)), "?"]
    return Topic(columns, a.yes_no(truth), possible)


def _beside(a: Asker) -> tuple[Any, Any, Any, Any]:
    """Side, reference object, the object just on that side, and whether there is one."""
    allowed = a.facts.beside_valid & a.facts.unique_pair[:, None]
    score = a.pair_score[..., : 4 * MAX_OBJECTS]
    chosen, possible = a.choose(score, a.flat(allowed))
    found = a.at(a.facts.beside.reshape(a.batch, -1), chosen)
    return chosen // MAX_OBJECTS, chosen % MAX_OBJECTS, found, possible


def neighbor(a: Asker) -> Topic:
    side, reference, found, possible = _beside(a)
    place = ["just", a.side(side), "the", *a.referring(reference, a.coin(10))]
    return Topic(
        ["what", "is", *place, "?"],
        KIND_START + a.kind_of(found),
        possible,
        lambda answer: ["is", "the", "object", *place, a.article(answer[..., 0]), answer, "?"],
    )


def shape(a: Asker) -> Topic:
    subject, possible = a.choose(a.second_score, a.facts.unique_color[:, None])
    thing = [a.color_word(subject), "object"]
    return Topic(
        ["what", "is", "the", *thing, "?"],
        KIND_START + a.kind_of(subject),
        possible,
        lambda answer: ["is", "the", *thing, a.article(answer[..., 0]), answer, "?"],
    )


def size(a: Asker) -> Topic:
    xp, facts = a.xp, a.facts
    unique = facts.unique_pair
    different = a.layout.kind[:, :, None] != a.layout.kind[:, None, :]
    allowed = facts.larger & different & unique[:, :, None] & unique[:, None, :]
    chosen, possible = a.choose(a.pair_score[..., : MAX_OBJECTS**2], a.flat(allowed))
    large, small = chosen // MAX_OBJECTS, chosen % MAX_OBJECTS
    swapped, wants_large = a.coin(12) < 0.5, a.coin(13) < 0.6
    first, second = xp.where(swapped, small, large), xp.where(swapped, large, small)
    one, two = a.referring(first, a.coin(10)), a.referring(second, a.coin(11))
    word = xp.where(wants_large, ID["larger"], ID["smaller"])
    columns = ["which", "is", word, ",", "the", *one, "or", "the", *two, "?"]
    value = KIND_START + a.kind_of(xp.where(wants_large, large, small))
    true_word = xp.asarray(VALUE_IDS)[value][..., 0]

    def claim(answer: Any) -> list[Column]:
        # The true answer comes first in a true claim, any other answer turns the two around.
        is_first = (answer[..., 0] == true_word) ^ swapped ^ ~wants_large
        head = [xp.where(is_first, x, y) for x, y in zip(one, two, strict=True)]
        tail = [xp.where(is_first, y, x) for x, y in zip(one, two, strict=True)]
        return ["is", "the", *head, word, "than", "the", *tail, "?"]

    return Topic(columns, value, possible, claim)


def binding(a: Asker) -> Topic:
    xp, facts, layout = a.xp, a.facts, a.layout
    twin = facts.twin
    by_size = xp.take_along_axis(facts.larger, twin[..., None], axis=2)[..., 0]
    pairs = [
        xp.take_along_axis(facts.sides[:, k], twin[..., None], axis=2)[..., 0] for k in range(4)
    ]
    smaller = xp.take_along_axis(xp.swapaxes(facts.larger, 1, 2), twin[..., None], axis=2)[..., 0]
    words = np.array(
        [ID[w] for w in ("larger", "smaller", "leftmost", "rightmost", "upper", "lower")]
    )
    other_color = xp.take_along_axis(layout.color, twin, axis=1) != layout.color
    holds = xp.stack([by_size, smaller, *pairs], axis=1)  # B 6 M
    allowed = holds & (facts.twin_valid & other_color)[:, None]
    score = a.pair_score[..., : 6 * MAX_OBJECTS]
    chosen, possible = a.choose(score, a.flat(allowed))
    which, subject = chosen // MAX_OBJECTS, chosen % MAX_OBJECTS
    thing = [xp.asarray(words)[which], a.kind_word(subject)]
    return Topic(
        ["what", "color", "is", "the", *thing, "?"],
        COLOR_START + a.color_of(subject),
        possible,
        lambda answer: ["is", "the", *thing, answer, "?"],
    )


def neighbor_color(a: Asker) -> Topic:
    side, reference, found, possible = _beside(a)
    place = ["the", "object", "just", a.side(side), "the", *a.referring(reference, a.coin(10))]
    return Topic(
        ["what", "color", "is", *place, "?"],
        COLOR_START + a.color_of(found),
        possible,
        lambda answer: ["is", *place, answer, "?"],
    )


def two_hop(a: Asker) -> Topic:
    xp, facts = a.xp, a.facts
    beside, valid = facts.beside, facts.beside_valid
    allowed, ends = [], []
    for second in range(4):
        # From j by side k to beside[k, j], and on by `second`.
        middle = beside.reshape(a.batch, -1)
        end = xp.take_along_axis(beside[:, second], middle, axis=1)
        fine = valid.reshape(a.batch, -1) & xp.take_along_axis(valid[:, second], middle, axis=1)
        start = xp.broadcast_to(xp.arange(4 * MAX_OBJECTS) % MAX_OBJECTS, end.shape)
        unique = xp.take_along_axis(facts.unique_pair, start, axis=1)
        allowed.append(fine & unique & (end != start))
        ends.append(end)
    chosen, possible = a.choose(a.pair_score, xp.concatenate(allowed, axis=1)[:, None])
    found = a.at(xp.concatenate(ends, axis=1), chosen)
    second, rest = chosen // (4 * MAX_OBJECTS), chosen % (4 * MAX_OBJECTS)
    place = ["just", a.side(second), "the", "object", "just", a.side(rest // MAX_OBJECTS), "the"]
    place += a.referring(rest % MAX_OBJECTS, a.coin(10))
    return Topic(
        ["what", "is", *place, "?"],
        KIND_START + a.kind_of(found),
        possible,
        lambda answer: ["is", "the", "thing", *place, a.article(answer[..., 0]), answer, "?"],
    )


def more(a: Asker) -> Topic:
    xp, facts = a.xp, a.facts
    subject, _ = a.choose(a.any_score, a.layout.present[:, None])

    def two(counts: Any, first: Any, score: Any) -> tuple[Any, Any, Any]:
        mine = a.at(counts, first)
        others = (counts[:, None] != mine[..., None]) & (counts[:, None] > 0)
        second, fine = a.choose(score, others)
        return second, fine, mine > a.at(counts, second)

    kind, color = a.kind_of(subject), a.color_of(subject)
    kind_two, kind_fine, kind_more = two(facts.kinds, kind, a.kind_score)
    color_two, color_fine, color_more = two(facts.colors, color, a.color_score)
    by_kind = xp.where(a.coin(14) < 0.5, kind_fine, ~color_fine)
    swapped = a.coin(15) < 0.5
    first = [
        xp.where(by_kind, HOLE, xp.asarray(COLOR_IDS)[color]),
        xp.where(by_kind, xp.asarray(PLURAL_IDS)[kind], ID["objects"]),
    ]
    second = [
        xp.where(by_kind, HOLE, xp.asarray(COLOR_IDS)[color_two]),
        xp.where(by_kind, xp.asarray(PLURAL_IDS)[kind_two], ID["objects"]),
    ]
    one = [xp.where(swapped, y, x) for x, y in zip(first, second, strict=True)]
    two_ = [xp.where(swapped, x, y) for x, y in zip(first, second, strict=True)]
    truth = xp.where(by_kind, kind_more, color_more) ^ swapped
    columns = ["are", "there", "more", *one, "than", *two_, "?"]
    return Topic(columns, a.yes_no(truth), xp.where(by_kind, kind_fine, color_fine))


def inventory(a: Asker) -> Topic:
    subject, possible = a.choose(a.any_score, a.layout.present[:, None])
    columns = ["which", "of", "these", "is", "in", "the", "image", "?"]
    return Topic(columns, KIND_START + a.kind_of(subject), possible)
