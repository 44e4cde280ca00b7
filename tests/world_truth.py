"""A slow reader of the world's English questions: the truth from plain metadata alone.

Knows nothing of how questions are made; ambiguous or borderline questions are assertion errors.
"""

from __future__ import annotations

import re

from quota_jax.testbed.scenes import Scene, SceneObject, Sign
from quota_jax.testbed.world.vocabulary import COLORS, KINDS, plural

SIDES = r"left of|right of|above|below"


def _noun(word: str) -> str | None:
    kinds = [kind for kind in KINDS if word in (kind, plural(kind))]
    return kinds[0] if kinds else None


def matching(scene: Scene, phrase: str) -> list[SceneObject]:
    """Objects that a phrase like "red cup", "cups" or "blue objects" describes."""
    *adjectives, noun = phrase.split()
    kind = _noun(noun)
    assert kind or noun in ("object", "objects"), phrase
    assert not adjectives or (len(adjectives) == 1 and adjectives[0] in COLORS), phrase
    return [
        o
        for o in scene.objects
        if (kind is None or o.kind == kind) and (not adjectives or o.color == adjectives[0])
    ]


def only(found: list):
    assert len(found) == 1, f"not one but {len(found)}: {found}"
    return found[0]


def along(side: str, thing, other) -> float:
    """How many pixels `thing` lies on that side of `other`."""
    return {
        "left of": other.x - thing.x,
        "right of": thing.x - other.x,
        "above": other.y - thing.y,
        "below": thing.y - other.y,
    }[side]


def across(side: str, thing, other) -> float:
    return abs(thing.y - other.y) if side in ("left of", "right of") else abs(thing.x - other.x)


def _distance(a, b) -> float:
    return ((a.x - b.x) ** 2 + (a.y - b.y) ** 2) ** 0.5


def just(scene: Scene, side: str, other: SceneObject) -> SceneObject:
    """The clearly nearest object of a wide cone, which must lie well inside it."""
    cone = [
        o
        for o in scene.objects
        if o is not other
        and along(side, o, other) > 20
        and across(side, o, other) <= 1.5 * along(side, o, other) * 0.9999
    ]
    cone.sort(key=lambda o: _distance(o, other))
    assert cone, "nothing there"
    best = cone[0]
    assert across(side, best, other) <= 0.71 * along(side, best, other)
    assert len(cone) == 1 or _distance(cone[1], other) >= 1.249 * _distance(best, other)
    return best


def closest(things: list, other):
    ranked = sorted(things, key=lambda t: _distance(t, other))
    assert len(ranked) == 1 or _distance(ranked[1], other) >= 1.249 * _distance(ranked[0], other)
    return ranked[0]


def extreme(things: list, word: str):
    sign = {"leftmost": 1, "rightmost": -1, "highest": 1, "lowest": -1}[word]
    place = (lambda t: sign * t.x) if word.endswith("most") else (lambda t: sign * t.y)
    ranked = sorted(things, key=place)
    assert len(ranked) >= 2
    assert place(ranked[1]) - place(ranked[0]) >= 19.99
    return ranked[0]


def thing(scene: Scene, phrase: str) -> SceneObject:
    """The one object a phrase points at, through any number of hops."""
    hop = re.fullmatch(rf"(?:object|thing) just ({SIDES}) the (.+)", phrase)
    if hop:
        return just(scene, hop[1], thing(scene, hop[2]))
    near = re.fullmatch(r"object closest to the (.*sign.*)", phrase)
    if near:
        return closest(list(scene.objects), the_sign(scene, near[1]))
    two = re.fullmatch(r"(larger|smaller|upper|lower|leftmost|rightmost) (\w+)", phrase)
    if two:
        first, second = matching(scene, two[2])
        if two[1] in ("larger", "smaller"):
            first, second = sorted((first, second), key=lambda o: -o.size)
            assert first.size >= 1.399 * second.size
            return first if two[1] == "larger" else second
        side = {"upper": "above", "lower": "below"}.get(two[1], two[1].removesuffix("most") + " of")
        assert abs(along(side, first, second)) > 20
        return first if along(side, first, second) > 0 else second
    return only(matching(scene, phrase))


def the_sign(scene: Scene, phrase: str) -> Sign:
    signs = list(scene.signs)
    if phrase == "sign":
        return only(signs)
    says = re.fullmatch(r"sign that says (\w+)", phrase)
    if says:
        return only([s for s in signs if s.text == says[1]])
    near = re.fullmatch(r"sign closest to the (.+)", phrase)
    if near:
        return closest(signs, thing(scene, near[1]))
    word = phrase.removesuffix(" sign")
    if word in COLORS:
        return only([s for s in signs if s.color == word])
    return extreme(signs, word)


def cell(scene: Scene, o: SceneObject) -> str:
    height, width = scene.size
    for value, extent in ((o.x, width), (o.y, height)):
        assert min(abs(value - extent / 3), abs(value - 2 * extent / 3)) >= 5.99
    row = ("top", "middle", "bottom")[int(3 * o.y / height)]
    return f"{row} {('left', 'center', 'right')[int(3 * o.x / width)]}"


