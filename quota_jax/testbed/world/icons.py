"""Icons of the world's objects: filled silhouettes with a layer of details, and a contour.

Details are windows, stems, wheels. The contour keeps occluded neighbors of one color apart, and the
held-out style draws little else.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

CANVAS = 512
"""Edge of an icon as drawn, in pixels; the atlas averages it down."""
_CONTOUR = 0.045
"""Width of the contour, in icon edges."""


class Pen:
    """Draws in unit coordinates (0..1, y down) on an alpha and a detail canvas."""

    def __init__(self) -> None:
        self.alpha = Image.new("L", (CANVAS, CANVAS), 0)
        self.detail = Image.new("L", (CANVAS, CANVAS), 0)
        self._alpha = ImageDraw.Draw(self.alpha)
        self._detail = ImageDraw.Draw(self.detail)

    def _scaled(self, points) -> list[tuple[float, float]]:
        return [(x * (CANVAS - 1), y * (CANVAS - 1)) for x, y in points]

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


def draw_icon(kind: str, pen: Pen) -> None:
    """Draws one kind; every shape fills most of the unit square."""
    if kind == "car":
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
    elif kind == "house":
        pen.polygon((0.5, 0.04), (0.98, 0.47), (0.02, 0.47))
        pen.box(0.13, 0.45, 0.87, 0.95)
        pen.box(0.42, 0.62, 0.6, 0.95, detail=True)
        pen.box(0.2, 0.55, 0.35, 0.72, detail=True)
        pen.box(0.67, 0.55, 0.8, 0.72, detail=True)
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
        pen.disc(0.25, 0.5, 0.25)
        pen.disc(0.25, 0.5, 0.1, fill=0)
        pen.box(0.44, 0.41, 0.98, 0.59)
        pen.box(0.66, 0.5, 0.78, 0.82)
        pen.box(0.86, 0.5, 0.98, 0.88)
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
    elif kind == "star":
        pen.polygon(*_star_points(5, 0.21))
    elif kind == "heart":
        pen.polygon(*_heart_points())
    elif kind == "moon":
        pen.disc(0.5, 0.5, 0.46)
        pen.disc(0.72, 0.4, 0.38, fill=0)
    elif kind == "arrow":
        pen.polygon(
            (0.02, 0.38), (0.52, 0.38), (0.52, 0.14), (0.98, 0.5),
            (0.52, 0.86), (0.52, 0.62), (0.02, 0.62),
        )  # fmt: skip
    elif kind == "apple":
        pen.disc(0.34, 0.6, 0.29, 0.35)
        pen.disc(0.66, 0.6, 0.29, 0.35)
        pen.polygon((0.47, 0.36), (0.52, 0.08), (0.6, 0.1), (0.55, 0.36))
        pen.polygon((0.47, 0.36), (0.52, 0.08), (0.6, 0.1), (0.55, 0.36), detail=True)
        pen.disc(0.76, 0.17, 0.17, 0.09)
        pen.disc(0.76, 0.17, 0.17, 0.09, detail=True)
    elif kind == "chair":
        pen.box(0.2, 0.02, 0.34, 0.98)
        pen.box(0.2, 0.48, 0.84, 0.63)
        pen.box(0.7, 0.6, 0.84, 0.98)
        pen.box(0.2, 0.48, 0.84, 0.56, detail=True)
    elif kind == "ladder":
        pen.box(0.22, 0.02, 0.35, 0.98)
        pen.box(0.65, 0.02, 0.78, 0.98)
        for y in (0.13, 0.36, 0.59, 0.82):
            pen.box(0.22, y, 0.78, y + 0.1)
    elif kind == "lamp":
        pen.polygon((0.34, 0.04), (0.66, 0.04), (0.9, 0.5), (0.1, 0.5))
        pen.box(0.45, 0.48, 0.55, 0.86)
        pen.box(0.24, 0.84, 0.76, 0.96)
        pen.box(0.45, 0.5, 0.55, 0.86, detail=True)
        pen.box(0.24, 0.84, 0.76, 0.96, detail=True)
    elif kind == "clock":
        pen.disc(0.5, 0.5, 0.47)
        pen.disc(0.5, 0.5, 0.36, detail=True)
        pen.disc(0.5, 0.5, 0.29, fill=0, detail=True)
        pen.box(0.46, 0.24, 0.54, 0.54, detail=True)
        pen.box(0.46, 0.47, 0.7, 0.55, detail=True)
    elif kind == "hat":
        pen.box(0.26, 0.16, 0.74, 0.72)
        pen.disc(0.5, 0.74, 0.49, 0.13)
        pen.box(0.26, 0.52, 0.74, 0.64, detail=True)
    elif kind == "hammer":
        pen.box(0.43, 0.2, 0.57, 0.98)
        pen.box(0.43, 0.34, 0.57, 0.98, detail=True)
        pen.box(0.1, 0.04, 0.72, 0.34)
        pen.polygon((0.72, 0.04), (0.99, 0.3), (0.93, 0.4), (0.7, 0.26))
    elif kind == "plane":
        pen.disc(0.5, 0.5, 0.1, 0.48)
        pen.polygon((0.5, 0.3), (0.99, 0.62), (0.99, 0.72), (0.5, 0.56), (0.01, 0.72), (0.01, 0.62))
        pen.polygon((0.5, 0.78), (0.74, 0.92), (0.74, 0.98), (0.26, 0.98), (0.26, 0.92))
        pen.disc(0.5, 0.14, 0.05, 0.08, detail=True)
    elif kind == "cat":
        pen.polygon((0.1, 0.04), (0.44, 0.24), (0.1, 0.6))
        pen.polygon((0.9, 0.04), (0.56, 0.24), (0.9, 0.6))
        pen.disc(0.5, 0.58, 0.42, 0.38)
        pen.disc(0.34, 0.52, 0.075, 0.1, detail=True)
        pen.disc(0.66, 0.52, 0.075, 0.1, detail=True)
        pen.polygon((0.42, 0.68), (0.58, 0.68), (0.5, 0.8), detail=True)
    elif kind == "rocket":
        pen.polygon((0.5, 0.01), (0.68, 0.28), (0.68, 0.8), (0.32, 0.8), (0.32, 0.28))
        pen.polygon((0.32, 0.5), (0.32, 0.84), (0.1, 0.98), (0.1, 0.74))
        pen.polygon((0.68, 0.5), (0.68, 0.84), (0.9, 0.98), (0.9, 0.74))
        pen.polygon((0.38, 0.8), (0.62, 0.8), (0.5, 0.99), detail=True)
        pen.polygon((0.38, 0.8), (0.62, 0.8), (0.5, 0.99))
        pen.disc(0.5, 0.38, 0.1, detail=True)
    elif kind == "table":
        pen.box(0.02, 0.24, 0.98, 0.42)
        pen.box(0.1, 0.4, 0.24, 0.9)
        pen.box(0.76, 0.4, 0.9, 0.9)
        pen.box(0.02, 0.35, 0.98, 0.42, detail=True)
    elif kind == "tent":
        pen.polygon((0.5, 0.08), (0.99, 0.9), (0.01, 0.9))
        pen.polygon((0.5, 0.34), (0.7, 0.9), (0.3, 0.9), detail=True)
    else:
        raise ValueError(f"no drawing for kind {kind!r}")


def icon_layers(kind: str) -> tuple[Image.Image, Image.Image, Image.Image]:
    """Alpha, detail and contour of one kind, drawn large."""
    pen = Pen()
    draw_icon(kind, pen)
    blurred = np.asarray(pen.alpha.filter(ImageFilter.BoxBlur(_CONTOUR * CANVAS)), np.int32)
    alpha = np.asarray(pen.alpha, np.int32)
    contour = np.where((alpha > 127) & (blurred < 242), 255, 0).astype(np.uint8)
    return pen.alpha, pen.detail, Image.fromarray(contour)
