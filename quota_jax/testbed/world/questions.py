"""Questions about scenes in three forms, with the one true answer of each, batched.

Open: one word, number or spelled text. Claim: the question as a statement to confirm, yes or no.
Choice: two to five options with letters. A row of word ids has a fixed number of slots; unused
slots hold HOLE. One definition for numpy (benchmarks) and jax.numpy (the training step).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from quota_jax.testbed.world.asker import (
    HINT_SLOTS,
    MAX_OPTIONS,
    QUESTION_SLOTS,
    UNIFORMS_PER_QUESTION,
    Asker,
    Topic,
)
from quota_jax.testbed.world.layout import Layout
from quota_jax.testbed.world.topics import (
    BUILDERS,
    CHOICE_TOPICS,
    HINT_TOPICS,
    NO_CHOICE_TOPICS,
    TOPICS,
    YES_NO_TOPICS,
)
from quota_jax.testbed.world.vocabulary import FIRST_LETTER, ID, OPTION_LETTERS
from quota_jax.testbed.world.words import (
    ANSWER_SLOTS,
    CELL_START,
    COLOR_START,
    COUNT_START,
    HOLE,
    NAME_START,
    NO,
    NUM_VALUES,
    SPACE,
    VALUE_IDS,
    YES,
    spell,
)

__all__ = ["FORMS", "TOPICS", "UNIFORMS_PER_QUESTION", "Questions", "ask_layout"]

FORMS: tuple[str, ...] = ("open", "claim", "choice")
OPEN, CLAIM, CHOICE = 0, 1, 2
MAX_CHOICE_COUNT = 5
"""Wrong counts among options and in claims lie in 0..5, as most true ones do."""
_LETTER_IDS = np.array([ID[letter] for letter in OPTION_LETTERS], np.int32)


class Questions(NamedTuple):
    """Word ids and metadata of questions [B, Q].

    hint [B, Q, HINT_SLOTS], words [B, Q, QUESTION_SLOTS], options [B, Q, 5, 6] of which num_options
    [B, Q] (0 but for choices) count, answers [B, Q, 6]. `topic` indexes TOPICS and `form` FORMS,
    as asked or what stood in; `possible` [B, Q, topics] says which topics the scene allows.
    """

    hint: Any
    words: Any
    options: Any
    num_options: Any
    answers: Any
    topic: Any
    form: Any
    possible: Any


def _member(names: tuple[str, ...]) -> np.ndarray:
    return np.array([name in names for name in TOPICS])


def _exchange_tables() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which class a character is of, where it stands in it, and the members of each class.

    Vowels, consonants, digits, and digits that may begin a number.
    """
    groups = [[0, 4, 8, 14, 20], [], list(range(26, 36)), list(range(27, 36))]
    groups[1] = [code for code in range(26) if code not in groups[0]]
    members = np.array([np.resize(group, 21) for group in groups], np.int32)
    sizes = np.array([len(group) for group in groups], np.int32)
    kind = np.array([0 if c in groups[0] else 1 if c < 26 else 2 for c in range(36)], np.int32)
    return kind, members, sizes


_CLASS, _MEMBERS, _CLASS_SIZES = _exchange_tables()


