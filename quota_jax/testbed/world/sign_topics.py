"""Questions about signs: what they say, their color, what is near them, the sum of two numbers."""

from __future__ import annotations

from quota_jax.testbed.world.asker import Asker, Topic
from quota_jax.testbed.world.layout import pick
from quota_jax.testbed.world.vocabulary import ID
from quota_jax.testbed.world.words import (
    ANSWER_SLOTS,
    COLOR_IDS,
    COLOR_START,
    EXTREME_IDS,
    HOLE,
    KIND_START,
    number_codes,
    spell,
)


def reading(a: Asker) -> Topic:
    xp, facts, layout = a.xp, a.facts, a.layout
    by_color, possible = a.choose(a.sign_score, layout.sign_present[:, None])
    side = pick(xp, a.coin(16), 4)
    allowed = facts.object_sign_valid & facts.unique_pair
    reference, near = a.choose(a.first_score, allowed[:, None])
    only = (layout.sign_present.sum(1) == 1)[:, None] & (a.coin(17) < 0.5)
    near = near & (a.coin(17) >= 0.6) & ~only
    far = a.at(facts.extreme_valid, side) & (a.coin(17) < 0.3) & ~only
    sign = xp.where(near, a.at(facts.object_sign, reference), by_color)
    sign = xp.where(far, a.at(facts.extreme, side), sign)
    by_panel = ~(near | far | only)
    adjective = xp.where(by_panel, xp.asarray(COLOR_IDS)[a.at(layout.sign_color, sign)], HOLE)
    adjective = xp.where(far, xp.asarray(EXTREME_IDS)[side], adjective)
    place = [xp.where(near, ID[w], HOLE) for w in ("closest", "to", "the")]
    place += [xp.where(near, ids, HOLE) for ids in a.referring(reference, a.coin(10))]
    which = ["the", adjective, "sign", *place]
    return Topic(
        ["what", "does", *which, "say", "?"],
        a.full(-1),
        possible,
        lambda answer: ["does", *which, "say", answer, "?"],
        codes=a.sign_codes(sign),
    )


def sign_color(a: Asker) -> Topic:
    sign, possible = a.choose(a.sign_score, a.layout.sign_present[:, None])
    thing = ["the", "sign", "that", "says", spell(a.sign_codes(sign), a.xp)]
    return Topic(
        ["what", "color", "is", *thing, "?"],
        COLOR_START + a.at(a.layout.sign_color, sign),
        possible,
        lambda answer: ["is", *thing, answer, "?"],
    )


def sign_neighbor(a: Asker) -> Topic:
    xp = a.xp
    sign, possible = a.choose(a.sign_score, a.facts.sign_object_valid[:, None])
    by_color = (a.coin(18) < 0.5)[..., None]
    color = xp.asarray(COLOR_IDS)[a.at(a.layout.sign_color, sign)][..., None]
    says = a.row(["that", "says", spell(a.sign_codes(sign), xp)], 2 + ANSWER_SLOTS)
    place = ["closest", "to", "the", xp.where(by_color, color, HOLE), "sign"]
    place.append(xp.where(by_color, HOLE, says))
    found = a.at(a.facts.sign_object, sign)
    return Topic(
        ["what", "object", "is", *place, "?"],
        KIND_START + a.kind_of(found),
        possible,
        lambda answer: ["is", "the", "object", *place, a.article(answer[..., 0]), answer, "?"],
    )


def total(a: Asker) -> Topic:
    layout = a.layout
    numbers = layout.sign_present & (layout.sign_number >= 0)
    value = a.xp.where(numbers, layout.sign_number, 0).sum(1)[:, None] + a.full(0)
    thing = ["the", "sum", "of", "the", "two", "numbers"]
    return Topic(
        ["what", "is", *thing, "?"],
        a.full(-1),
        (numbers.sum(1) == 2)[:, None] & a.full(True),
        lambda answer: ["is", *thing, answer, "?"],
        codes=number_codes(a.xp.minimum(value, 999), a.xp),
    )
