"""Training forward pass of Qwen2.5-VL's eyes: window-attention tower and patch merger.

All pictures of a batch have one static size, so the order of the patches, the windows and the
rotations are constants. Windows stand in the order of their sizes, the whole ones first: then
padding them to one length is a few slices, not a gather (whose gradient would scatter).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from quota_jax.config import QwenVisionConfig, QwenVlConfig
from quota_jax.processing.windows import patch_coordinates, window_order
from quota_jax.testbed.learning.layers import (
    Params,
    attention,
    heads,
    linear,
    rms_norm,
    rotate,
    scan_layers,
)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Grid:
    """How a picture of one size stands in the tower.

    coordinates: row and column of each patch [N, 2], in the tower's order.
    tokens: for each visual token of the tower, its place row by row [N / merge_unit].
    window_lengths: patches of each window, falling.
    """

    coordinates: np.ndarray
    tokens: np.ndarray
    window_lengths: np.ndarray


@functools.lru_cache
def picture_grid(config: QwenVisionConfig, size: tuple[int, int]) -> Grid:
    """The order of a picture of ``size`` (height, width) pixels, multiples of merge x patch."""
    rows, columns = (edge // config.patch_size for edge in size)
    merge = config.spatial_merge_size
    order = window_order(rows // merge, columns // merge, config.window_units)
    starts = np.cumsum(order.lengths) - order.lengths
    by_size = np.argsort(-order.lengths, kind="stable")
    tokens = np.concatenate(
        [order.order[starts[w] : starts[w] + order.lengths[w]] for w in by_size]
    )
    coordinates = patch_coordinates(rows, columns, merge)[tokens].reshape(-1, 2)
    return Grid(
        coordinates=coordinates,
        tokens=tokens,
        window_lengths=order.lengths[by_size] * config.merge_unit,
    )


def axial_angles(config: QwenVisionConfig, grid: Grid) -> np.ndarray:
    """Angles [N, H/2]: half of the pairs turn by the row, half by the column."""
    half = np.arange(0, config.head_dim // 2, 2) / (config.head_dim // 2)
    frequencies = 1.0 / config.rope_theta**half
    return (grid.coordinates[..., None] * frequencies).reshape(len(grid.coordinates), -1)


def vision_features(
    params: Params,
    config: QwenVlConfig,
    pixels: Float[Array, "B 3 height width"],
    *,
    dtype: Any,
    backend: str,
) -> Float[Array, "B N D"]:
    """States of all patches after the last layer, in the order of `picture_grid`; from normalised
    pixels."""
    v = config.vision
    batch, _, height, width = pixels.shape
    grid, p = picture_grid(v, (height, width)), v.patch_size
    patches = pixels.reshape(batch, 3, height // p, p, width // p, p)
    patches = patches.transpose(0, 2, 4, 1, 3, 5).reshape(batch, -1, 3 * p * p).astype(dtype)
    place = grid.coordinates[:, 0] * (width // p) + grid.coordinates[:, 1]
    # Both frames of a still picture are the same: their weights add up.
    weight = params["vision.patch_embed.weight"].sum(2).reshape(v.hidden_size, -1)
    x = linear(patches[:, place], weight)
    angles = axial_angles(v, grid)
    lengths = np.tile(grid.window_lengths, batch)
    most = int(grid.window_lengths.max())

    def layer(x: Any, w: Params, full: bool) -> Any:
        h = rms_norm(x, w["norm1.scale"], v.norm_eps)
        qkv = linear(h, w["attn.qkv.weight"], w["attn.qkv.bias"])
        q, k, val = heads(qkv, v.head_dim, *[v.num_heads] * 3)
        q, k = rotate(q, angles), rotate(k, angles)
        if full:
            h = attention(q, k, val, causal=False, backend=backend)
        else:
            q, k, val = (to_windows(part, grid.window_lengths, most) for part in (q, k, val))
            h = attention(q, k, val, causal=False, backend=backend, valid=lengths)
            h = from_windows(h, grid.window_lengths)
        x = x + linear(h.reshape(x.shape), w["attn.o.weight"], w["attn.o.bias"])
        h = rms_norm(x, w["norm2.scale"], v.norm_eps)
        gate, up = jnp.split(linear(h, w["mlp.gate_up.weight"], w["mlp.gate_up.bias"]), 2, axis=-1)
        return x + linear(jax.nn.silu(gate) * up, w["mlp.down.weight"], w["mlp.down.bias"])

    def kind(index: int) -> bool:
        return index in v.full_attention_layers

    for full, group in groupby(range(v.num_layers), key=kind):
        run = list(group)
        x = scan_layers(
            functools.partial(layer, full=full),
            x,
            params,
            "vision.layers.",
            range(run[0], run[-1] + 1),
        )
    return x


def visual_tokens(
    params: Params,
    config: QwenVlConfig,
    features: Float[Array, "B N F"],
    size: tuple[int, int],
) -> Float[Array, "B V D"]:
    """The merger; tokens come out row by row."""
    v = config.vision
    x = rms_norm(features, params["projector.norm.scale"], v.norm_eps)
    x = x.reshape(x.shape[0], -1, v.merge_unit * x.shape[-1])
    x = linear(x, params["projector.linear_1.weight"], params["projector.linear_1.bias"])
    x = jax.nn.gelu(x, approximate=False)
    x = linear(x, params["projector.linear_2.weight"], params["projector.linear_2.bias"])
    tokens = picture_grid(v, size).tokens
    # A product with 0 and 1 moves rows as they are, and its gradient does not scatter.
    return jnp.asarray(np.arange(len(tokens))[:, None] == tokens, x.dtype) @ x


def _runs(lengths: np.ndarray) -> list[tuple[int, int]]:
    """(number of windows, patches of each) of neighboring windows of one size."""
    return [(len(list(group)), int(length)) for length, group in groupby(lengths.tolist())]


def to_windows(
    x: Float[Array, "B N heads H"], lengths: np.ndarray, most: int
) -> Float[Array, "BW most heads H"]:
    """Cuts patches into windows, each padded with zeros to ``most`` patches."""
    pieces, start, tail = [], 0, x.shape[2:]
    for count, length in _runs(lengths):
        piece = x[:, start : start + count * length].reshape(x.shape[0], count, length, *tail)
        pieces.append(jnp.pad(piece, [(0, 0), (0, 0), (0, most - length), (0, 0), (0, 0)]))
        start += count * length
    return jnp.concatenate(pieces, axis=1).reshape(-1, most, *tail)


def from_windows(
    x: Float[Array, "BW most heads H"], lengths: np.ndarray
) -> Float[Array, "B N heads H"]:
    """The inverse of `to_windows`."""
    tail = x.shape[2:]
    x = x.reshape(-1, len(lengths), *x.shape[1:])
    pieces, start = [], 0
    for count, length in _runs(lengths):
        piece = x[:, start : start + count, :length]
        pieces.append(piece.reshape(x.shape[0], count * length, *tail))
        start += count
    return jnp.concatenate(pieces, axis=1)
