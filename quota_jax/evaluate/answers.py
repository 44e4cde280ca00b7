"""What a model's text says: rules shared by the tasks.

Each public rule is that of one scorer, quirks included, so that its numbers can be compared with
published ones: lmms-eval 0.7.3, or the script that came with the benchmark. Texts of TextVQA have
`quota_jax.evaluate.vqa_text`.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence

LETTERS = string.ascii_uppercase


def without_punctuation(text: str) -> str:
    """Lower case without ASCII punctuation; blanks stay ("a cat ." keeps the last one)."""
    return text.lower().translate(str.maketrans("", "", string.punctuation))


# Yes or no


def pope_official_yes_no(answer: str) -> str:
    """POPE's own script: "no" where the first sentence has the word No, no or not, else "yes"."""
    sentence = answer.split(".")[0].replace(",", "")
    return "no" if {"No", "no", "not"} & set(sentence.split(" ")) else "yes"


def mme_yes_no(answer: str) -> str:
    """lmms-eval: "yes", "no" or "other"; full stops are dropped and "y", "n" accepted."""
    text = answer.lower().strip().replace(".", "")
    if len(text) == 1:
        return {"y": "yes", "n": "no"}.get(text, "other")
    return _leading_yes_no(text)


def mme_official_yes_no(answer: str) -> str:
    """MME's own script: "yes", "no" or "other" by the first four characters."""
    return _leading_yes_no(answer.lower())


def _leading_yes_no(text: str) -> str:
    return next((word for word in ("yes", "no") if word in text[:4]), "other")


# One letter


def first_letter(answer: str) -> str:
    """lmms-eval for SEED-Bench: the first character that is not blank, lower case."""
    return answer.strip()[:1].lower()


def science_letter(answer: str) -> str:
    """lmms-eval for ScienceQA: a lone letter of either case, or a capital before a full stop."""
    text = answer.strip()
    if len(text) >= 2 and text[0].isupper() and text[1] == ".":
        return text[0]
    return text.upper()


def science_official_letter(answer: str) -> str:
    """LLaVA's script for ScienceQA: "B", "B. ..." or one "The answer is B."; else ""."""
    if answer in set("ABCDE"):
        return answer
    if answer[:1] in set("ABCDE") and answer[1:3] == ". ":
        return answer[0]
    found = re.findall(r"The answer is ([A-Z]).", answer)
    return found[0] if len(found) == 1 else ""


# MMBench: letters and option texts inside sentences

_AROUND = [("", mark) for mark in (".", ",", ":", ")", ").")]
_AROUND += [("(", ")"), ("(", ").")]
_AROUND += [(":", mark) for mark in ("", ",", ".", ")", ").")]


def infer_letter(answer: str) -> str:
    """MMBench's first rule: the one letter that stands alone among the words, "" if there is none.

    A to E count, bare or, failing that, with punctuation around them, one form after another. A
    bare "A" among more than three words may be an article: then only those forms count.
    """
    if "Failed to obtain answer via API" in answer:
        return ""
    words = answer.split()
    bare = [letter for letter in "ABCDE" if letter in words]
    if len(bare) == 1 and not ("A" in words and len(words) > 3):
        return bare[0]
    for before, after in _AROUND:
        found = [letter for letter in "ABCDE" if before + letter + after in words]
        if len(found) == 1:
            return found[0]
    return ""


def infer_option(answer: str, options: Mapping[str, str]) -> str:
    """MMBench's two rules without a judge: `infer_letter`, else the letter of the only option whose
    text occurs in the answer (case aside), else ""."""
    if letter := infer_letter(answer):
        return letter
    text = answer.lower()
    found = [letter for letter, option in options.items() if option.lower() in text]
    return found[0] if len(found) == 1 else ""


# English phrases after which lmms-eval looks for a letter; it has a few in other languages too.
_PHRASES = [
    *(f"{start} is" for start in ("the answer", "answer", "the choice", "choice", "my answer")),
    *(
        f"{start}{quality} {noun} is"
        for quality in ("correct", "best")
        for noun in ("answer", "option")
        for start in ("the ", "")
    ),
    "the correct choice is",
    "correct choice is",
    "my choice is",
    *(f"i {verb}" for verb in ("choose", "select", "pick")),
    *("옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"),
]
_MARKS = ",.!?;:'\""
# (rank, text before the letter, text after it); the highest rank found wins.
_FORMS = [(6, "(", ")"), (5, "", "."), (4, "", ":"), (3, "", ")"), (2, "", " ")]
_START, _END, _PHRASE = 10, 9, 7


def search_letter(answer: str, letters: Sequence[str]) -> str:
    """lmms-eval's fallback where no judge is at hand: the best-placed letter, "" if there is none.

    In falling order: a letter at the start of the text, at its end, after a phrase such as "the
    answer is", as (B), B., B:, B) or B and a blank, and only where there is none of these anywhere.
    Equal ranks: the last place wins. No word boundary is asked for except at start and end.
    """
    text = answer.strip()
    for mark in _MARKS:
        text = text.strip(mark)
    bare = text.strip()
    if not bare:
        return ""
    text = f" {text} "
    lower = text.lower()
    found: list[tuple[int, int, str]] = []
    for rank, before, after in _FORMS:
        places = [(text.rfind(before + letter + after), letter) for letter in letters]
        found += [(rank, place, letter) for place, letter in places if place >= 0]
    for phrase in _PHRASES:
        if (start := lower.find(phrase)) >= 0:
            places = [(text.find(letter, start + len(phrase)), letter) for letter in letters]
            found += [(_PHRASE, place, letter) for place, letter in places if place >= 0]
    for letter in letters:
        if bare[0] == letter and not bare[1:2].isalpha():
            found.append((_START, 0, letter))
        if bare[-1] == letter and not bare[-2:-1].isalpha():
            found.append((_END, len(text) - 1, letter))
    if not found:
        places = [(text.rfind(letter), letter) for letter in letters]
        found = [(0, place, letter) for place, letter in places if place >= 0]
    # Of equals the first one found stays ahead, as in a stable sort.
    return max(found, key=lambda each: each[:2])[2] if found else ""
