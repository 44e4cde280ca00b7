"""Draws scene layouts into 336 x 336 pictures, and says what lies under each visual patch.

The only renderer of the testbed: inside the jitted training step and on a CPU for a handful of
pictures alike. Icons and letters are looked up in the atlases by the inverse map (pixel ->
texture), composited in a fixed order.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, UInt8

from quota_jax.testbed.atlas import GLYPH_ASPECT, GLYPH_HEIGHTS, ICON_SIZES, atlas
from quota_jax.testbed.layout import (
    IMAGE_SIZE,
    MAX_LETTERS,
    MAX_OBJECTS,
    NUM_STROKES,
    Layout,
    sign_half_extent,
)
from quota_jax.testbed.vocabulary import COLORS, KINDS

PATCH = 14
GRID = IMAGE_SIZE // PATCH
KIND_NONE, KIND_SIGN = len(KINDS), len(KINDS) + 1
COLOR_NONE = len(COLORS)

PALETTE = np.array(
    [
        (0.88, 0.10, 0.12), (1.00, 0.52, 0.05), (0.98, 0.88, 0.10), (0.10, 0.62, 0.20),
        (0.12, 0.30, 0.92), (0.55, 0.15, 0.70), (0.05, 0.05, 0.06), (0.98, 0.98, 0.98),
    ],
    np.float32,
)  # fmt: skip
"""RGB in 0..1 of each color."""
DETAIL = np.array([np.where(rgb.sum() < 0.5, 0.42, 0.38 * rgb) for rgb in PALETTE], np.float32)
"""RGB of an icon's details: darker than the object, but lighter on black."""


def _column(values: Any, rank: int) -> Any:
    """[B] -> [B, 1, ...] with `rank` trailing axes."""
    return values.reshape(values.shape[0], *(1,) * rank)


