"""What is true in a scene, as tables: uniqueness, sides, neighbors, counts, nearest signs.

One definition for numpy and jax.numpy. Sides are numbered left, right, above, below. Every table
leaves out what is too close to call, so that a person would give the same answer.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from quota_jax.testbed.world.layout import MAX_OBJECTS, MAX_SIGNS, Layout, grid_cell
from quota_jax.testbed.world.vocabulary import COLORS, KINDS

BORDER = 6.0
"""Cells are asked only of objects this far (pixels) from the lines of the 3 x 3 grid."""
APART = 20.0
"""Two things are left/right (above/below) of each other from this distance in pixels on."""
NARROW, WIDE = 0.7, 1.5
"""The thing just on a side lies in the narrow cone (sideways offset at most 0.7 of the offset
along); it is the nearest of all in the wide cone."""
MARGIN = 1.25
"""The second nearest is at least this many times as far as the nearest."""
LARGER = 1.4
"""Ratio of sizes from which one object is larger than another."""
_NOWHERE = np.float32(1e9)


class Facts(NamedTuple):
    """Tables of a batch of scenes; object axis M, sign axis S.

    both [B, M, M]: two different present objects. unique_kind, unique_color, unique_pair [B, M].
    sides [B, 4, M, M]: i lies on that side of j. larger [B, M, M]: i is larger than j.
    beside [B, 4, M]: the object just on that side of j, and beside_valid.
    row, column [B, M]: cell of the 3 x 3 grid, cell_clear where it is not close to a line.
    kinds [B, 30], colors [B, 10]: how many objects. twin [B, M]: the other object of the kind where
    there are exactly two, twin_valid.
    sign_object [B, S]: object nearest to a sign; object_sign [B, M]: sign nearest to an object;
    with *_valid. extreme [B, 4]: leftmost, rightmost, highest, lowest sign, extreme_valid.
    """

    both: Any
    unique_kind: Any
    unique_color: Any
    unique_pair: Any
    sides: Any
    larger: Any
    beside: Any
    beside_valid: Any
    row: Any
    column: Any
    cell_clear: Any
    kinds: Any
    colors: Any
    twin: Any
    twin_valid: Any
    sign_object: Any
    sign_object_valid: Any
    object_sign: Any
    object_sign_valid: Any
    extreme: Any
    extreme_valid: Any


def _nearest(xp: Any, distance: Any, margin: float) -> tuple[Any, Any]:
    """Index of the smallest entry of the last axis; whether the next is `margin` times as large."""
    index = xp.argmin(distance, axis=-1)
    chosen = xp.arange(distance.shape[-1]) == index[..., None]
    first = xp.min(distance, axis=-1)
    second = xp.min(xp.where(chosen, _NOWHERE, distance), axis=-1)
    return index, (first < _NOWHERE) & (second >= margin * first)


def find_facts(layout: Layout, xp: Any = np) -> Facts:
    """The tables of a batch of scenes."""
    present = layout.present
    both = present[:, :, None] & present[:, None, :]
    same_kind = both & (layout.kind[:, :, None] == layout.kind[:, None, :])
    same_color = both & (layout.color[:, :, None] == layout.color[:, None, :])
    other = both & ~xp.eye(MAX_OBJECTS, dtype=bool)

    # [B, i, j]: how far i is right of (below) j.
    dx = layout.x[:, :, None] - layout.x[:, None, :]
    dy = layout.y[:, :, None] - layout.y[:, None, :]
    along = xp.stack([-dx, dx, -dy, dy], axis=1)
    across = xp.abs(xp.stack([dy, dy, dx, dx], axis=1))
    sides = (along > APART) & other[:, None]
    distance = (dx * dx + dy * dy)[:, None]
    wide = xp.where(sides & (across <= WIDE * along), distance, _NOWHERE)
    wide = xp.swapaxes(wide, 2, 3)  # B 4 j i
    beside, clear = _nearest(xp, wide, MARGIN**2)
    narrow = xp.swapaxes(across <= NARROW * along, 2, 3)
    beside_valid = clear & xp.take_along_axis(narrow, beside[..., None], axis=-1)[..., 0]

    row, column = grid_cell(xp, layout, layout.x, layout.y)
    cell_clear = present
    for centre, extent in ((layout.x, layout.width), (layout.y, layout.height)):
        for line in (1, 2):
            cell_clear = cell_clear & (xp.abs(centre - extent[:, None] * line / 3) >= BORDER)

    kinds = (present[..., None] & (layout.kind[..., None] == xp.arange(len(KINDS)))).sum(1)
    colors = (present[..., None] & (layout.color[..., None] == xp.arange(len(COLORS)))).sum(1)
    alike = same_kind & other

    dx = layout.sign_x[:, :, None] - layout.x[:, None, :]
    dy = layout.sign_y[:, :, None] - layout.y[:, None, :]
    pairs = layout.sign_present[:, :, None] & present[:, None, :]
    distance = xp.where(pairs, dx * dx + dy * dy, _NOWHERE)  # B S M
    sign_object, sign_object_valid = _nearest(xp, distance, MARGIN**2)
    object_sign, object_sign_valid = _nearest(xp, xp.swapaxes(distance, 1, 2), MARGIN**2)
    several = (layout.sign_present.sum(1) >= 2)[:, None]
    place = xp.stack([layout.sign_x, -layout.sign_x, layout.sign_y, -layout.sign_y], axis=1)
    place = xp.where(layout.sign_present[:, None], place, _NOWHERE)
    extreme = xp.argmin(place, axis=-1)
    rest = xp.where(xp.arange(MAX_SIGNS) == extreme[..., None], _NOWHERE, place).min(-1)

    return Facts(
        both=other,
        unique_kind=present & (same_kind.sum(-1) == 1),
        unique_color=present & (same_color.sum(-1) == 1),
        unique_pair=present & ((same_kind & same_color).sum(-1) == 1),
        sides=sides,
        larger=other & (layout.size[:, :, None] >= LARGER * layout.size[:, None, :]),
        beside=beside,
        beside_valid=beside_valid,
        row=row,
        column=column,
        cell_clear=cell_clear,
        kinds=kinds,
        colors=colors,
        twin=xp.argmax(alike, axis=-1),
        twin_valid=alike.sum(-1) == 1,
        sign_object=sign_object,
        sign_object_valid=sign_object_valid & layout.sign_present,
        object_sign=object_sign,
        object_sign_valid=object_sign_valid & present,
        extreme=extreme,
        extreme_valid=several & (rest - place.min(-1) >= APART),
    )
