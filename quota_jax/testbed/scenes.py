"""World scenes for evaluation, tests and a look by eye: pictures and exact metadata."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from quota_jax.errors import QuotaError
from quota_jax.testbed.world.layout import (
    IMAGE_SIZE,
    STYLES,
    Difficulty,
    Layout,
    sample_layout,
    scene_uniforms,
)
from quota_jax.testbed.world.renderer import render_nhwc
from quota_jax.testbed.world.vocabulary import COLORS, KINDS
from quota_jax.testbed.world.words import join_words, spell

_STREAM = 21
_MULTIPLE = 28


@dataclass(frozen=True, kw_only=True, slots=True)
class SceneObject:
    """One drawn object; centre and size (edge of its square) in pixels, y down."""

    kind: str
    color: str
    x: float
    y: float
    size: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Sign:
    """One sign: its text in lower case, color of the panel, centre and letter height in pixels."""

    text: str
    color: str
    x: float
    y: float
    height: float


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Scene:
    """What a scene shows; `layout` is the same with batch size 1.

    `image()` draws it. Objects are in drawing order, the largest first.
    """

    objects: tuple[SceneObject, ...]
    signs: tuple[Sign, ...]
    style: str
    size: tuple[int, int]
    layout: Layout

    def image(self) -> Image.Image:
        """The picture, for an image processor."""
        return Image.fromarray(np.array(render_nhwc(self.layout, self.size)[0]))


def describe_scene(layout: Layout, index: int) -> Scene:
    """Scene `index` of a batch (host arrays) as plain metadata."""
    one = Layout(*(np.asarray(field)[index : index + 1] for field in layout))
    objects = tuple(
        SceneObject(
            kind=KINDS[one.kind[0, i]],
            color=COLORS[one.color[0, i]],
            x=float(one.x[0, i]),
            y=float(one.y[0, i]),
            size=float(one.size[0, i]),
        )
        for i in np.flatnonzero(one.present[0])
    )
    signs = tuple(
        Sign(
            text=join_words(spell(one.sign_text[0, i])),
            color=COLORS[one.sign_color[0, i]],
            x=float(one.sign_x[0, i]),
            y=float(one.sign_y[0, i]),
            height=float(one.sign_height[0, i]),
        )
        for i in np.flatnonzero(one.sign_present[0])
    )
    return Scene(
        objects=objects,
        signs=signs,
        style=STYLES[one.style[0]],
        size=(int(one.height[0]), int(one.width[0])),
        layout=one,
    )


def draw_scenes(
    seed: int,
    count: int,
    *,
    difficulty: Difficulty | None = None,
    size: tuple[int, int] = (IMAGE_SIZE, IMAGE_SIZE),
    style: str | None = None,
) -> tuple[Scene, ...]:
    """`count` scenes of a seed; metadata are the same on every machine, pixels on one platform.

    `size` (height, width) in multiples of 28. Without `style` the three training styles are mixed.
    """
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise QuotaError(f"seed must be an integer of at least 0, got {seed!r}")
    if count < 0:
        raise QuotaError(f"the number of scenes must be at least 0, got {count!r}")
    if style is not None and style not in STYLES:
        raise QuotaError(f"unknown style {style!r}; known: {', '.join(STYLES)}")
    if any(edge % _MULTIPLE or edge < 8 * _MULTIPLE for edge in size):
        raise QuotaError(f"picture sizes are multiples of {_MULTIPLE} from 224 on, got {size}")
    layout = sample_layout(
        scene_uniforms(np.random.default_rng([_STREAM, seed]), count),
        Difficulty() if difficulty is None else difficulty,
        size=size,
        style=None if style is None else STYLES.index(style),
    )
    return tuple(describe_scene(layout, index) for index in range(count))