def _icon_layers(layout: Layout, index: int, xx: Any, yy: Any) -> tuple[Any, Any]:
    """Alpha and detail (0..1) of object slot `index` at points; both [B, *points]."""
    rank = xx.ndim
    table = atlas()
    size = layout.size[:, index]
    scale = _column(jnp.where(layout.present[:, index], 1 / size, 0), rank)
    cos, sin = jnp.cos(layout.angle[:, index]), jnp.sin(layout.angle[:, index])
    dx = (xx - _column(layout.x[:, index], rank)) * scale
    dy = (yy - _column(layout.y[:, index], rank)) * scale
    u = dx * _column(cos, rank) + dy * _column(sin, rank)
    v = dy * _column(cos, rank) - dx * _column(sin, rank)
    inside = (jnp.abs(u) < 0.5) & (jnp.abs(v) < 0.5) & (scale > 0)
    level = (size <= ICON_SIZES[1]).astype(jnp.int32) + (size <= ICON_SIZES[2])
    resolution = jnp.asarray(ICON_SIZES, jnp.int32)[level]
    start = jnp.asarray(table.icon_offsets, jnp.int32)[level]
    start = start + layout.kind[:, index] * resolution**2
    resolution = _column(resolution, rank)
    column = jnp.clip(((u + 0.5) * resolution).astype(jnp.int32), 0, resolution - 1)
    row = jnp.clip(((v + 0.5) * resolution).astype(jnp.int32), 0, resolution - 1)
    texel = jnp.asarray(table.icons)[_column(start, rank) + row * resolution + column]
    alpha = jnp.where(inside, texel // 256, 0) * (1 / 255)
    return alpha, (texel % 256) * (1 / 255)


def _sign_layers(layout: Layout, xx: Any, yy: Any) -> tuple[Any, Any, Any]:
    """Panel coverage, ink coverage and glyph id (-1: none) of the sign at points, [B, *points]."""
    rank = xx.ndim
    table = atlas()
    height = layout.sign_height
    cos, sin = jnp.cos(layout.sign_angle), jnp.sin(layout.sign_angle)
    dx, dy = xx - _column(layout.sign_x, rank), yy - _column(layout.sign_y, rank)
    u = dx * _column(cos, rank) + dy * _column(sin, rank)
    v = dy * _column(cos, rank) - dx * _column(sin, rank)
    half_width, half_height = sign_half_extent(jnp, layout.sign_length, height)
    edge = jnp.minimum(
        _column(half_width, rank) - jnp.abs(u), _column(half_height, rank) - jnp.abs(v)
    )
    panel = jnp.clip(edge + 0.5, 0, 1) * _column(layout.sign_present, rank)
    frame = jnp.clip(2.0 - jnp.abs(edge - 2.5), 0, 1)
    unit = _column(height, rank)
    along = u / (GLYPH_ASPECT * unit) + _column(layout.sign_length, rank) * 0.5
    position = jnp.clip(along.astype(jnp.int32), 0, MAX_LETTERS - 1)
    glyph = _column(layout.sign_glyphs[:, 0], rank)
    for i in range(1, MAX_LETTERS):
        glyph = jnp.where(position == i, _column(layout.sign_glyphs[:, i], rank), glyph)
    down = v / unit + 0.5
    inside = (along >= 0) & (along < _column(layout.sign_length, rank)) & (down >= 0) & (down < 1)
    inside = inside & (panel > 0.5)
    level = (height <= GLYPH_HEIGHTS[1]).astype(jnp.int32) + (height <= GLYPH_HEIGHTS[2])
    rows = jnp.asarray(GLYPH_HEIGHTS, jnp.int32)[level]
    start = _column(jnp.asarray(table.glyph_offsets, jnp.int32)[level], rank)
    rows = _column(rows, rank)
    columns = rows * 3 // 4
    row = jnp.clip((down * rows).astype(jnp.int32), 0, rows - 1)
    column = jnp.clip(((along - position) * columns).astype(jnp.int32), 0, columns - 1)
    texel = jnp.asarray(table.glyphs)[
        start + jnp.maximum(glyph, 0) * rows * columns + row * columns + column
    ]
    ink = jnp.where(inside, texel.astype(jnp.float32) * (1 / 255), 0)
    return panel, jnp.maximum(ink, frame), jnp.where(inside, glyph, -1)


def _noise(seed: Any, shape: tuple[int, int, int]) -> Any:
    """[B, *shape] in -1..1: an integer hash of position and seed, no random generator state."""
    index = jnp.arange(int(np.prod(shape)), dtype=jnp.uint32).reshape(shape)
    value = index * jnp.uint32(0x9E3779B1) ^ _column(
        seed.astype(jnp.uint32) * jnp.uint32(0x85EBCA6B), 3
    )
    value = (value ^ (value >> 15)) * jnp.uint32(0x2C1B3C6D)
    value = (value ^ (value >> 12)) * jnp.uint32(0x297A2D39)
    value = value ^ (value >> 15)
    return (value >> 8).astype(jnp.float32) * (2.0 / 2**24) - 1


def _background(layout: Layout, xx: Any, yy: Any) -> Any:
    """[B, 3, *points]: greyish base, linear gradient and a few faint strokes."""
    knobs = layout.backdrop
    tint = (knobs[:, 1:4] - 0.5) * 0.16
    base = (0.38 + 0.34 * knobs[:, :1] + tint)[:, :, None, None]
    slope = ((knobs[:, 4:7] - 0.5) * 0.12 + (knobs[:, 7:8] - 0.5) * 0.2)[:, :, None, None]
    turn = 2 * np.pi * knobs[:, 8]
    half = IMAGE_SIZE / 2
    ramp = (
        _column(jnp.cos(turn), 2) * (xx - half) + _column(jnp.sin(turn), 2) * (yy - half)
    ) / half
    picture = base + slope * ramp[:, None]
    for i in range(NUM_STROKES):
        a, b, c, d, shade = (knobs[:, 9 + 5 * i + k] for k in range(5))
        x0, y0 = _column(a * IMAGE_SIZE, 2), _column(b * IMAGE_SIZE, 2)
        ex, ey = _column((c - 0.5) * 300, 2), _column((d - 0.5) * 300, 2)
        t = jnp.clip(((xx - x0) * ex + (yy - y0) * ey) / (ex**2 + ey**2 + 1), 0, 1)
        distance = jnp.sqrt((xx - x0 - t * ex) ** 2 + (yy - y0 - t * ey) ** 2 + 1e-6)
        cover = jnp.clip(_column(1 + 2.5 * knobs[:, 30], 2) - distance + 0.5, 0, 1)
        picture = picture + (cover * _column((shade - 0.5) * 0.3, 2))[:, None]
    return picture


def render(layout: Layout) -> UInt8[Array, "B 3 336 336"]:
    """Pictures of the scenes, channels first. Absent objects and signs leave no trace."""
    axis = jnp.arange(IMAGE_SIZE, dtype=jnp.float32) + 0.5
    xx, yy = axis[None, :] + 0 * axis[:, None], axis[:, None] + 0 * axis[None, :]
    picture = _background(layout, xx, yy)
    for index in range(MAX_OBJECTS):
        alpha, detail = (layer[:, None] for layer in _icon_layers(layout, index, xx, yy))
        tone = layout.tone[:, index, None]
        body = (jnp.asarray(PALETTE)[layout.color[:, index]] * tone)[:, :, None, None]
        trim = (jnp.asarray(DETAIL)[layout.color[:, index]] * tone)[:, :, None, None]
        picture = picture * (1 - alpha) + alpha * (body + (trim - body) * detail)
    panel, ink, _ = (layer[:, None] for layer in _sign_layers(layout, xx, yy))
    paper = _column(jnp.where(layout.sign_dark, 0.08, 0.95), 3)
    text = _column(jnp.where(layout.sign_dark, 0.95, 0.06), 3)
    picture = picture * (1 - panel) + panel * (paper + (text - paper) * ink)
    strength = _column(0.02 + 0.07 * layout.backdrop[:, 29], 3)
    picture = picture + strength * _noise(layout.noise_seed, (3, IMAGE_SIZE, IMAGE_SIZE))
    return jnp.floor(jnp.clip(picture, 0, 1) * 255 + 0.5).astype(jnp.uint8)


def patch_labels(
    layout: Layout,
) -> tuple[Int[Array, "B P"], Int[Array, "B P"], Int[Array, "B P"]]:
    """What each of the P = 576 patches shows: kind, color and letter.

    Kind is an index into KINDS, KIND_SIGN or KIND_NONE; color an index into COLORS or COLOR_NONE;
    letter an index into GLYPHS at the patch centre, or -1. An object owns a patch that it covers
    by a quarter and more than any other does (four sample points).
    """
    offsets = np.array([[-3.5, -3.5], [3.5, -3.5], [-3.5, 3.5], [3.5, 3.5]], np.float32)
    centre = (np.arange(GRID, dtype=np.float32) + 0.5) * PATCH
    yy, xx = (grid.reshape(-1, 1) for grid in np.meshgrid(centre, centre, indexing="ij"))
    px, py = jnp.asarray(xx + offsets[:, 0]), jnp.asarray(yy + offsets[:, 1])
    cover = jnp.stack(
        [_icon_layers(layout, i, px, py)[0].mean(-1) for i in range(MAX_OBJECTS)], axis=1
    )
    owner, most = jnp.argmax(cover, axis=1), jnp.max(cover, axis=1)
    owned = most >= 0.25
    kind = jnp.where(owned, jnp.take_along_axis(layout.kind, owner, axis=1), KIND_NONE)
    color = jnp.where(owned, jnp.take_along_axis(layout.color, owner, axis=1), COLOR_NONE)
    panel, _, glyph = _sign_layers(layout, jnp.asarray(xx[:, 0]), jnp.asarray(yy[:, 0]))
    kind = jnp.where(panel > 0.5, KIND_SIGN, kind)
    color = jnp.where(panel > 0.5, COLOR_NONE, color)
    return kind, color, glyph


@jax.jit
def render_nhwc(layout: Layout) -> UInt8[Array, "B 336 336 3"]:
    """`render`, channels last, as its own compiled program."""
    return render(layout).transpose(0, 2, 3, 1)
