"""Fig. 4: the visual tokens that each stage keeps, drawn over the pictures."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from quota_jax.figures.canvas import ORANGE, figure
from quota_jax.recipe import Stage

FADE = 0.86
"""How much of a dropped token's colour is gone."""
PANEL, NARROW, LABEL = 2.3, 1.6, 1.7
"""Inches across a panel: of a wide or square picture, and at least, for its title; and across the
labels."""


def draw_kept(
    pictures: Sequence[Float[np.ndarray, "rows columns 3"]],
    cells: Int[np.ndarray, "S 3"],
    stages: Sequence[tuple[str, Int[np.ndarray, " K"]]],
    path: Path,
    title: str = "",
    labels: Sequence[str] = (),
) -> None:
    """One row for each picture, one column before pruning and one after each stage.

    Dropped tokens fade to grey, and a line runs between them and the kept ones.

    Args:
        pictures: as the model sees them, values 0 to 1 (``pictures.seen_pictures``).
        cells: picture, row and column of each place of the sequence (``pictures.token_cells``).
        stages: name of each stage and the places that it keeps.
        labels: what is written to the left of each row; none leaves no room for it.
    """
    on_grid = cells[:, 1] >= 0
    columns: list[tuple[str, np.ndarray]] = [("", np.flatnonzero(on_grid)), *stages]
    ratios = [picture.shape[0] / picture.shape[1] for picture in pictures]
    width = max(NARROW, PANEL / max(1.0, max(ratios) / 1.5))
    heights = [width * ratio for ratio in ratios]
    widths = [LABEL] * bool(labels) + [width] * len(columns)
    lines = textwrap.wrap(title, int(sum(widths) * 13), max_lines=3, placeholder=" …")
    with figure(path, sum(widths), sum(heights) + 0.3 * len(heights) + 0.25 * len(lines)) as made:
        grid = made.subplots(
            len(pictures), len(widths), squeeze=False, height_ratios=heights, width_ratios=widths
        )
        if labels:
            for axis, label in zip(grid[:, 0], labels, strict=True):
                _write(axis, label)
            grid = grid[:, 1:]
        for number, picture in enumerate(pictures):
            here = on_grid & (cells[:, 0] == number)
            shape = tuple(cells[here, 1:].max(0) + 1)
            for axis, (name, places) in zip(grid[number], columns, strict=True):
                kept = np.zeros(shape, bool)
                chosen = places[here[places]]
                kept[cells[chosen, 1], cells[chosen, 2]] = True
                _panel(axis, picture, kept)
                count = f"{kept.sum()} of {here.sum()}" if name else f"{here.sum()} tokens"
                axis.set_title(f"{name}: {count}" if name and number == 0 else count)
        if lines:
            made.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=10)


def stage_name(stage: Stage) -> str:
    """Where a stage stands, in few words."""
    if stage.point == "input":
        return "input"
    return f"layer {stage.layer}" if stage.point == "after_attention" else f"before {stage.layer}"


def faded(
    picture: Float[np.ndarray, "rows columns 3"], kept: Bool[np.ndarray, "r c"]
) -> Float[np.ndarray, "rows columns 3"]:
    """The picture with dropped tokens faded to light grey; a token is an equal part of it."""
    tall, wide = (size // count for size, count in zip(picture.shape, kept.shape, strict=False))
    mask = np.repeat(np.repeat(kept, tall, 0), wide, 1)[..., None]
    grey = picture.mean(-1, keepdims=True)
    pale = (1 - FADE) * grey + FADE * 0.93
    return np.where(mask, picture, pale)


def _panel(axis: Any, picture: np.ndarray, kept: np.ndarray) -> None:
    rows, columns = kept.shape
    extent = (0, columns, rows, 0)
    axis.imshow(faded(picture, kept), extent=extent, interpolation="nearest", aspect="auto")
    axis.set_aspect(picture.shape[0] / picture.shape[1] * columns / rows)
    axis.set_axis_off()
    if not kept.all():
        axis.add_collection(_outline(kept))


def _write(axis: Any, label: str) -> None:
    """Text in the place of a panel, line by line, from its upper left corner."""
    lines = [part for line in label.splitlines() for part in textwrap.wrap(line, 25) or [""]]
    axis.set_axis_off()
    axis.text(0, 1, "\n".join(lines), va="top", fontsize=8, transform=axis.transAxes)


def _outline(kept: np.ndarray) -> Any:
    """Lines between kept and dropped cells, and along the picture's edge where cells are kept."""
    from matplotlib.collections import LineCollection

    padded = np.pad(kept, 1)
    across = np.argwhere(padded[1:, 1:-1] != padded[:-1, 1:-1])
    down = np.argwhere(padded[1:-1, 1:] != padded[1:-1, :-1])
    lines = [((c, r), (c + 1, r)) for r, c in across] + [((c, r), (c, r + 1)) for r, c in down]
    return LineCollection(lines, colors=ORANGE, linewidths=0.9, capstyle="projecting")
