"""Questions that need a hint in words, all but one also the picture; names answer them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from quota_jax.testbed.world.asker import HINT_SLOTS, MAX_OPTIONS, Asker, Column, Topic
from quota_jax.testbed.world.facts import APART
from quota_jax.testbed.world.layout import pick
from quota_jax.testbed.world.vocabulary import ID
from quota_jax.testbed.world.words import (
    COLOR_IDS,
    EXTREME_IDS,
    HOLE,
    NAME_START,
    PLURAL_IDS,
    VALUE_IDS,
)


def _people(a: Asker) -> tuple[Any, Any, Any]:
    """Names [B, Q, 5] of the options, the order in which a hint tells of them, how many."""
    xp = a.xp
    number = 2 + pick(xp, a.coin(19), MAX_OPTIONS - 1)
    names = xp.argsort(a.name_score, axis=-1)[..., :MAX_OPTIONS]
    used = xp.arange(MAX_OPTIONS) < number[..., None]
    order = xp.argsort(xp.where(used, a.order_score, 2.0), axis=-1)
    return names, order, number


def _hint(
    a: Asker, entries: Callable[[Any, Any], list[Column]], names: Any, order: Any, number: Any
) -> Any:
    """Hint words: one sentence per option, in the given order; entries(name id, option)."""
    xp = a.xp
    ids = xp.asarray(VALUE_IDS[NAME_START:, 0])[names]
    sentences = []
    for slot in range(MAX_OPTIONS):
        option = order[..., slot]
        name = xp.take_along_axis(ids, option[..., None], axis=-1)[..., 0]
        sentence = a.row([*entries(name, option), "."], HINT_SLOTS // MAX_OPTIONS)
        sentences.append(xp.where((slot < number)[..., None], sentence, HOLE))
    return a.row(sentences, HINT_SLOTS)


def _owner(a: Asker, values: Any, subject: Any, others: Any, score: Any) -> tuple[Any, ...]:
    """Options' values [B, Q, 5] with that of the subject at a random place; who, and the rest."""
    xp = a.xp
    names, order, number = _people(a)
    place = xp.minimum((a.coin(20) * number).astype(np.int32), number - 1)
    mine = a.at(values, subject)[..., None]
    ranked = xp.argsort(-(score + others) + 9.0 * (xp.arange(score.shape[-1]) == mine), axis=-1)[
        ..., :MAX_OPTIONS
    ]
    chosen = xp.where(xp.arange(MAX_OPTIONS) == place[..., None], mine, ranked)
    return chosen, names, order, number, place


def owner_of_color(a: Asker) -> Topic:
    xp = a.xp
    subject, possible = a.choose(a.first_score, a.facts.unique_kind[:, None])
    near = 0.7 * (a.facts.colors[:, None] > 0)
    chosen, names, order, number, place = _owner(a, a.layout.color, subject, near, a.color_score)

    def entry(name: Any, option: Any) -> list[Column]:
        color = xp.take_along_axis(chosen, option[..., None], axis=-1)[..., 0]
        return [name, "owns", "the", xp.asarray(COLOR_IDS)[color], "objects"]

    return Topic(
        ["who", "owns", "the", a.kind_word(subject), "?"],
        place,
        possible,
        hint=_hint(a, entry, names, order, number),
        names=names,
        num_names=number,
    )


def owner_of_kind(a: Asker) -> Topic:
    xp = a.xp
    subject, possible = a.choose(a.second_score, a.facts.unique_color[:, None])
    near = 0.7 * (a.facts.kinds[:, None] > 0)
    chosen, names, order, number, place = _owner(a, a.layout.kind, subject, near, a.kind_score)

    def entry(name: Any, option: Any) -> list[Column]:
        kind = xp.take_along_axis(chosen, option[..., None], axis=-1)[..., 0]
        return [name, "owns", "the", xp.asarray(PLURAL_IDS)[kind]]

    return Topic(
        ["who", "owns", "the", a.color_word(subject), "object", "?"],
        place,
        possible,
        hint=_hint(a, entry, names, order, number),
        names=names,
        num_names=number,
    )


def person_at(a: Asker) -> Topic:
    xp, layout = a.xp, a.layout
    names, order, number = _people(a)
    unique = a.facts.unique_pair
    score = xp.where(unique[:, None], a.any_score, -1.0)
    things = xp.argsort(-score, axis=-1)[..., :MAX_OPTIONS]
    used = xp.arange(MAX_OPTIONS) < number[..., None]
    side = pick(xp, a.coin(21), 4)
    x = xp.take_along_axis(xp.broadcast_to(layout.x[:, None], a.any_score.shape), things, axis=-1)
    y = xp.take_along_axis(xp.broadcast_to(layout.y[:, None], a.any_score.shape), things, axis=-1)
    s = side[..., None]
    place = xp.where(s == 0, x, xp.where(s == 1, -x, xp.where(s == 2, y, -y)))
    place = xp.where(used, place, 1e6)
    best = xp.argmin(place, axis=-1)
    rest = xp.where(xp.arange(MAX_OPTIONS) == best[..., None], 1e6, place).min(-1)
    possible = (unique.sum(1)[:, None] >= number) & (rest - place.min(-1) >= APART)

    def entry(name: Any, option: Any) -> list[Column]:
        thing = xp.take_along_axis(things, option[..., None], axis=-1)[..., 0]
        return [name, "is", "at", "the", a.color_word(thing), a.kind_word(thing)]

    return Topic(
        ["which", "person", "is", xp.asarray(EXTREME_IDS)[side], "?"],
        best,
        possible,
        hint=_hint(a, entry, names, order, number),
        names=names,
        num_names=number,
    )


def named_owner(a: Asker) -> Topic:
    """Reads the hint alone: the question names what is owned. Training only, see MIX."""
    xp = a.xp
    names, order, number = _people(a)
    place = xp.minimum((a.coin(20) * number).astype(np.int32), number - 1)
    by_color = a.coin(21) < 0.5
    colors = xp.argsort(a.color_score, axis=-1)[..., :MAX_OPTIONS]
    kinds = xp.argsort(a.kind_score, axis=-1)[..., :MAX_OPTIONS]

    def owned(option: Any) -> list[Column]:
        color, kind = (
            xp.take_along_axis(values, option[..., None], axis=-1)[..., 0]
            for values in (colors, kinds)
        )
        return [
            xp.where(by_color, xp.asarray(COLOR_IDS)[color], xp.asarray(PLURAL_IDS)[kind]),
            xp.where(by_color, ID["objects"], HOLE),
        ]

    return Topic(
        ["who", "owns", "the", *owned(place), "?"],
        place,
        a.full(True),
        hint=_hint(
            a, lambda name, option: [name, "owns", "the", *owned(option)], names, order, number
        ),
        names=names,
        num_names=number,
    )
