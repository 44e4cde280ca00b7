"""Text normalization of the VQA challenges (EvalAI), which TextVQA is scored with.

The rules are those of the public answer processor, oddities included: they decide what counts as
the same answer. Words that its tables hold but its earlier steps never let through are left out.
"""

from __future__ import annotations

import re

# Commas and question marks are gone before these are looked at.
_MARKS = ';/[]"{}()=+\\_-><@`!'
# The look-behind is the original's: it forbids the text "<=" and a digit before the full stop.
_FULL_STOP = re.compile(r"(?!<=\d)\.(?!\d)")
# A flag handed over in the place of a count: later full stops stay.
_MOST_FULL_STOPS = 32
_ARTICLES = {"a", "an", "the"}
_NUMBERS = "zero one two three four five six seven eight nine ten"
_DIGITS = {"none": "0"} | {word: str(value) for value, word in enumerate(_NUMBERS.split())}

_CONTRACTIONS = """
    ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd
    how'll how's isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock
    oughtn't shan't should've shouldn't someone'd someone'll someone's somebody'll somebody's
    something'd something'll that's there'd there're there's they'd they'll they're they've 'twas
    wasn't we've weren't what'll what're what's what've when's where'd where's where've who'd who'll
    who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've

    couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've
    someone'd've something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'll
    y'all'd've you'd've
"""
# A word that lacks one of its apostrophes -> the word, and two odd ones.
_SPELLINGS = {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTIONS.split()
    for place, character in enumerate(word)
    if character == "'"
} | {"somebody'd": "somebodyd", "'ows'at": "'ow's'at"}


def normalize_vqa(text: str) -> str:
    """Lower case; no articles or punctuation, numbers up to ten as digits, apostrophes restored."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    cleaned = text
    for mark in _MARKS:
        beside_blank = f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if beside_blank else " ")
    cleaned = _FULL_STOP.sub("", cleaned, count=_MOST_FULL_STOPS)
    words = [_DIGITS.get(word, word) for word in cleaned.lower().split()]
    return " ".join(_SPELLINGS.get(word, word) for word in words if word not in _ARTICLES)
