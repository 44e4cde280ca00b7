"""Words of the world: objects, colors, names, function words, letters; and the tokenizer.

Known words are one token each. Everything written on signs is spelled letter by letter (a first
letter, then pieces "##x"), whether it stands in an answer or in a question: sign texts never begin
with a known word (`FIRST_LETTER`), so greedy word pieces split them the same way. Option letters
"A".."E" are tokens of their own, case kept; all other text is lower-cased.
"""

from __future__ import annotations

import string
from typing import Any

import numpy as np

PAD, BOS, EOS, UNK, IMAGE = "<pad>", "<s>", "</s>", "<unk>", "<image>"
SPECIALS: tuple[str, ...] = (PAD, BOS, EOS, UNK, IMAGE)
USER, ASSISTANT = "user:", "assistant:"

KINDS: tuple[str, ...] = (
    "car", "tree", "house", "flower", "fish", "cup", "key", "boat", "cloud", "umbrella",
    "mushroom", "bottle", "flag", "bell", "star", "heart", "moon", "arrow", "apple", "chair",
    "ladder", "lamp", "clock", "hat", "hammer", "plane", "cat", "rocket", "table", "tent",
)  # fmt: skip
COLORS: tuple[str, ...] = (
    "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white",
)  # fmt: skip
ROWS: tuple[str, ...] = ("top", "middle", "bottom")
COLUMNS: tuple[str, ...] = ("left", "center", "right")
NAMES: tuple[str, ...] = ("tom", "ann", "sam", "eve", "bob", "joe", "kim", "max")
"""People in the hints of the ScienceQA-like questions."""
OPTION_LETTERS: tuple[str, ...] = ("A", "B", "C", "D", "E")

# What the questions, captions and hints of this package are made of.
_QUESTION_WORDS: tuple[str, ...] = (
    "?", ".", ",", ":", "(", ")", "'", "/", "-", ";", "!", '"',
    "is", "are", "there", "a", "an", "the", "what", "which", "who", "color", "how", "many", "where",
    "does", "do", "sign", "signs", "say", "says", "yes", "no", "object", "objects", "in", "on",
    "image", "picture", "of", "above", "below", "just", "closest", "to", "that", "larger",
    "smaller", "more", "than", "or", "and", "upper", "lower", "leftmost", "rightmost", "highest",
    "lowest", "number", "numbers", "word", "sum", "written", "thing", "owns", "stands", "at",
    "these", "describe", "person", "two",
)  # fmt: skip
# What evaluation harnesses and official scripts wrap around a question.
_PROMPT_WORDS: tuple[str, ...] = (
    "answer", "question", "using", "single", "phrase", "option", "options", "s", "letter", "from",
    "given", "choices", "directly", "please", "several", "following", "context", "hint", "n",
    "response", "your", "must", "be", "concise", "this", "briefly", "reference", "ocr", "token",
    "only", "correct", "select", "choose", "best", "based", "user", "assistant",
)  # fmt: skip
_LETTERS: tuple[str, ...] = tuple(string.ascii_lowercase)
_DIGITS: tuple[str, ...] = tuple(string.digits)


def plural(kind: str) -> str:
    """Plural of an object kind: "fish" stays, else with "s"."""
    return kind if kind == "fish" else kind + "s"


def _unique(words: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(words))


PLURALS: tuple[str, ...] = tuple(plural(kind) for kind in KINDS)
WORDS: tuple[str, ...] = _unique(
    (
        *SPECIALS,
        USER,
        ASSISTANT,
        *OPTION_LETTERS,
        *_LETTERS,
        *("##" + letter for letter in _LETTERS),
        *_DIGITS,
        *("##" + digit for digit in _DIGITS),
        *_QUESTION_WORDS,
        *_PROMPT_WORDS,
        *ROWS,
        *COLUMNS,
        *COLORS,
        *KINDS,
        *PLURALS,
        *NAMES,
    )
)
"""Token text by id. Ids are positions in this tuple; `<pad>` is 0."""

VOCAB_SIZE = 320
"""Rows of the embedding: the words plus a few rows no text reaches."""

ID: dict[str, int] = {word: index for index, word in enumerate(WORDS)}


def _first_letters() -> np.ndarray:
    """int32 [26, 26, 26]: which first letter keeps three letters from starting a known word."""
    starts = np.zeros((26, 26, 26), bool)
    for word in WORDS:
        code = [ord(letter) - ord("a") for letter in word]
        if len(word) < 2 or not all(0 <= c < 26 for c in code):
            continue
        starts[tuple(code[:3])] = True
    letters = np.broadcast_to(np.arange(26)[:, None, None], starts.shape).copy()
    while (bad := np.take_along_axis(starts, letters, axis=0)).any():
        letters = np.where(bad, (letters + 1) % 26, letters)
    return letters.astype(np.int32)


FIRST_LETTER: np.ndarray = _first_letters()
"""int32 [26, 26, 26]: the first letter to write instead, by the first three letters of a text.

Afterwards no known word of two or more letters is a prefix of the text, so word pieces spell it.
"""


def build_tokenizer() -> Any:
    """The `tokenizers.Tokenizer` of the world (word pieces over a closed vocabulary)."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
    )

    if len(WORDS) > VOCAB_SIZE:
        raise ValueError(f"{len(WORDS)} words do not fit VOCAB_SIZE={VOCAB_SIZE}")
    tokenizer = Tokenizer(models.WordPiece(vocab=dict(ID), unk_token=UNK))
    tokenizer.normalizer = normalizers.Lowercase()
    # Everything the pattern does not match (white space) is dropped; "user:" stays one piece.
    pattern = Regex(r"(?:user|assistant):|[a-z]+|[0-9]+|[^\sa-z0-9]")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern, behavior="removed", invert=True)
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, ID[BOS])]
    )
    tokenizer.add_special_tokens([AddedToken(word, normalized=False) for word in SPECIALS])
    # Found before lower-casing, where the letter stands alone: "A. red", but not "Answer".
    tokenizer.add_tokens(
        [AddedToken(letter, normalized=False, single_word=True) for letter in OPTION_LETTERS]
    )
    return tokenizer
