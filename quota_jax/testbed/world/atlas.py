"""Icons and letters of the world as texture atlases, drawn once with Pillow.

The drawing pen, most icons and the letters' strokes are those of `quota_jax.testbed.atlas`; here
come a dozen more icons, a contour per icon (occluded neighbors of one color stay apart, and the
held-out style draws little else) and a second typeface, slanted and thin, for the held-out style.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from quota_jax.testbed.atlas import _CANVAS, _STROKES, GLYPH_ASPECT, GLYPHS, _draw_icon, _Pen
from quota_jax.testbed.world.vocabulary import KINDS

__all__ = ["FONTS", "GLYPHS", "GLYPH_ASPECT", "GLYPH_HEIGHTS", "ICON_SIZES", "Atlas", "atlas"]

ICON_SIZES: tuple[int, ...] = (128, 64, 32)
GLYPH_HEIGHTS: tuple[int, ...] = (48, 24, 16)
FONTS = 2
"""Typefaces: 0 upright and bold, 1 slanted and thin (held out)."""
_PEN_WIDTH = (0.95, 0.62)
_SLANT = (0.0, 0.24)
_CONTOUR = 0.045
"""Width of the contour, in icon edges."""


def _draw_new_icon(kind: str, pen: _Pen) -> None:
    if kind == "apple":
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
    elif kind == "key":
        pen.disc(0.25, 0.5, 0.25)
        pen.disc(0.25, 0.5, 0.1, fill=0)
        pen.box(0.44, 0.41, 0.98, 0.59)
        pen.box(0.66, 0.5, 0.78, 0.82)
        pen.box(0.86, 0.5, 0.98, 0.88)
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
        _draw_icon(kind, pen)


def _icon(kind: str) -> tuple[Image.Image, Image.Image, Image.Image]:
    """Alpha, detail and contour of one kind, drawn large."""
    pen = _Pen()
    _draw_new_icon(kind, pen)
    blurred = np.asarray(pen.alpha.filter(ImageFilter.BoxBlur(_CONTOUR * _CANVAS)), np.int32)
    alpha = np.asarray(pen.alpha, np.int32)
    contour = np.where((alpha > 127) & (blurred < 242), 255, 0).astype(np.uint8)
    return pen.alpha, pen.detail, Image.fromarray(contour)


def _glyph(character: str, height: int, font: int) -> np.ndarray:
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Atlas:
    """Flat texture tables.

    icons: int32, value = alpha + 256 * detail + 65536 * contour (each 0..255); level l of kind k
        starts at icon_offsets[l] + k * ICON_SIZES[l]**2, rows top to bottom.
    glyphs: uint8 coverage; level l of glyph g in font f starts at
        glyph_offsets[l] + (f * len(GLYPHS) + g) * height * width.
    """

    icons: np.ndarray
    icon_offsets: tuple[int, ...]
    glyphs: np.ndarray
    glyph_offsets: tuple[int, ...]


@functools.cache
def atlas() -> Atlas:
    """The atlases, drawn once per process."""
    drawn = [_icon(kind) for kind in KINDS]
    icons, icon_offsets, total = [], [], 0
    for size in ICON_SIZES:
        icon_offsets.append(total)
        for layers in drawn:
            small = (np.asarray(layer.reduce(_CANVAS // size), np.int32) for layer in layers)
            alpha, detail, contour = small
            icons.append((alpha + 256 * detail + 65536 * contour).reshape(-1))
            total += size * size
    glyphs, glyph_offsets, total = [], [], 0
    for height in GLYPH_HEIGHTS:
        glyph_offsets.append(total)
        for font in range(FONTS):
            for character in GLYPHS:
                coverage = _glyph(character, height, font)
                glyphs.append(coverage.reshape(-1))
                total += coverage.size
    return Atlas(
        icons=np.concatenate(icons),
        icon_offsets=tuple(icon_offsets),
        glyphs=np.concatenate(glyphs),
        glyph_offsets=tuple(glyph_offsets),
    )
