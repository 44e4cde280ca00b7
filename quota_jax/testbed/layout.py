"""Sampling of scene layouts: which objects and sign stand where, on which background.

Written against an array namespace `xp` (numpy or jax.numpy), so that one definition serves the
host (evaluation, demo: exact and independent of the accelerator) and the jitted training step. All
randomness comes from one float32 vector of uniforms per scene; batch is the leading axis `B`, and
`M = MAX_OBJECTS` object slots follow it.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from quota_jax.testbed.atlas import GLYPH_ASPECT, GLYPHS
from quota_jax.testbed.vocabulary import COLORS, KINDS, SIGN_WORDS

IMAGE_SIZE = 336
MAX_OBJECTS = 9
MAX_LETTERS = 5
NUM_STROKES = 4
_CANDIDATES = 16
_RADIUS = 0.58
"""Radius, in object sizes, of the circle that keeps objects apart."""
SIGN_PADDING = 0.35
"""Margin between text and the edge of the sign, in letter heights."""


class Difficulty(NamedTuple):
    """Bounds of the scene distribution; plain numbers or traced scalars. Sizes in pixels."""

    min_objects: Any = 2
    max_objects: Any = 9
    min_size: Any = 26.0
    max_size: Any = 104.0
    min_letter: Any = 14.0
    max_letter: Any = 44.0


class Layout(NamedTuple):
    """A batch of scenes.

    Object fields are [B, M]: `present` (other fields of absent slots are meaningless), `kind` and
    `color` (indices into KINDS and COLORS), centre `x`, `y`, `size` (edge of the icon's square)
    in pixels, `angle` in radians, `tone` (brightness factor). Sign fields are [B]: `sign_word` is
    an index into SIGN_WORDS or -1 for a number, `sign_number` 10..99, `sign_glyphs` [B, 5]
    indices into GLYPHS or -1, `sign_height` the letter height. `backdrop` [B, 32] holds
    background parameters in 0..1, `noise_seed` is int32.
    """

    present: Any
    kind: Any
    color: Any
    x: Any
    y: Any
    size: Any
    angle: Any
    tone: Any
    sign_present: Any
    sign_word: Any
    sign_number: Any
    sign_glyphs: Any
    sign_length: Any
    sign_x: Any
    sign_y: Any
    sign_height: Any
    sign_angle: Any
    sign_dark: Any
    backdrop: Any
    noise_seed: Any


class Uniforms:
    """Hands out consecutive columns of a [B, n] array of uniforms in [0, 1)."""

    def __init__(self, values: Any) -> None:
        self._values = values
        self._next = 0

    def take(self, *shape: int) -> Any:
        """The next columns as an array [B, *shape]."""
        count = math.prod(shape)
        start, self._next = self._next, self._next + count
        if self._next > self._values.shape[1]:
            raise ValueError(f"{self._next} uniforms wanted, {self._values.shape[1]} given")
        return self._values[:, start : self._next].reshape((self._values.shape[0], *shape))


def pick(xp: Any, uniform: Any, count: int) -> Any:
    """Integer in [0, count) from a uniform in [0, 1)."""
    return xp.minimum((uniform * count).astype(np.int32), count - 1)


def _sign_text_tables() -> tuple[np.ndarray, np.ndarray]:
    glyphs = np.full((len(SIGN_WORDS), MAX_LETTERS), -1, np.int32)
    for row, word in enumerate(SIGN_WORDS):
        glyphs[row, : len(word)] = [GLYPHS.index(letter) for letter in word.upper()]
    return glyphs, np.array([len(word) for word in SIGN_WORDS], np.int32)


_WORD_GLYPHS, _WORD_LENGTHS = _sign_text_tables()

UNIFORMS_PER_SCENE = 4 + 7 * MAX_OBJECTS + 2 * _CANDIDATES * (MAX_OBJECTS + 1) + 6 + 32


def sign_half_extent(xp: Any, length: Any, height: Any) -> tuple[Any, Any]:
    """Half width and half height in pixels of the (unrotated) panel of a sign."""
    padding = SIGN_PADDING * height
    return 0.5 * length * GLYPH_ASPECT * height + padding, 0.5 * height + padding


def sample_layout(uniforms: Any, difficulty: Difficulty, xp: Any = np) -> Layout:
    """Scenes from uniforms [B, UNIFORMS_PER_SCENE].

    Objects lie wholly inside the picture; their circles overlap neither each other nor the sign.
    The first object is always there, so no scene is empty; one that finds no room is left out.
    """
    u = Uniforms(uniforms)
    head = u.take(4)
    span = difficulty.max_objects - difficulty.min_objects + 1
    wanted = difficulty.min_objects + xp.floor(head[:, 0] * span)
    same_kind_scene, same_color_scene = head[:, 1] < 0.5, head[:, 2] < 0.4

    fields = u.take(7, MAX_OBJECTS)
    kind, color = pick(xp, fields[:, 0], len(KINDS)), pick(xp, fields[:, 1], len(COLORS))
    # Without copies of the first object nearly every count would be one.
    copy_kind = same_kind_scene[:, None] & (fields[:, 2] < 0.45)
    copy_color = same_color_scene[:, None] & (fields[:, 3] < 0.4)
    kind = xp.where(copy_kind, kind[:, :1], kind)
    color = xp.where(copy_color, color[:, :1], color)
    log_ratio = xp.log(xp.asarray(difficulty.max_size / difficulty.min_size))
    size = (difficulty.min_size * xp.exp(fields[:, 4] * log_ratio)).astype(np.float32)
    angle = ((fields[:, 5] - 0.5) * math.radians(70)).astype(np.float32)
    tone = (0.85 + 0.15 * fields[:, 6]).astype(np.float32)

    sign = u.take(6)
    has_word = sign[:, 0] < 0.7
    word = pick(xp, sign[:, 1], len(SIGN_WORDS))
    number = 10 + pick(xp, sign[:, 2], 90)
    digits = xp.stack([number // 10 + 26, number % 10 + 26], axis=1)
    blank = xp.full((uniforms.shape[0], MAX_LETTERS - 2), -1, dtype=np.int32)
    glyphs = xp.where(
        has_word[:, None], xp.asarray(_WORD_GLYPHS)[word], xp.concatenate([digits, blank], axis=1)
    )
    length = xp.where(has_word, xp.asarray(_WORD_LENGTHS)[word], 2)
    letter = difficulty.min_letter + sign[:, 3] * (difficulty.max_letter - difficulty.min_letter)
    letter = xp.asarray(letter).astype(np.float32)
    half_width, half_height = sign_half_extent(xp, length, letter)
    sign_angle = ((sign[:, 4] - 0.5) * math.radians(14)).astype(np.float32)
    # The rotated panel stays within this upright box.
    box_width, box_height = half_width + 0.13 * half_height + 3, half_height + 0.13 * half_width + 3

    def first_free(free: Any, x: Any, y: Any) -> tuple[Any, Any, Any]:
        index = xp.argmax(free, axis=1)[:, None]
        return (
            xp.any(free, axis=1),
            xp.take_along_axis(x, index, axis=1)[:, 0],
            xp.take_along_axis(y, index, axis=1)[:, 0],
        )

    def candidates(half_x: Any, half_y: Any) -> tuple[Any, Any]:
        places = u.take(2, _CANDIDATES)
        x = half_x[:, None] + places[:, 0] * (IMAGE_SIZE - 2 * half_x[:, None])
        return x, half_y[:, None] + places[:, 1] * (IMAGE_SIZE - 2 * half_y[:, None])

    radius = _RADIUS * size
    xs, ys, present = [], [], []
    sign_x: Any = None
    sign_y: Any = None
    sign_present: Any = None
    for i in range(MAX_OBJECTS):
        x, y = candidates(radius[:, i], radius[:, i])
        free = xp.broadcast_to((wanted > i)[:, None], x.shape)
        for j in range(i):
            apart = (x - xs[j][:, None]) ** 2 + (y - ys[j][:, None]) ** 2
            reach = (radius[:, i] + radius[:, j])[:, None] ** 2
            free = free & (~present[j][:, None] | (apart >= reach))
        if i > 0:
            gap_x = xp.maximum(xp.abs(x - sign_x[:, None]) - box_width[:, None], 0)
            gap_y = xp.maximum(xp.abs(y - sign_y[:, None]) - box_height[:, None], 0)
            clear = gap_x**2 + gap_y**2 >= radius[:, i : i + 1] ** 2
            free = free & (~sign_present[:, None] | clear)
        found, x, y = first_free(free, x, y)
        xs.append(x)
        ys.append(y)
        present.append(found)
        if i == 0:
            x, y = candidates(box_width, box_height)
            gap_x = xp.maximum(xp.abs(x - xs[0][:, None]) - box_width[:, None], 0)
            gap_y = xp.maximum(xp.abs(y - ys[0][:, None]) - box_height[:, None], 0)
            free = (head[:, 3] < 0.65)[:, None] & (gap_x**2 + gap_y**2 >= radius[:, :1] ** 2)
            sign_present, sign_x, sign_y = first_free(free, x, y)

    backdrop = u.take(32)
    return Layout(
        present=xp.stack(present, axis=1),
        kind=kind,
        color=color,
        x=xp.stack(xs, axis=1).astype(np.float32),
        y=xp.stack(ys, axis=1).astype(np.float32),
        size=size,
        angle=angle,
        tone=tone,
        sign_present=sign_present,
        sign_word=xp.where(has_word, word, -1),
        sign_number=number,
        sign_glyphs=glyphs.astype(np.int32),
        sign_length=length,
        sign_x=sign_x.astype(np.float32),
        sign_y=sign_y.astype(np.float32),
        sign_height=letter,
        sign_angle=sign_angle,
        sign_dark=sign[:, 5] < 0.5,
        backdrop=backdrop.astype(np.float32),
        noise_seed=(backdrop[:, 31] * 2**24).astype(np.int32),
    )
