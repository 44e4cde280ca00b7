"""Icons and letters of the world as texture atlases, drawn once with Pillow.

Both are drawn large and box-averaged down, at three resolutions, so that nearest look-up at any
drawn size sees about one texel per pixel.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from quota_jax.testbed.world.icons import CANVAS, icon_layers
from quota_jax.testbed.world.letters import FONTS, GLYPH_ASPECT, GLYPHS, draw_glyph
from quota_jax.testbed.world.vocabulary import KINDS

__all__ = ["FONTS", "GLYPHS", "GLYPH_ASPECT", "GLYPH_HEIGHTS", "ICON_SIZES", "Atlas", "atlas"]

ICON_SIZES: tuple[int, ...] = (128, 64, 32)
GLYPH_HEIGHTS: tuple[int, ...] = (48, 24, 16)


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
    drawn = [icon_layers(kind) for kind in KINDS]
    icons, icon_offsets, total = [], [], 0
    for size in ICON_SIZES:
        icon_offsets.append(total)
        for layers in drawn:
            small = (np.asarray(layer.reduce(CANVAS // size), np.int32) for layer in layers)
            alpha, detail, contour = small
            icons.append((alpha + 256 * detail + 65536 * contour).reshape(-1))
            total += size * size
    glyphs, glyph_offsets, total = [], [], 0
    for height in GLYPH_HEIGHTS:
        glyph_offsets.append(total)
        for font in range(FONTS):
            for character in GLYPHS:
                coverage = draw_glyph(character, height, font)
                glyphs.append(coverage.reshape(-1))
                total += coverage.size
    return Atlas(
        icons=np.concatenate(icons),
        icon_offsets=tuple(icon_offsets),
        glyphs=np.concatenate(glyphs),
        glyph_offsets=tuple(glyph_offsets),
    )
