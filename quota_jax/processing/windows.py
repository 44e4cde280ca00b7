"""Orders and positions of Qwen2.5-VL's patches and tokens, in plain numpy.

A frame is a grid of ``rows x columns`` patches; ``merge x merge`` of them are one visual token.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowOrder:
    """One frame's visual tokens sorted by attention window, row by row inside each.

    order: for each place the token (counted row by row) that stands there. place: the inverse.
    lengths: tokens of each window.

    A frame of 3 x 3 tokens in windows of 2 x 2: order [0 1 3 4 | 2 5 | 6 7 | 8].
    """

    order: np.ndarray
    place: np.ndarray
    lengths: np.ndarray


@functools.lru_cache(maxsize=256)
def window_order(rows: int, columns: int, side: int) -> WindowOrder:
    """The order of ``rows x columns`` tokens in windows of ``side x side``."""
    row, column = np.divmod(np.arange(rows * columns), columns)
    window = row // side * -(-columns // side) + column // side
    order = np.argsort(window, kind="stable")
    return WindowOrder(order=order, place=np.argsort(order), lengths=np.bincount(window))


def patch_coordinates(rows: int, columns: int, merge: int) -> np.ndarray:
    """Row and column of every patch ``[tokens, merge * merge, 2]``, tokens counted row by row."""
    row, column = np.indices((rows, columns))
    grid = np.stack([row, column], axis=-1)
    grid = grid.reshape(rows // merge, merge, columns // merge, merge, 2)
    return grid.transpose(0, 2, 1, 3, 4).reshape(-1, merge * merge, 2)


def rope_positions(
    visual: np.ndarray, grids: Sequence[tuple[int, int, int]], frame_steps: Sequence[float]
) -> np.ndarray:
    """Three-stream positions ``[tokens, 3]`` of a prompt (M-RoPE: frame, row, column).

    Text tokens count on in all streams. A picture's tokens start together at the next number, add
    their frame (times ``frame_steps``, rounded down), row and column to it, and the text after it
    goes on behind its longer side.

    Args:
        visual: bool[n], which ids of the prompt stand for a picture (one each).
        grids: frames, rows and columns of *tokens* of each picture.
    """
    streams, start, picture = [], 0, 0
    for is_picture in visual:
        if not is_picture:
            streams.append(np.full((1, 3), start))
            start += 1
            continue
        frames, rows, columns = grids[picture]
        grid = np.moveaxis(np.indices((frames, rows, columns)), 0, -1).reshape(-1, 3)
        grid[:, 0] = (grid[:, 0] * np.float32(frame_steps[picture])).astype(np.int64)
        streams.append(start + grid)
        start += max(rows, columns)
        picture += 1
    return np.concatenate(streams)
