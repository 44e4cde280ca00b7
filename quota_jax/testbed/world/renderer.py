"""Draws world scenes into pictures of any size, and says what lies under each visual patch.

The only renderer of the world: inside the jitted training step and on a CPU alike. Icons and
letters are looked up in the atlases by the inverse map (pixel -> texture), composited in slot
order, largest object first.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, UInt8

from quota_jax.testbed.world.atlas import GLYPH_ASPECT, GLYPH_HEIGHTS, GLYPHS, ICON_SIZES, atlas
from quota_jax.testbed.world.layout import (
    HELD_OUT,
    IMAGE_SIZE,
    MAX_LETTERS,
    MAX_OBJECTS,
    MAX_SIGNS,
    NUM_BLOBS,
    NUM_STROKES,
    Layout,
    sign_half_extent,
)
from quota_jax.testbed.world.vocabulary import COLORS, KINDS

PATCH = 14
KIND_NONE, KIND_SIGN = len(KINDS), len(KINDS) + 1
COLOR_NONE = len(COLORS)

PALETTES = np.array(
    [
        [
            (0.86, 0.08, 0.10), (1.00, 0.53, 0.04), (0.98, 0.88, 0.10), (0.08, 0.60, 0.18),
            (0.10, 0.28, 0.92), (0.52, 0.12, 0.72), (1.00, 0.58, 0.76), (0.42, 0.22, 0.08),
            (0.05, 0.05, 0.06), (0.98, 0.98, 0.98),
        ],
        [
            (0.74, 0.14, 0.20), (0.93, 0.58, 0.22), (0.90, 0.84, 0.30), (0.20, 0.52, 0.30),
            (0.22, 0.38, 0.78), (0.46, 0.24, 0.62), (0.92, 0.66, 0.80), (0.48, 0.32, 0.18),
            (0.14, 0.14, 0.16), (0.92, 0.92, 0.90),
        ],
    ],
    np.float32,
)  # fmt: skip
"""RGB in 0..1 of each color [2, 10, 3]: of the training styles, and of the held-out style."""
_DARK = PALETTES.sum(-1, keepdims=True) < 0.7
DETAILS = np.where(_DARK, 0.45, 0.38 * PALETTES).astype(np.float32)
"""RGB of an icon's details and contour: darker than the object, but lighter on black."""
_LIGHT_PANEL = (PALETTES @ np.array([0.299, 0.587, 0.114], np.float32)) > 0.45
_GRAY = 0.55
"""What the low-contrast style fades to."""


def _column(values: Any, rank: int) -> Any:
    """[B] -> [B, 1, ...] with `rank` trailing axes."""
    return values.reshape(values.shape[0], *(1,) * rank)


def _turned(x: Any, y: Any, angle: Any, xx: Any, yy: Any) -> tuple[Any, Any]:
    """Points in the coordinates of something at x, y turned by angle; both [B, *points]."""
    rank = xx.ndim
    cos, sin = _column(jnp.cos(angle), rank), _column(jnp.sin(angle), rank)
    dx, dy = xx - _column(x, rank), yy - _column(y, rank)
    return dx * cos + dy * sin, dy * cos - dx * sin