def _edited_texts(a: Asker, codes: Any, other_sign: Any) -> Any:
    """Four wrong texts [B, Q, 4, 6]: one character of the truth exchanged, another, or both.

    Of the truth and the first three none stands out: each differs from one other in two places
    and from the rest in one. The fourth repeats the third. Characters keep their class, so wrong
    words look like right ones. Where `other_sign`, the first may be another sign's text instead.
    """
    xp = a.xp
    length = (codes >= 0).sum(-1)
    number = codes[..., 0] >= 26
    # Two places: the last two digits of a number; of a word, any but the first.
    shift = 1 + xp.minimum((a.coin(22) * (length - 2)).astype(np.int32), xp.maximum(length - 3, 0))
    one = xp.minimum((a.coin(23) * (length - 1)).astype(np.int32), length - 2)
    two = (one + shift) % xp.maximum(length - 1, 1)
    places = (
        xp.where(number, length - 2, 1 + one),
        xp.where(number, length - 1, 1 + two),
    )

    def exchange(text: Any, place: Any, coin: Any) -> Any:
        here = xp.arange(ANSWER_SLOTS) == place[..., None]
        code = xp.where(here, text, 0).sum(-1)
        leading = (code >= 26) & (place == 0)
        group = xp.where(leading, 3, xp.asarray(_CLASS)[xp.maximum(code, 0)])
        size = xp.asarray(_CLASS_SIZES)[group]
        match = xp.asarray(_MEMBERS)[group] == code[..., None]
        index = xp.argmax(match, axis=-1)
        step = 1 + xp.minimum((coin * (size - 1)).astype(np.int32), size - 2)
        new = xp.take_along_axis(
            xp.asarray(_MEMBERS)[group], ((index + step) % size)[..., None], axis=-1
        )
        return xp.where(here, new, text)

    first = exchange(codes, places[0], a.coin(24))
    second = exchange(codes, places[1], a.coin(25))
    third = exchange(first, places[1], a.coin(25))
    wrong = xp.stack([first, second, third], axis=2)
    # The first letter may have to give way, lest a known word begin the text.
    start = xp.maximum(wrong, 0) % 26
    start = xp.asarray(FIRST_LETTER)[start[..., 0], start[..., 1], start[..., 2]]
    start = xp.where(number[..., None], wrong[..., 0], start)
    wrong = xp.concatenate([start[..., None], wrong[..., 1:]], axis=-1)
    order = xp.argsort(a.option_score[..., :3], axis=-1)
    wrong = xp.take_along_axis(wrong, order[..., None], axis=2)

    same = (a.layout.sign_text[:, None] == codes[:, :, None]).all(-1)  # B Q S
    sign, found = a.choose(a.sign_score, a.layout.sign_present[:, None] & ~same)
    other = a.sign_codes(sign)
    use = other_sign & found & (a.coin(30) < 0.5)
    head = xp.where(use[..., None], other, wrong[:, :, 0])
    return xp.stack([head, wrong[:, :, 1], wrong[:, :, 2], wrong[:, :, 2]], axis=2)


def _wrong_values(a: Asker, value: Any, inventory: Any) -> Any:
    """Four wrong rows of VALUE_IDS [B, Q, 4] of the answer's space; what is in the scene first.

    Of an inventory only what is not in the scene is wrong.
    """
    xp = a.xp
    space = xp.asarray(SPACE)
    allowed = (space == space[xp.maximum(value, 0)][..., None]) & (
        xp.arange(NUM_VALUES) != value[..., None]
    )
    rows = xp.arange(NUM_VALUES)
    allowed = allowed & ~((rows > COUNT_START + MAX_CHOICE_COUNT) & (rows < CELL_START))
    here = xp.concatenate(
        [
            xp.zeros((a.batch, COLOR_START), dtype=bool),
            a.facts.colors > 0,
            a.facts.kinds > 0,
            xp.zeros((a.batch, NUM_VALUES - COUNT_START), dtype=bool),
        ],
        axis=1,
    )[:, None]
    allowed = allowed & ~(inventory[..., None] & here)
    near = a.coin(31)[..., None] < 0.75
    score = xp.where(allowed, a.value_score + (here & near), -1.0)
    return xp.argsort(-score, axis=-1)[..., : MAX_OPTIONS - 1]


