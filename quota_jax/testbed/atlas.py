"""Icons and letters of the drawn scenes as small texture atlases, drawn once with Pillow.

Icons are filled silhouettes with a second "detail" layer (windows, stems, wheels). Letters are
thick polylines on a 4 x 6 grid, so no font file is needed. Both are drawn large and box-averaged
down, at three resolutions, so that nearest look-up at any drawn size sees about one texel per
pixel.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from quota_jax.testbed.vocabulary import KINDS

ICON_SIZES: tuple[int, ...] = (128, 64, 32)
GLYPHS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
GLYPH_HEIGHTS: tuple[int, ...] = (48, 24, 16)
GLYPH_ASPECT = 0.75
"""Width of a letter cell over its height."""

_CANVAS = 512


class _Pen:
    """Draws in unit coordinates (0..1, y down) on an alpha and a detail canvas."""

    def __init__(self) -> None:
        self.alpha = Image.new("L", (_CANVAS, _CANVAS), 0)
        self.detail = Image.new("L", (_CANVAS, _CANVAS), 0)
        self._alpha = ImageDraw.Draw(self.alpha)
        self._detail = ImageDraw.Draw(self.detail)

    def _scaled(self, points) -> list[tuple[float, float]]:
        return [(x * (_CANVAS - 1), y * (_CANVAS - 1)) for x, y in points]

    def polygon(self, *points, fill: int = 255, detail: bool = False) -> None:
        (self._detail if detail else self._alpha).polygon(self._scaled(points), fill=fill)

    def box(self, x0, y0, x1, y1, fill: int = 255, detail: bool = False) -> None:
        self.polygon((x0, y0), (x1, y0), (x1, y1), (x0, y1), fill=fill, detail=detail)

    def disc(self, x, y, rx, ry=None, fill: int = 255, detail: bool = False) -> None:
        ry = rx if ry is None else ry
        corners = self._scaled([(x - rx, y - ry), (x + rx, y + ry)])
        (self._detail if detail else self._alpha).ellipse(corners, fill=fill)

    def half_disc(self, x, y, rx, ry, *, lower: bool, fill: int = 255) -> None:
        corners = self._scaled([(x - rx, y - ry), (x + rx, y + ry)])
        start = 0 if lower else 180
        self._alpha.pieslice(corners, start, start + 180, fill=fill)


def _star_points(spikes: int, inner: float) -> list[tuple[float, float]]:
    points = []
    for i in range(2 * spikes):
        radius = 0.5 if i % 2 == 0 else inner
        angle = math.pi * i / spikes - math.pi / 2
        points.append((0.5 + radius * math.cos(angle), 0.53 + radius * math.sin(angle)))
    return points


def _heart_points() -> list[tuple[float, float]]:
    points = []
    for i in range(120):
        t = 2 * math.pi * i / 120
        x = 16 * math.sin(t) ** 3
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((0.5 + x / 36, 0.46 - y / 36))
    return points


def _draw_icon(kind: str, pen: _Pen) -> None:
    """Draw one kind; every shape fills most of the unit square."""
    if kind == "circle":
        pen.disc(0.5, 0.5, 0.46)
    elif kind == "square":
        pen.box(0.11, 0.11, 0.89, 0.89)
    elif kind == "triangle":
        pen.polygon((0.5, 0.06), (0.96, 0.88), (0.04, 0.88))
    elif kind == "star":
        pen.polygon(*_star_points(5, 0.21))
    elif kind == "heart":
        pen.polygon(*_heart_points())
    elif kind == "cross":
        pen.box(0.36, 0.05, 0.64, 0.95)
        pen.box(0.05, 0.36, 0.95, 0.64)
    elif kind == "arrow":
        pen.polygon(
            (0.02, 0.38), (0.52, 0.38), (0.52, 0.14), (0.98, 0.5),
            (0.52, 0.86), (0.52, 0.62), (0.02, 0.62),
        )  # fmt: skip
    elif kind == "moon":
        pen.disc(0.5, 0.5, 0.46)
        pen.disc(0.72, 0.4, 0.38, fill=0)
    elif kind == "ring":
        pen.disc(0.5, 0.5, 0.46)
        pen.disc(0.5, 0.5, 0.26, fill=0)
    elif kind == "diamond":
        pen.polygon((0.5, 0.02), (0.8, 0.5), (0.5, 0.98), (0.2, 0.5))
    elif kind == "house":
        pen.polygon((0.5, 0.04), (0.98, 0.47), (0.02, 0.47))
        pen.box(0.13, 0.45, 0.87, 0.95)
        pen.box(0.42, 0.62, 0.6, 0.95, detail=True)
        pen.box(0.2, 0.55, 0.35, 0.72, detail=True)
        pen.box(0.67, 0.55, 0.8, 0.72, detail=True)
    elif kind == "car":
        pen.polygon((0.25, 0.26), (0.66, 0.26), (0.82, 0.5), (0.14, 0.5))
        pen.box(0.02, 0.48, 0.98, 0.7)
        for x in (0.25, 0.75):
            pen.disc(x, 0.71, 0.14)
            pen.disc(x, 0.71, 0.14, detail=True)
        pen.polygon((0.29, 0.32), (0.44, 0.32), (0.44, 0.47), (0.22, 0.47), detail=True)
        pen.polygon((0.5, 0.32), (0.63, 0.32), (0.73, 0.47), (0.5, 0.47), detail=True)
    elif kind == "tree":
        pen.polygon((0.5, 0.02), (0.76, 0.34), (0.24, 0.34))
        pen.polygon((0.5, 0.18), (0.86, 0.58), (0.14, 0.58))
        pen.polygon((0.5, 0.36), (0.95, 0.8), (0.05, 0.8))
        pen.box(0.42, 0.8, 0.58, 0.98)
        pen.box(0.42, 0.8, 0.58, 0.98, detail=True)
    elif kind == "flower":
        for i in range(6):
            angle = math.pi * i / 3
            pen.disc(0.5 + 0.29 * math.cos(angle), 0.5 + 0.29 * math.sin(angle), 0.17)
        pen.disc(0.5, 0.5, 0.2)
        pen.disc(0.5, 0.5, 0.15, detail=True)
    elif kind == "fish":
        pen.disc(0.42, 0.5, 0.4, 0.25)
        pen.polygon((0.7, 0.5), (0.98, 0.24), (0.98, 0.76))
        pen.disc(0.2, 0.44, 0.055, detail=True)
    elif kind == "cup":
        pen.disc(0.72, 0.5, 0.25)
        pen.disc(0.72, 0.5, 0.14, fill=0)
        pen.polygon((0.08, 0.16), (0.74, 0.16), (0.68, 0.86), (0.14, 0.86))
        pen.box(0.1, 0.22, 0.72, 0.3, detail=True)
    elif kind == "key":
        pen.disc(0.25, 0.5, 0.23)
        pen.disc(0.25, 0.5, 0.1, fill=0)
        pen.box(0.44, 0.43, 0.98, 0.57)
        pen.box(0.7, 0.5, 0.8, 0.76)
        pen.box(0.88, 0.5, 0.98, 0.8)
    elif kind == "boat":
        pen.polygon((0.02, 0.66), (0.98, 0.66), (0.8, 0.92), (0.2, 0.92))
        pen.polygon((0.5, 0.05), (0.5, 0.6), (0.88, 0.6))
        pen.polygon((0.44, 0.14), (0.44, 0.6), (0.12, 0.6))
        pen.box(0.04, 0.66, 0.96, 0.73, detail=True)
    elif kind == "cloud":
        pen.disc(0.26, 0.58, 0.22)
        pen.disc(0.5, 0.42, 0.27)
        pen.disc(0.75, 0.57, 0.22)
        pen.box(0.24, 0.54, 0.77, 0.79)
    elif kind == "umbrella":
        pen.half_disc(0.5, 0.52, 0.48, 0.46, lower=False)
        pen.box(0.465, 0.5, 0.535, 0.86)
        pen.disc(0.4, 0.85, 0.135)
        pen.disc(0.4, 0.85, 0.065, fill=0)
        pen.box(0.26, 0.66, 0.46, 0.85, fill=0)
    elif kind == "mushroom":
        pen.half_disc(0.5, 0.53, 0.47, 0.47, lower=False)
        pen.box(0.36, 0.5, 0.64, 0.95)
        for x, y, r in ((0.3, 0.36, 0.08), (0.55, 0.24, 0.09), (0.73, 0.42, 0.07)):
            pen.disc(x, y, r, detail=True)
    elif kind == "bottle":
        pen.box(0.41, 0.02, 0.59, 0.3)
        pen.polygon(
            (0.41, 0.24), (0.59, 0.24), (0.73, 0.42), (0.73, 0.98), (0.27, 0.98), (0.27, 0.42)
        )
        pen.box(0.27, 0.55, 0.73, 0.8, detail=True)
    elif kind == "flag":
        pen.box(0.14, 0.03, 0.23, 0.98)
        pen.polygon((0.23, 0.07), (0.95, 0.07), (0.76, 0.31), (0.95, 0.56), (0.23, 0.56))
        pen.box(0.14, 0.03, 0.23, 0.98, detail=True)
    elif kind == "bell":
        pen.disc(0.5, 0.84, 0.11)
        pen.half_disc(0.5, 0.4, 0.29, 0.34, lower=False)
        pen.polygon((0.21, 0.39), (0.79, 0.39), (0.94, 0.78), (0.06, 0.78))
        pen.box(0.06, 0.72, 0.94, 0.78, detail=True)
    else:
        raise ValueError(f"no drawing for kind {kind!r}")


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


def _draw_glyph(character: str, height: int) -> np.ndarray:
    """uint8 [height, width] coverage of one letter, drawn 8 times larger and averaged down."""
    width = round(height * GLYPH_ASPECT)
    scale = 8
    image = Image.new("L", (width * scale, height * scale), 0)
    draw = ImageDraw.Draw(image)
    unit = height * scale / 7.6
    left = (width * scale - 4 * unit) / 2
    top = (height * scale - 6 * unit) / 2
    pen = round(unit * 0.95)
    for stroke in _STROKES[character].split("/"):
        grid = (map(float, point.split(",")) for point in stroke.split())
        points = [(left + x * unit, top + y * unit) for x, y in grid]
        draw.line(points, fill=255, width=pen)
        for x, y in points:
            draw.ellipse((x - pen / 2, y - pen / 2, x + pen / 2, y + pen / 2), fill=255)
    return np.asarray(image.reduce(scale))


@dataclass(frozen=True, kw_only=True, slots=True)
class Atlas:
    """Flat texture tables.

    icons: int32, value = 256 * alpha + detail (both 0..255); level l of kind k starts at
        icon_offsets[l] + k * ICON_SIZES[l]**2, rows top to bottom.
    glyphs: uint8 coverage; level l of glyph g starts at glyph_offsets[l] + g * height * width.
    """

    icons: np.ndarray
    icon_offsets: tuple[int, ...]
    glyphs: np.ndarray
    glyph_offsets: tuple[int, ...]


@functools.cache
def atlas() -> Atlas:
    """The atlases, drawn once per process."""
    drawn = []
    for kind in KINDS:
        pen = _Pen()
        _draw_icon(kind, pen)
        drawn.append((pen.alpha, pen.detail))
    icons, icon_offsets, total = [], [], 0
    for size in ICON_SIZES:
        icon_offsets.append(total)
        for layers in drawn:
            alpha, detail = (np.asarray(x.reduce(_CANVAS // size), np.int32) for x in layers)
            icons.append((256 * alpha + detail).reshape(-1))
            total += size * size
    glyphs, glyph_offsets, total = [], [], 0
    for height in GLYPH_HEIGHTS:
        glyph_offsets.append(total)
        for character in GLYPHS:
            coverage = _draw_glyph(character, height)
            glyphs.append(coverage.reshape(-1))
            total += coverage.size
    return Atlas(
        icons=np.concatenate(icons),
        icon_offsets=tuple(icon_offsets),
        glyphs=np.concatenate(glyphs),
        glyph_offsets=tuple(glyph_offsets),
    )
