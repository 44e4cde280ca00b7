"""Letters of the world: thick polylines on a grid, so that no font file is needed.

Two typefaces: upright and bold, and one slanted and thin for the held-out style.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

GLYPHS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
GLYPH_ASPECT = 0.75
"""Width of a letter cell over its height."""
FONTS = 2
"""Typefaces: 0 upright and bold, 1 slanted and thin (held out)."""
_PEN_WIDTH = (0.95, 0.62)
_SLANT = (0.0, 0.24)

# Polylines of each letter on a grid of 4 (x) by 6 (y) units, y down; "/" lifts the pen.
_STROKES: dict[str, str] = {
    "A": "0,6 2,0 4,6 / 0.8,4 3.2,4",
    "B": "0,0 0,6 3,6 4,5.2 4,3.8 3,3 0,3 / 0,0 2.8,0 3.6,0.8 3.6,2.2 2.8,3",
    "C": "4,1 3,0 1,0 0,1 0,5 1,6 3,6 4,5",
    "D": "0,0 0,6 2.4,6 4,4.4 4,1.6 2.4,0 0,0",
    "E": "4,0 0,0 0,6 4,6 / 0,3 3,3",
    "F": "4,0 0,0 0,6 / 0,3 3,3",
    "G": "4,1 3,0 1,0 0,1 0,5 1,6 3,6 4,5 4,3.2 2.4,3.2",
    "H": "0,0 0,6 / 4,0 4,6 / 0,3 4,3",
    "I": "2,0 2,6 / 0.8,0 3.2,0 / 0.8,6 3.2,6",
    "J": "3.6,0 3.6,5 2.6,6 1,6 0,5",
    "K": "0,0 0,6 / 4,0 0,3.4 / 1.3,2.4 4,6",
    "L": "0,0 0,6 4,6",
    "M": "0,6 0,0 2,3.4 4,0 4,6",
    "N": "0,6 0,0 4,6 4,0",
    "O": "1.2,0 2.8,0 4,1.2 4,4.8 2.8,6 1.2,6 0,4.8 0,1.2 1.2,0",
    "P": "0,6 0,0 3,0 4,0.9 4,2.3 3,3.2 0,3.2",
    "Q": "1.2,0 2.8,0 4,1.2 4,4.8 2.8,6 1.2,6 0,4.8 0,1.2 1.2,0 / 2.2,4 4,6.2",
    "R": "0,6 0,0 3,0 4,0.9 4,2.3 3,3.2 0,3.2 / 1.8,3.2 4,6",
    "S": "4,0.9 3,0 1,0 0,0.9 0,2.1 1,3 3,3 4,3.9 4,5.1 3,6 1,6 0,5.1",
    "T": "0,0 4,0 / 2,0 2,6",
    "U": "0,0 0,5 1,6 3,6 4,5 4,0",
    "V": "0,0 2,6 4,0",
    "W": "0,0 1,6 2,2.6 3,6 4,0",
    "X": "0,0 4,6 / 4,0 0,6",
    "Y": "0,0 2,3 4,0 / 2,3 2,6",
    "Z": "0,0 4,0 0,6 4,6",
    "0": "1.2,0 2.8,0 4,1.2 4,4.8 2.8,6 1.2,6 0,4.8 0,1.2 1.2,0 / 3.2,1.2 0.8,4.8",
    "1": "0.8,1.4 2.2,0 2.2,6 / 0.8,6 3.6,6",
    "2": "0,1.2 1,0 3,0 4,1 4,2.2 0,6 4,6",
    "3": "0,0 4,0 1.8,2.5 3,2.5 4,3.5 4,5 3,6 1,6 0,5",
    "4": "3,6 3,0 0,4.2 4,4.2",
    "5": "4,0 0.4,0 0.2,2.6 2.8,2.4 4,3.4 4,5 3,6 1,6 0,5.2",
    "6": "3.4,0 1.4,0.6 0,3 0,5 1,6 3,6 4,5 4,3.8 3,2.9 1,2.9 0,3.8",
    "7": "0,0 4,0 1.4,6",
    "8": (
        "1,2.9 0.2,2 0.2,0.9 1.1,0 2.9,0 3.8,0.9 3.8,2 3,2.9 1,2.9 0,3.8 0,5 1,6 3,6 4,5 4,3.8 "
        "3,2.9"
    ),
    "9": "4,2.2 3,3.1 1,3.1 0,2.2 0,1 1,0 3,0 4,1 4,3 2.6,5.4 0.6,6",
}


def draw_glyph(character: str, height: int, font: int) -> np.ndarray:
    """uint8 [height, width] coverage of one letter, drawn 8 times larger and averaged down."""
    width = round(height * GLYPH_ASPECT)
    scale = 8
    image = Image.new("L", (width * scale, height * scale), 0)
    draw = ImageDraw.Draw(image)
    unit = height * scale / 7.6
    left, top = (width * scale - 4 * unit) / 2, (height * scale - 6 * unit) / 2
    pen = round(unit * _PEN_WIDTH[font])
    for stroke in _STROKES[character].split("/"):
        points = []
        for point in stroke.split():
            x, y = map(float, point.split(","))
            # The slant narrows the letter too, so that it stays inside its cell.
            x = 2 + (x - 2) * (1 - _SLANT[font] * 0.6) + _SLANT[font] * (3 - y) * 0.6
            points.append((left + x * unit, top + y * unit))
        draw.line(points, fill=255, width=pen)
        for x, y in points:
            draw.ellipse((x - pen / 2, y - pen / 2, x + pen / 2, y + pen / 2), fill=255)
    return np.asarray(image.reduce(scale))