def ask_layout(
    layout: Layout,
    uniforms: Any,
    topics: Any,
    forms: Any,
    xp: Any = np,
    *,
    num_options: int | None = None,
) -> Questions:
    """One question per entry of `topics` and `forms` [B, Q].

    `uniforms` is [B, Q * UNIFORMS_PER_QUESTION]. Where the scene does not allow a topic a presence
    question stands in. Yes/no topics are always open, inventory is always a choice, size never (it
    is then open), and no hint is claimed (it is then a choice); `Questions.topic` and `form` tell.
    Choices have 2 to 4 options (`num_options` fixes it), hints bring 2 to 5.
    """
    a = Asker(layout, uniforms, topics.shape[1], xp)
    built: list[Topic] = [build(a) for build in BUILDERS]
    possible = xp.stack([xp.broadcast_to(topic.possible, topics.shape) for topic in built], axis=-1)
    allowed = xp.take_along_axis(possible, topics[..., None], axis=-1)[..., 0]
    topics = xp.where(allowed, topics, 0)
    forms = xp.where(xp.asarray(_member(YES_NO_TOPICS))[topics], OPEN, forms)
    no_choice = xp.asarray(_member(NO_CHOICE_TOPICS))[topics]
    forms = xp.where(no_choice & (forms == CHOICE), OPEN, forms)
    forms = xp.where(xp.asarray(_member(CHOICE_TOPICS))[topics], CHOICE, forms)
    hinted = xp.asarray(_member(HINT_TOPICS))[topics]
    forms = xp.where(hinted & (forms == CLAIM), CHOICE, forms)

    empty = xp.full((*topics.shape, ANSWER_SLOTS), -1, dtype=np.int32)
    value, codes = a.full(-1), empty
    words = a.row([HOLE * xp.ones_like(topics)], QUESTION_SLOTS)
    hint = a.row([HOLE * xp.ones_like(topics)], HINT_SLOTS)
    names, num_names = xp.zeros((*topics.shape, MAX_OPTIONS), dtype=np.int32), a.full(0)
    for index, topic in enumerate(built):
        here = topics == index
        words = xp.where(here[..., None], a.row(topic.columns, QUESTION_SLOTS), words)
        value = xp.where(here, topic.value, value)
        if topic.codes is not None:
            codes = xp.where(here[..., None], topic.codes, codes)
        if topic.hint is not None:
            hint = xp.where(here[..., None], topic.hint, hint)
            names = xp.where(here[..., None], topic.names, names)
            num_names = xp.where(here, topic.num_names, num_names)

    # Wrong answers, and the true one at their head: [B, Q, 5, 6].
    table = xp.asarray(VALUE_IDS)
    spelled = (value < 0)[..., None]
    named = xp.take_along_axis(names, xp.clip(value, 0, MAX_OPTIONS - 1)[..., None], axis=-1)[
        ..., 0
    ]
    row = xp.where(hinted, NAME_START + named, xp.maximum(value, 0))
    truth = xp.where(spelled, spell(codes, xp), table[row])
    inventory = topics == TOPICS.index("inventory")
    wrong = xp.where(
        spelled[..., None],
        spell(_edited_texts(a, codes, (forms == CLAIM) & (topics == TOPICS.index("reading"))), xp),
        table[_wrong_values(a, value, inventory)],
    )

    claimed = xp.where((a.coin(32) < 0.5)[..., None], truth, wrong[:, :, 0])
    claims = forms == CLAIM
    for index, topic in enumerate(built):
        if topic.claim is not None:
            here = (claims & (topics == index))[..., None]
            words = xp.where(here, a.row(topic.claim(claimed), QUESTION_SLOTS), words)

    drawn = xp.where(a.coin(33) < 0.6, 4, xp.where(a.coin(33) < 0.8, 3, 2))
    number_of = drawn if num_options is None else a.full(num_options)
    number_of = xp.where(hinted, num_names, number_of)
    choices = forms == CHOICE
    number_of = xp.where(choices, number_of, 0).astype(np.int32)
    used = xp.arange(MAX_OPTIONS) < number_of[..., None]
    order = xp.argsort(xp.where(used, a.option_score, 2.0), axis=-1)
    pool = xp.concatenate([truth[:, :, None], wrong], axis=2)
    options = xp.take_along_axis(pool, order[..., None], axis=2)
    options = xp.where(hinted[..., None, None], table[NAME_START + names], options)
    options = xp.where(used[..., None], options, HOLE)
    place = xp.where(hinted, value, xp.argmin(order, axis=-1))

    letter = xp.asarray(_LETTER_IDS)[xp.clip(place, 0, MAX_OPTIONS - 1)]
    yes_no = table[xp.where((claimed == truth).all(-1), YES, NO)]
    answers = xp.where(claims[..., None], yes_no, truth)
    answers = xp.where(choices[..., None], a.row([letter], ANSWER_SLOTS), answers)
    return Questions(
        hint=hint,
        words=words.astype(np.int32),
        options=options.astype(np.int32),
        num_options=number_of,
        answers=answers.astype(np.int32),
        topic=topics,
        form=forms,
        possible=possible,
    )