def _icon_layers(layout: Layout, index: int, xx: Any, yy: Any) -> tuple[Any, Any, Any, Any]:
    """Alpha, detail, contour (0..1) and hatching of object slot `index` at points, [B, *points]."""
    rank = xx.ndim
    table = atlas()
    size = layout.size[:, index]
    u, v = _turned(layout.x[:, index], layout.y[:, index], layout.angle[:, index], xx, yy)
    scale = _column(jnp.where(layout.present[:, index], 1 / jnp.maximum(size, 1), 0), rank)
    u, v = u * scale, v * scale
    inside = (jnp.abs(u) < 0.5) & (jnp.abs(v) < 0.5) & (scale > 0)
    level = (size <= ICON_SIZES[1]).astype(jnp.int32) + (size <= ICON_SIZES[2])
    resolution = jnp.asarray(ICON_SIZES, jnp.int32)[level]
    start = jnp.asarray(table.icon_offsets, jnp.int32)[level]
    start = start + layout.kind[:, index] * resolution**2
    resolution = _column(resolution, rank)
    column = jnp.clip(((u + 0.5) * resolution).astype(jnp.int32), 0, resolution - 1)
    row = jnp.clip(((v + 0.5) * resolution).astype(jnp.int32), 0, resolution - 1)
    texel = jnp.asarray(table.icons)[_column(start, rank) + row * resolution + column]
    texel = jnp.where(inside, texel, 0)
    # Hatching runs diagonally in the icon, about 4 pixels apart at any size.
    period = 4 * scale
    hatch = (((u + v) / jnp.maximum(period, 1e-6)) % 1 < 0.5).astype(jnp.float32)
    part = (1 / 255) * (texel % 256), (1 / 255) * (texel // 256 % 256), (1 / 255) * (texel // 65536)
    return *part, hatch


def _sign_layers(layout: Layout, index: int, xx: Any, yy: Any) -> tuple[Any, Any, Any]:
    """Panel coverage, ink coverage and glyph id (-1: none) of a sign at points, [B, *points]."""
    rank = xx.ndim
    table = atlas()
    height, length = layout.sign_height[:, index], layout.sign_length[:, index]
    text = layout.sign_text[:, index]
    u, v = _turned(
        layout.sign_x[:, index], layout.sign_y[:, index], layout.sign_angle[:, index], xx, yy
    )
    half_width, half_height = sign_half_extent(jnp, length, height)
    edge = jnp.minimum(
        _column(half_width, rank) - jnp.abs(u), _column(half_height, rank) - jnp.abs(v)
    )
    panel = jnp.clip(edge + 0.5, 0, 1) * _column(layout.sign_present[:, index], rank)
    frame = jnp.clip(1.5 - jnp.abs(edge - 1.0), 0, 1)
    unit = _column(height, rank)
    along = u / (GLYPH_ASPECT * unit) + _column(length, rank) * 0.5
    position = jnp.clip(along.astype(jnp.int32), 0, MAX_LETTERS - 1)
    glyph = _column(text[:, 0], rank)
    for i in range(1, MAX_LETTERS):
        glyph = jnp.where(position == i, _column(text[:, i], rank), glyph)
    down = v / unit + 0.5
    inside = (along >= 0) & (along < _column(length, rank)) & (down >= 0) & (down < 1)
    inside = inside & (panel > 0.5)
    level = (height <= GLYPH_HEIGHTS[1]).astype(jnp.int32) + (height <= GLYPH_HEIGHTS[2])
    rows = jnp.asarray(GLYPH_HEIGHTS, jnp.int32)[level]
    cells = rows * (rows * 3 // 4)
    start = jnp.asarray(table.glyph_offsets, jnp.int32)[level]
    start = start + (layout.style == HELD_OUT) * len(GLYPHS) * cells
    rows = _column(rows, rank)
    columns = rows * 3 // 4
    row = jnp.clip((down * rows).astype(jnp.int32), 0, rows - 1)
    column = jnp.clip(((along - position) * columns).astype(jnp.int32), 0, columns - 1)
    texel = jnp.asarray(table.glyphs)[
        _column(start, rank) + jnp.maximum(glyph, 0) * rows * columns + row * columns + column
    ]
    ink = jnp.where(inside, texel.astype(jnp.float32) * (1 / 255), 0)
    return panel, jnp.maximum(ink, 0.6 * frame), jnp.where(inside, glyph, -1)


def _noise(layout: Layout, height: int, width: int) -> Any:
    """[B, height, width] in -1..1: an integer hash of cell and seed, no generator state.

    Cells are squares of 2 to 4 pixels, drawn by scene.
    """
    cell = _column(2 + (layout.backdrop[:, 1] * 2.99).astype(jnp.int32), 2)
    row, column = jnp.arange(height)[None, :, None] // cell, jnp.arange(width)[None, None] // cell
    value = (row * 4096 + column).astype(jnp.uint32) * jnp.uint32(0x9E3779B1)
    value = value ^ _column(layout.noise_seed.astype(jnp.uint32) * jnp.uint32(0x85EBCA6B), 2)
    value = (value ^ (value >> 15)) * jnp.uint32(0x2C1B3C6D)
    value = (value ^ (value >> 12)) * jnp.uint32(0x297A2D39)
    value = value ^ (value >> 15)
    return (value >> 8).astype(jnp.float32) * (2.0 / 2**24) - 1


def _background(layout: Layout, xx: Any, yy: Any) -> Any:
    """[B, 3, *points]: a base with a linear gradient, soft blobs and strokes."""
    knobs = layout.backdrop
    clutter = _column(layout.clutter, 2)
    tint = (knobs[:, 3:6] - 0.5) * 0.18
    base = (0.42 + 0.32 * knobs[:, 2:3] + tint)[:, :, None, None]
    slope = ((knobs[:, 6:9] - 0.5) * 0.14 + (knobs[:, 9:10] - 0.5) * 0.2)[:, :, None, None]
    turn = 2 * np.pi * knobs[:, 10]
    wide, high = _column(layout.width, 2), _column(layout.height, 2)
    ramp = _column(jnp.cos(turn), 2) * (2 * xx / wide - 1)
    ramp = ramp + _column(jnp.sin(turn), 2) * (2 * yy / high - 1)
    picture = base + slope * ramp[:, None]
    start = 12
    for _ in range(NUM_BLOBS):
        a, b, c, d, e, shade = (_column(knobs[:, start + k], 2) for k in range(6))
        start += 6
        rx, ry = 14 + 70 * c, 14 + 70 * d
        far = jnp.sqrt(((xx - a * wide) / rx) ** 2 + ((yy - b * high) / ry) ** 2 + 1e-6)
        cover = jnp.clip((1 - far) * (1 + 5 * e), 0, 1) * clutter
        picture = picture + (cover * (shade - 0.5) * 0.34)[:, None]
    for _ in range(NUM_STROKES):
        a, b, c, d, shade = (_column(knobs[:, start + k], 2) for k in range(5))
        start += 5
        x0, y0, ex, ey = a * wide, b * high, (c - 0.5) * 320, (d - 0.5) * 320
        t = jnp.clip(((xx - x0) * ex + (yy - y0) * ey) / (ex**2 + ey**2 + 1), 0, 1)
        distance = jnp.sqrt((xx - x0 - t * ex) ** 2 + (yy - y0 - t * ey) ** 2 + 1e-6)
        cover = jnp.clip(0.8 + 3 * (shade * 7 % 1) - distance + 0.5, 0, 1) * clutter
        picture = picture + (cover * (shade - 0.5) * 0.5)[:, None]
    return picture


def _fade(layout: Layout, rgb: Any) -> Any:
    """Colors [B, 3] moved towards gray in low-contrast scenes."""
    return _GRAY + layout.contrast[:, None] * (rgb - _GRAY)


def _draw_object(layout: Layout, index: int, xx: Any, yy: Any, picture: Any) -> Any:
    """The picture with object slot `index` on top."""
    held_out = layout.style == HELD_OUT
    palette = held_out.astype(jnp.int32)
    sketch = _column(held_out.astype(jnp.float32), 3)
    layers = (layer[:, None] for layer in _icon_layers(layout, index, xx, yy))
    alpha, detail, contour, hatch = layers
    tone = layout.tone[:, index, None]
    color = layout.color[:, index]
    body = _fade(layout, jnp.asarray(PALETTES)[palette, color] * tone)[:, :, None, None]
    trim = _fade(layout, jnp.asarray(DETAILS)[palette, color] * tone)[:, :, None, None]
    # Held out: hatching lets the background through inside a strong contour.
    opacity = alpha * (1 - sketch * (1 - jnp.maximum(hatch, contour)) * 0.75)
    edge = jnp.maximum(detail, contour * (0.45 + 0.35 * sketch))
    return picture * (1 - opacity) + opacity * (body + (trim - body) * edge)


def _draw_sign(layout: Layout, index: int, xx: Any, yy: Any, picture: Any) -> Any:
    """The picture with sign slot `index` on top."""
    palette = (layout.style == HELD_OUT).astype(jnp.int32)
    panel, ink, _ = (layer[:, None] for layer in _sign_layers(layout, index, xx, yy))
    color = layout.sign_color[:, index]
    paper = _fade(layout, jnp.asarray(PALETTES)[palette, color])[:, :, None, None]
    black = jnp.asarray(_LIGHT_PANEL)[palette, color]
    text = jnp.broadcast_to(jnp.where(black, 0.03, 0.99)[:, None], (black.shape[0], 3))
    text = _fade(layout, text)[:, :, None, None]
    return picture * (1 - panel) + panel * (paper + (text - paper) * ink)


def render(
    layout: Layout,
    size: tuple[int, int] = (IMAGE_SIZE, IMAGE_SIZE),
    *,
    skip_absent: bool = False,
) -> UInt8[Array, "B 3 height width"]:
    """Pictures of the scenes, channels first; `size` (height, width) as in `sample_layout`.

    Absent objects and signs leave no trace. `skip_absent` branches around slots that are absent in
    the whole batch: faster for single scenes on a CPU, slower for batches.
    """
    height, width = size
    xx, yy = jnp.meshgrid(
        jnp.arange(width, dtype=jnp.float32) + 0.5, jnp.arange(height, dtype=jnp.float32) + 0.5
    )
    picture = _background(layout, xx, yy)
    for draw, present in ((_draw_object, layout.present), (_draw_sign, layout.sign_present)):
        for index in range(present.shape[1]):
            step = functools.partial(draw, layout, index, xx, yy)
            if skip_absent:
                picture = jax.lax.cond(present[:, index].any(), step, lambda same: same, picture)
            else:
                picture = step(picture)
    strength = _column(jnp.maximum(0.07 * layout.backdrop[:, 11] - 0.02, 0) * layout.clutter, 2)
    picture = picture + (strength * _noise(layout, height, width))[:, None]
    return jnp.floor(jnp.clip(picture, 0, 1) * 255 + 0.5).astype(jnp.uint8)


def patch_labels(
    layout: Layout, size: tuple[int, int] = (IMAGE_SIZE, IMAGE_SIZE)
) -> tuple[Int[Array, "B P"], Int[Array, "B P"], Int[Array, "B P"]]:
    """What each of the P patches of 14 x 14 pixels, row by row, shows: kind, color and letter.

    Kind is an index into KINDS, KIND_SIGN or KIND_NONE; color an index into COLORS (of the object
    or of the sign's panel) or COLOR_NONE; letter an index into GLYPHS at the patch centre, or -1.
    The front object that covers a fifth of a patch (nine sample points) owns it.
    """
    rows, columns = size[0] // PATCH, size[1] // PATCH
    offsets = np.array([(x, y) for x in (-4.5, 0, 4.5) for y in (-4.5, 0, 4.5)], np.float32)
    centres = (np.arange(max(rows, columns), dtype=np.float32) + 0.5) * PATCH
    yy, xx = np.meshgrid(centres[:rows], centres[:columns], indexing="ij")
    yy, xx = yy.reshape(-1, 1), xx.reshape(-1, 1)
    px, py = jnp.asarray(xx + offsets[:, 0]), jnp.asarray(yy + offsets[:, 1])
    kind = jnp.full((layout.x.shape[0], xx.shape[0]), KIND_NONE, jnp.int32)
    color = jnp.full_like(kind, COLOR_NONE)
    glyph = jnp.full_like(kind, -1)
    for index in range(MAX_OBJECTS):
        owned = _icon_layers(layout, index, px, py)[0].mean(-1) >= 0.2
        kind = jnp.where(owned, layout.kind[:, index, None], kind)
        color = jnp.where(owned, layout.color[:, index, None], color)
    for index in range(MAX_SIGNS):
        panel, _, letter = _sign_layers(layout, index, jnp.asarray(xx[:, 0]), jnp.asarray(yy[:, 0]))
        kind = jnp.where(panel > 0.5, KIND_SIGN, kind)
        color = jnp.where(panel > 0.5, layout.sign_color[:, index, None], color)
        glyph = jnp.where(panel > 0.5, letter, glyph)
    return kind, color, glyph


@functools.partial(jax.jit, static_argnames="size")
def render_nhwc(
    layout: Layout, size: tuple[int, int] = (IMAGE_SIZE, IMAGE_SIZE)
) -> UInt8[Array, "B height width 3"]:
    """Pictures, channels last, scene by scene: the program for a CPU."""

    def one(scene: Layout) -> Any:
        single = jax.tree.map(lambda field: field[None], scene)
        return render(single, size, skip_absent=True)[0].transpose(1, 2, 0)

    return jax.lax.map(one, layout)
