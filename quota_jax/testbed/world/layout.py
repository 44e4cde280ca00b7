"""Sampling of world scenes: which objects and signs stand where, in which style, on what ground.

Written against an array namespace `xp` (numpy or jax.numpy), so that one definition serves the
host (benchmarks, tests) and the jitted training step. All randomness comes from one float32 vector
of uniforms per scene. Nothing here but + - * / and square roots touches a float, so numpy gives
the same scenes on every machine. Batch `B` leads; `M = MAX_OBJECTS` and `S = MAX_SIGNS` follow.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from quota_jax.testbed.world.letters import GLYPH_ASPECT
from quota_jax.testbed.world.vocabulary import COLORS, FIRST_LETTER, KINDS

IMAGE_SIZE = 336
MAX_OBJECTS = 14
MAX_SIGNS = 4
MAX_LETTERS = 6
NUM_STROKES = 6
NUM_BLOBS = 5
STYLES: tuple[str, ...] = ("plain", "rotated", "low-contrast", "held-out")
"""Training draws the first three; "held-out" is drawn only where it is asked for."""
HELD_OUT = 3
_CANDIDATES = 12
_RADIUS = 0.53
"""Radius, in object sizes, of the circle that stands for an object when places are sought."""
_MAX_COVERED = 0.3
"""Share of an object's circle that others in front of it may cover, all together."""
_TURN = (12.0, 70.0, 30.0)
_SIGN_TURN = (5.0, 18.0, 8.0)
"""Largest rotation in degrees by style, of objects and of signs; held-out turns like low-contrast.
"""
_VOWELS = np.array([0, 4, 8, 14, 20], np.int32)
_CONSONANTS = np.array([i for i in range(26) if i not in (0, 4, 8, 14, 20)], np.int32)
SIGN_PADDING = 0.35
"""Margin between text and the edge of the sign, in letter heights."""
BACKDROP = 12 + 5 * NUM_STROKES + 6 * NUM_BLOBS


class Difficulty(NamedTuple):
    """Bounds of the scene distribution; plain numbers or traced scalars. Sizes in pixels.

    overlap: how far an object may reach over a larger one, in shares of its own diameter.
    clutter: strength of strokes, blobs and noise behind the objects, 0 to 1.
    number_share: about the share of signs that carry a number.
    rotated_share, low_contrast_share: shares of scenes; the others are plain.
    """

    min_objects: Any = 4
    max_objects: Any = 14
    min_size: Any = 18.0
    max_size: Any = 80.0
    min_letter: Any = 10.0
    max_letter: Any = 30.0
    min_signs: Any = 0
    max_signs: Any = 4
    overlap: Any = 0.28
    clutter: Any = 1.0
    number_share: Any = 0.3
    rotated_share: Any = 0.35
    low_contrast_share: Any = 0.25


EASY = Difficulty(1, 3, 60.0, 104.0, 28.0, 40.0, 0, 1, 0.0, 0.2, 0.3, 0.2, 0.1)
"""Where a curriculum may start."""