# Topic, form and weight of what training draws: the benchmarks' questions, hard ones more often.
MIX: tuple[tuple[str, str, float], ...] = (
    ("presence", "open", 2.0), ("color", "open", 1.0), ("color", "claim", 0.7),
    ("color", "choice", 0.5), ("position", "open", 0.7), ("position", "claim", 0.7),
    ("position", "choice", 0.7), ("count", "open", 1.2), ("count", "claim", 0.8),
    ("count", "choice", 0.8), ("relation", "open", 1.5), ("neighbor", "open", 1.0),
    ("neighbor", "claim", 0.6), ("neighbor", "choice", 0.8), ("shape", "open", 0.7),
    ("shape", "claim", 0.3), ("shape", "choice", 0.6), ("size", "open", 0.8),
    ("size", "claim", 0.7), ("binding", "open", 0.9), ("binding", "claim", 0.4),
    ("binding", "choice", 0.5), ("neighbor_color", "open", 1.0), ("neighbor_color", "claim", 0.6),
    ("neighbor_color", "choice", 0.8), ("two_hop", "open", 1.0), ("two_hop", "claim", 0.4),
    ("two_hop", "choice", 0.7), ("more", "open", 1.0), ("reading", "open", 2.5),
    ("reading", "claim", 0.9), ("reading", "choice", 0.9), ("sign_color", "open", 0.8),
    ("sign_color", "claim", 0.3), ("sign_color", "choice", 0.4), ("sign_neighbor", "open", 0.8),
    ("sign_neighbor", "claim", 0.3), ("sign_neighbor", "choice", 0.4), ("sum", "open", 0.5),
    ("sum", "claim", 0.6), ("sum", "choice", 0.3), ("inventory", "choice", 0.8),
    ("owner_of_color", "open", 0.5), ("owner_of_color", "choice", 0.9),
    ("owner_of_kind", "open", 0.5), ("owner_of_kind", "choice", 0.9),
    ("person_at", "open", 0.5), ("person_at", "choice", 0.9), ("named_owner", "open", 0.4),
    ("named_owner", "choice", 0.4),
)  # fmt: skip
_MIX_WEIGHTS = np.array([weight for *_, weight in MIX]) / sum(weight for *_, weight in MIX)
_MIX_HINTED = np.array([topic in HINT_TOPICS for topic, *_ in MIX])
_MIX_TOPICS = np.array([TOPICS.index(topic) for topic, *_ in MIX], np.int32)
_MIX_FORMS = np.array([FORMS.index(form) for _, form, _ in MIX], np.int32)


def draw_requests(uniforms: Any, xp: Any = np, hint_share: float | None = None) -> tuple[Any, Any]:
    """Topics and forms [B, Q] of the training mix from uniforms [B, Q].

    ``hint_share`` makes the questions with a hint that share of all, in place of MIX's.
    """
    weights = _MIX_WEIGHTS
    if hint_share is not None:
        usual = weights[_MIX_HINTED].sum()
        weights = weights * np.where(
            _MIX_HINTED, hint_share / usual, (1 - hint_share) / (1 - usual)
        )
    bounds = xp.asarray(np.cumsum(weights)[:-1].astype(np.float32))
    index = (uniforms[..., None] >= bounds).sum(-1)
    return xp.asarray(_MIX_TOPICS)[index], xp.asarray(_MIX_FORMS)[index]
