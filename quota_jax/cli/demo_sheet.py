"""The picture that ``quota-jax demo`` leaves: scenes, what the recipe kept of them, answers."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from quota_jax.testbed.evaluate import Answer

EDGE = 300
"""Longest side of a scene on the sheet, in pixels."""
TEXT_WIDTH = 640
WIDTH = 2 * (EDGE + 16) + TEXT_WIDTH + 32
FADE = 0.82
"""How much of a dropped token's color is gone."""
_RIGHT, _WRONG, _INK, _GREY = "#1a7f37", "#cf222e", "#1f2328", "#59636e"
_LINE = 22


def fade_dropped(image: Image.Image, kept: np.ndarray) -> Image.Image:
    """The picture with the cells of dropped tokens (``kept`` False) faded to light grey."""
    pixels = np.asarray(image.convert("RGB"), np.float32)
    rows, columns = kept.shape
    ys = np.arange(pixels.shape[0]) * rows // pixels.shape[0]
    xs = np.arange(pixels.shape[1]) * columns // pixels.shape[1]
    grey = 0.5 * pixels.mean(-1, keepdims=True) + 120
    faded = np.where(kept[ys][:, xs, None], pixels, pixels + FADE * (grey - pixels))
    return Image.fromarray(np.clip(faded, 0, 255).astype(np.uint8))


def draw_sheet(
    path: Path, title: str, labels: Sequence[str], columns: Sequence[Sequence[Answer]]
) -> None:
    """Writes the sheet.

    Args:
        labels: names of the two models.
        columns: their answers to the same questions; the last one's show what was kept, for the
            first question about each picture.
    """
    rows: dict[int, list[tuple[Answer, ...]]] = {}
    for answers in zip(*columns, strict=True):
        rows.setdefault(answers[0].item.picture, []).append(answers)
    blocks = [_block(labels, asked) for asked in rows.values()]
    head = 40
    sheet = Image.new("RGB", (WIDTH, head + sum(block.height for block in blocks)), "white")
    ImageDraw.Draw(sheet).text((16, 12), title, _INK, ImageFont.load_default(18))
    top = head
    for block in blocks:
        sheet.paste(block, (0, top))
        top += block.height
    sheet.save(path)


def _block(labels: Sequence[str], asked: Sequence[tuple[Answer, ...]]) -> Image.Image:
    """One scene: the picture, what was kept of it, and everything that was asked about it."""
    pruned = asked[0][-1]
    item, kept = pruned.item, pruned.kept
    scale = EDGE / max(item.image.size)
    size = (round(item.image.width * scale), round(item.image.height * scale))
    lines = [_question_lines(labels, answers) for answers in asked]
    caption = textwrap.wrap(
        f"{kept.sum()} of {kept.size} visual tokens kept for the first question", 46
    )
    left = size[1] + 18 * len(caption) + 24
    height = max(left, _LINE * sum(map(len, lines)) + 10 * len(lines)) + 20
    block = Image.new("RGB", (WIDTH, height), "white")
    pen = ImageDraw.Draw(block)
    pen.line((16, 0, WIDTH - 16, 0), "#d1d9e0")
    block.paste(item.image.resize(size), (16, 12))
    block.paste(fade_dropped(item.image, kept).resize(size), (32 + EDGE, 12))
    small, font = ImageFont.load_default(13), ImageFont.load_default(15)
    for number, line in enumerate(caption):
        pen.text((32 + EDGE, size[1] + 18 + 18 * number), line, _GREY, small)
    top = 12
    for question in lines:
        for text, color, indent in question:
            pen.text((2 * (EDGE + 16) + 24 + indent, top), text, color, font)
            top += _LINE
        top += 10
    return block


def _question_lines(labels: Sequence[str], answers: Sequence[Answer]) -> list[tuple[str, str, int]]:
    """Lines of one question: text, color, indentation."""
    item = answers[0].item
    asked = textwrap.wrap(f"{item.question}  ({item.answer})", 76)
    lines = [(line, _INK, 0) for line in asked]
    for label, answer in zip(labels, answers, strict=True):
        shown = f"{label}: {answer.text.strip() or 'nothing'}"
        right = answer.correct
        lines.append((shown if right else f"{shown}  (wrong)", _RIGHT if right else _WRONG, 20))
    return lines