class Layout(NamedTuple):
    """A batch of scenes.

    Object fields are [B, M]: `present` (other fields of absent slots are meaningless), `kind` and
    `color` (indices into KINDS and COLORS), centre `x`, `y`, `size` (edge of the icon's square) in
    pixels, `angle` in radians, `tone` (brightness factor). Slots are sorted by size, the largest
    first; later slots are drawn over earlier ones.

    Sign fields are [B, S]: `sign_color` of the panel (all signs of a scene differ in color and in
    text), `sign_text` [B, S, 6] indices into GLYPHS or -1, `sign_length`, `sign_number` 10..99 or
    -1 for a word, `sign_height` of the letters.

    Scene fields are [B]: `style` (index into STYLES), `contrast` (1: full), `clutter`, `width` and
    `height` of the picture; `backdrop` [B, BACKDROP] in 0..1 and int32 `noise_seed`.
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
    sign_color: Any
    sign_text: Any
    sign_length: Any
    sign_number: Any
    sign_x: Any
    sign_y: Any
    sign_height: Any
    sign_angle: Any
    style: Any
    contrast: Any
    clutter: Any
    backdrop: Any
    noise_seed: Any
    width: Any
    height: Any


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


def sign_half_extent(xp: Any, length: Any, height: Any) -> tuple[Any, Any]:
    """Half width and half height in pixels of the (unrotated) panel of a sign."""
    padding = SIGN_PADDING * height
    return 0.5 * length * GLYPH_ASPECT * height + padding, 0.5 * height + padding


UNIFORMS_PER_SCENE = (
    18
    + 8 * MAX_OBJECTS
    + MAX_SIGNS * (6 + 2 * MAX_LETTERS)
    + len(COLORS)
    + 2 * _CANDIDATES * (MAX_OBJECTS + MAX_SIGNS)
    + BACKDROP
)


def _power(xp: Any, ratio: Any, uniform: Any) -> Any:
    """ratio ** uniform in 1024 steps by square roots alone, which IEEE 754 rounds exactly."""
    steps = pick(xp, uniform, 1024)
    factor = xp.sqrt(xp.asarray(ratio, dtype=np.float32))
    value = xp.ones_like(uniform)
    for bit in range(9, -1, -1):
        value = value * xp.where((steps >> bit) & 1 == 1, factor, np.float32(1))
        factor = xp.sqrt(factor)
    return value


def _sign_texts(xp: Any, u: Uniforms, share: Any) -> tuple[Any, Any, Any]:
    """Texts [B, S, 6], lengths and numbers [B, S]: pronounceable or random words, or numbers."""
    coins = u.take(MAX_SIGNS, 6)
    letters = u.take(MAX_SIGNS, MAX_LETTERS)
    wild = pick(xp, u.take(MAX_SIGNS, MAX_LETTERS), 26)
    vowels = xp.asarray(_VOWELS)[pick(xp, letters, len(_VOWELS))]
    consonants = xp.asarray(_CONSONANTS)[pick(xp, letters, len(_CONSONANTS))]
    turn = (xp.arange(MAX_LETTERS) + (coins[..., 1:2] < 0.3)) % 2 == 1
    codes = xp.where(turn, vowels, consonants)
    codes = xp.where(coins[..., 2:3] < 0.35, wild, codes)
    first = xp.asarray(FIRST_LETTER)[codes[..., 0], codes[..., 1], codes[..., 2]]
    codes = xp.concatenate([first[..., None], codes[..., 1:]], axis=-1)
    is_number = coins[..., 0] < share
    number = 10 + pick(xp, coins[..., 3], 90)
    length = xp.where(is_number, 2, 3 + pick(xp, coins[..., 4], 4))
    digits = xp.stack([number // 10 + 26, number % 10 + 26], axis=-1)
    digits = xp.concatenate([digits, codes[..., 2:]], axis=-1)
    codes = xp.where(is_number[..., None], digits, codes)
    codes = xp.where(xp.arange(MAX_LETTERS) < length[..., None], codes, -1)
    return codes.astype(np.int32), length.astype(np.int32), xp.where(is_number, number, -1)


def sample_layout(
    uniforms: Any,
    difficulty: Difficulty,
    xp: Any = np,
    *,
    size: tuple[int, int] = (IMAGE_SIZE, IMAGE_SIZE),
    style: Any = None,
) -> Layout:
    """Scenes from uniforms [B, UNIFORMS_PER_SCENE], for pictures of `size` (height, width).

    Objects lie inside the picture and beside the signs; smaller ones may reach over larger ones
    within `Difficulty.overlap`. What finds no room is left out, but the first object of a scene is
    always there. `style`, one index into STYLES or one a scene [B] (-1: as drawn),
    fixes the styles and changes nothing else but rotations.
    """
    if uniforms.shape[1] != UNIFORMS_PER_SCENE:
        raise ValueError(f"{UNIFORMS_PER_SCENE} uniforms wanted, {uniforms.shape[1]} given")
    high, wide = size
    batch = uniforms.shape[0]
    u = Uniforms(uniforms)
    head = u.take(18)
    d = difficulty

    def between(uniform: Any, low: Any, top: Any) -> Any:
        return low + xp.floor(uniform * (top - low + 1))

    wanted = between(head[:, 0], d.min_objects, d.max_objects)
    wanted_signs = between(head[:, 1], d.min_signs, d.max_signs)
    low = head[:, 2] >= 1 - xp.asarray(d.low_contrast_share)
    drawn = xp.where(head[:, 2] < d.rotated_share, 1, xp.where(low, 2, 0))
    if style is not None:
        drawn = xp.where(xp.asarray(style) < 0, drawn, xp.asarray(style))
    drawn = drawn.astype(np.int32)
    faint = 0.45 + 0.25 * head[:, 3]
    contrast = xp.where(drawn == 2, faint, 1.0).astype(np.float32)
    turn = xp.asarray(np.radians([*_TURN, _TURN[2]]).astype(np.float32))[drawn][:, None]
    sign_turn = xp.asarray(np.radians([*_SIGN_TURN, _SIGN_TURN[2]]).astype(np.float32))
    sign_turn = sign_turn[drawn][:, None]

    fields = u.take(8, MAX_OBJECTS)
    kind, color = pick(xp, fields[:, 0], len(KINDS)), pick(xp, fields[:, 1], len(COLORS))
    # Without copies nearly every count would be one. Two donors make comparisons possible.
    donor = xp.where(fields[:, 4] < 0.6, 2, 3)
    kind_share = xp.where(head[:, 4] < 0.7, head[:, 5] * 0.65, 0)[:, None]
    color_share = xp.where(head[:, 6] < 0.6, head[:, 7] * 0.55, 0)[:, None]
    copied = xp.take_along_axis(kind, donor, axis=1)
    kind = xp.where(fields[:, 2] < kind_share, copied, kind)
    copied = xp.take_along_axis(color, donor, axis=1)
    color = xp.where(fields[:, 3] < color_share, copied, color)
    ratio = xp.asarray(d.max_size) / d.min_size
    sizes = (d.min_size * _power(xp, ratio, fields[:, 5])).astype(np.float32)
    sizes = xp.where(xp.arange(MAX_OBJECTS) < wanted[:, None], sizes, 0)
    sizes = -xp.sort(-sizes, axis=1)
    angle = ((2 * fields[:, 6] - 1) * turn).astype(np.float32)
    tone = (0.86 + 0.14 * fields[:, 7]).astype(np.float32)

    # In some scenes all signs carry numbers, so that there are sums to ask for.
    share = xp.where(head[:, 16] < 0.6 * d.number_share, 1.0, 0.7 * d.number_share)
    texts, lengths, numbers = _sign_texts(xp, u, share[:, None])
    sign_color = xp.argsort(u.take(len(COLORS)), axis=1)[:, :MAX_SIGNS].astype(np.int32)
    ratio = xp.asarray(d.max_letter) / d.min_letter
    letter = (d.min_letter * _power(xp, ratio, head[:, 8 : 8 + MAX_SIGNS])).astype(np.float32)
    sign_angle = ((2 * head[:, 12 : 12 + MAX_SIGNS] - 1) * sign_turn).astype(np.float32)
    half_width, half_height = sign_half_extent(xp, lengths, letter)
    # The largest lean of any style, so that a scene stands the same in all of them.
    lean = xp.abs(2 * head[:, 12 : 12 + MAX_SIGNS] - 1) * np.float32(np.radians(max(_SIGN_TURN)))
    # The rotated panel stays within this upright box.
    box_x = (half_width + lean * half_height + 3).astype(np.float32)
    box_y = (half_height + lean * half_width + 3).astype(np.float32)

    def candidates(half_x: Any, half_y: Any) -> tuple[Any, Any]:
        places = u.take(2, _CANDIDATES)
        x = half_x[:, None] + places[:, 0] * (wide - 2 * half_x[:, None])
        return x, half_y[:, None] + places[:, 1] * (high - 2 * half_y[:, None])

    def first_free(free: Any, *values: Any) -> list[Any]:
        """Whether any candidate is free, and the first free one of each value [B, ..., C]."""
        index = xp.argmax(free, axis=1)
        taken = []
        for value in values:
            place = index.reshape(batch, *(1,) * (value.ndim - 1))
            taken.append(xp.take_along_axis(value, place, axis=-1)[..., 0])
        return [xp.any(free, axis=1), *taken]

    def stack(values: list[Any]) -> Any:
        return xp.stack(values, axis=1)

    # Arrays in the loops are [B, what is already there, candidates].
    sign_x: list[Any] = []
    sign_y: list[Any] = []
    signs: list[Any] = []
    for i in range(MAX_SIGNS):
        x, y = candidates(box_x[:, i], box_y[:, i])
        fits = (2 * box_x[:, i] < wide) & (2 * box_y[:, i] < high) & (wanted_signs > i)
        free = xp.broadcast_to(fits[:, None], x.shape)
        if i > 0:
            there = stack(signs)
            same = (texts[:, i : i + 1] == texts[:, :i]).all(-1)
            reach_x = (box_x[:, i : i + 1] + box_x[:, :i])[..., None]
            reach_y = (box_y[:, i : i + 1] + box_y[:, :i])[..., None]
            apart = xp.abs(x[:, None] - stack(sign_x)[..., None]) >= reach_x
            apart = apart | (xp.abs(y[:, None] - stack(sign_y)[..., None]) >= reach_y)
            free = free & (~there[..., None] | (apart & ~same[..., None])).all(1)
        found, x, y = first_free(free, x, y)
        sign_x.append(x)
        sign_y.append(y)
        signs.append(found)
    sign_xs, sign_ys, sign_present = stack(sign_x), stack(sign_y), stack(signs)

    radius = _RADIUS * sizes
    xs: list[Any] = []
    ys: list[Any] = []
    present: list[Any] = []
    covered = xp.zeros((batch, 0), dtype=np.float32)
    for i in range(MAX_OBJECTS):
        x, y = candidates(radius[:, i], radius[:, i])
        free = xp.broadcast_to((wanted > i)[:, None], x.shape)
        mine, theirs = radius[:, i : i + 1, None], radius[:, :i, None]
        gap_x = xp.maximum(xp.abs(x[:, None] - sign_xs[..., None]) - box_x[..., None], 0)
        gap_y = xp.maximum(xp.abs(y[:, None] - sign_ys[..., None]) - box_y[..., None], 0)
        clear = gap_x**2 + gap_y**2 >= mine**2
        if i == 0:
            # A scene is never empty: a sign gives way to the first object.
            sign_present = sign_present & clear[..., 0]
            found, x, y = first_free(free, x, y)
        else:
            dx, dy = x[:, None] - stack(xs)[..., None], y[:, None] - stack(ys)[..., None]
            depth = xp.maximum(mine + theirs - xp.sqrt(dx**2 + dy**2), 0)
            # About the share of the larger circle that lies behind this one.
            share = xp.minimum(depth / xp.maximum(2 * mine, 1e-3), 1)
            hidden = share * (mine / xp.maximum(theirs, 1e-3)) ** 2
            allowed = (depth <= 2 * d.overlap * mine) & (
                covered[..., None] + hidden <= _MAX_COVERED
            )
            there = stack(present)[..., None]
            free = free & (~there | allowed).all(1) & (~sign_present[..., None] | clear).all(1)
            found, x, y, hidden = first_free(free, x, y, hidden)
            covered = covered + xp.where(found[:, None], hidden, 0)
        xs.append(x)
        ys.append(y)
        present.append(found)
        covered = xp.concatenate([covered, xp.zeros_like(x)[:, None]], axis=1)

    backdrop = u.take(BACKDROP)
    full = xp.ones((batch,), dtype=np.float32)

    return Layout(
        present=stack(present),
        kind=kind,
        color=color,
        x=stack(xs).astype(np.float32),
        y=stack(ys).astype(np.float32),
        size=sizes,
        angle=angle,
        tone=tone,
        sign_present=sign_present,
        sign_color=sign_color,
        sign_text=texts,
        sign_length=lengths,
        sign_number=numbers.astype(np.int32),
        sign_x=sign_xs.astype(np.float32),
        sign_y=sign_ys.astype(np.float32),
        sign_height=letter,
        sign_angle=sign_angle,
        style=drawn,
        contrast=contrast,
        clutter=full * d.clutter,
        backdrop=backdrop.astype(np.float32),
        noise_seed=(backdrop[:, 0] * 2**24).astype(np.int32),
        width=full * wide,
        height=full * high,
    )


def grid_cell(xp: Any, layout: Layout, x: Any, y: Any) -> tuple[Any, Any]:
    """Row and column (0..2) of points [B, n] in the 3 x 3 grid of the picture."""
    row = xp.clip((y * 3 / layout.height[:, None]).astype(np.int32), 0, 2)
    return row, xp.clip((x * 3 / layout.width[:, None]).astype(np.int32), 0, 2)


def scene_uniforms(rng: np.random.Generator, count: int) -> np.ndarray:
    """float32 [count, UNIFORMS_PER_SCENE] from a host generator."""
    return rng.random((count, UNIFORMS_PER_SCENE), dtype=np.float32)