def _sum(scene: Scene) -> str:
    numbers = [int(s.text) for s in scene.signs if s.text.isdigit()]
    assert len(numbers) == 2
    return str(sum(numbers))


def _larger(scene: Scene, word: str, first: str, second: str) -> bool:
    a, b = thing(scene, first), thing(scene, second)
    assert max(a.size, b.size) >= 1.399 * min(a.size, b.size)
    return (a.size > b.size) == (word == "larger")


def truth(scene: Scene, text: str, hint: str = "", options: tuple[str, ...] = ()) -> str:
    """The answer to a question, by reading it (and its hint); for choices the letter."""
    q = text[:1].lower() + text[1:]
    if options:
        assert len(set(options)) == len(options), options
        answer = _choice(scene, q, hint, options)
        return "ABCDE"[options.index(answer)]
    if hint:
        return _choice(scene, q, hint, ())

    def yes(value: bool) -> str:
        return "yes" if value else "no"

    if m := re.fullmatch(r"is there an? (.+?)( in the image)?\?", q):
        return yes(bool(matching(scene, m[1])))
    if m := re.fullmatch(r"what color is the (.*sign.*)\?", q):
        return the_sign(scene, m[1]).color
    if m := re.fullmatch(r"what color is the (.+)\?", q):
        return thing(scene, m[1]).color
    if m := re.fullmatch(r"where is the (.+)\?", q):
        return cell(scene, thing(scene, m[1]))
    if m := re.fullmatch(r"how many (.+) are there\?", q):
        return str(len(matching(scene, m[1])))
    if m := re.fullmatch(r"is the number of (.+) (\d)\?", q):
        return yes(len(matching(scene, m[1])) == int(m[2]))
    if m := re.fullmatch(r"are there more (.+) than (.+)\?", q):
        first, second = len(matching(scene, m[1])), len(matching(scene, m[2]))
        assert first != second
        return yes(first > second)
    if m := re.fullmatch(r"which is (larger|smaller), the (.+) or the (.+)\?", q):
        first = _larger(scene, m[1], m[2], m[3])
        return thing(scene, m[2] if first else m[3]).kind
    if m := re.fullmatch(r"is the (.+) (larger|smaller) than the (.+)\?", q):
        return yes(_larger(scene, m[2], m[1], m[3]))
    if m := re.fullmatch(r"what does the (.+) say\?", q):
        return the_sign(scene, m[1]).text
    if m := re.fullmatch(r"does the (.+) say (\w+)\?", q):
        return yes(the_sign(scene, m[1]).text == m[2])
    if m := re.fullmatch(r"is the sum of the two numbers (\d+)\?", q):
        return yes(_sum(scene) == m[1])
    if q == "what is the sum of the two numbers?":
        return _sum(scene)
    if m := re.fullmatch(r"is the (.+) in the (\w+ \w+) of the image\?", q):
        return yes(cell(scene, thing(scene, m[1])) == m[2])
    if m := re.fullmatch(r"what object is (closest to .+)\?", q):
        return thing(scene, f"object {m[1]}").kind
    if m := re.fullmatch(rf"what is (just (?:{SIDES}) .+)\?", q):
        return thing(scene, f"object {m[1]}").kind
    if m := re.fullmatch(rf"is the (\w+(?: (?!just)\w+)?) ({SIDES}) the (\w+(?: \w+)?)\?", q):
        distance = along(m[2], thing(scene, m[1]), thing(scene, m[3]))
        assert abs(distance) > 20, "too close to call"
        return yes(distance > 0)
    if m := re.fullmatch(r"is the (.+) an? (\w+)\?", q):
        return yes(thing(scene, m[1]).kind == m[2])
    if m := re.fullmatch(r"is the (sign that says \w+) (\w+)\?", q):
        return yes(the_sign(scene, m[1]).color == m[2])
    if m := re.fullmatch(r"is the (.+) (\w+)\?", q):
        assert m[2] in COLORS
        return yes(thing(scene, m[1]).color == m[2])
    m = re.fullmatch(r"what is the (.+)\?", q)
    assert m, text
    return thing(scene, m[1]).kind


def _choice(scene: Scene, q: str, hint: str, options: tuple[str, ...]) -> str:
    rules = [rule.strip().lower() for rule in hint.split(".") if rule.strip()]
    if q.startswith("which of these is in the image"):
        return only([o for o in options if matching(scene, o)])
    if m := re.fullmatch(r"who owns the (.+)\?", q):
        if named := [rule.split()[0] for rule in rules if rule.endswith(f" owns the {m[1]}")]:
            return only(named)
        o = thing(scene, m[1])
        owners = []
        for rule in rules:
            name, what = rule.split(" owns the ")
            if o in matching(scene, what):
                owners.append(name)
        return only(owners)
    if m := re.fullmatch(r"which person is (\w+)\?", q):
        places = {rule.split(" is at the ")[0]: rule.split(" is at the ")[1] for rule in rules}
        assert set(places) == set(options) or not options
        chosen = extreme([thing(scene, place) for place in places.values()], m[1])
        return only([name for name, place in places.items() if thing(scene, place) is chosen])
    return truth(scene, q)
