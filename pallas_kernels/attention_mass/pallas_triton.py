"""Column sums of causal attention in two launches on tensor cores (NVIDIA GPUs).

A softmax normalises rows, and the sums run down columns: a row's sum must be known before any
column can be added up. So scores are made twice and never stored.

  1. A program owns a tile of queries, walks over the keys up to the diagonal and writes the
     log-sum-exp of each row, with a running maximum and sum (Milakov and Gimelshein 2018).
  2. A program owns a tile of keys, walks over the queries from the diagonal on, makes the
     transposed scores ``K Q^T`` once more, and adds ``exp(score - log-sum-exp)`` along its rows,
     for text and for visual queries apart.

Each head writes its own columns and XLA sums the heads: no atomics, so a run repeats its bits.

Exponents are in base 2 (``exp2`` is one instruction), products in the 16 bits of the inputs with
float32 sums; scale and softmax are float32. A product of two 16-bit values is exact in float32, so
scores differ from the reference's by the rounding of float32 sums alone, and a weight by that error
times itself. Sizes a tile does not divide and heads of no power of two are padded by masks.

Pallas' Triton back end is deprecated in jax 0.11; see ``int4_matmul.pallas_triton``. The way out
here is ``impl="xla"``.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.attention_mass.reference import NEGATIVE

BEYOND, TEXT, VISUAL = 0, 1, 2
"""What stands at a place: nothing, or a token of one kind."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Tokens a program owns, tokens it reads at a time (powers of two, 16 at least), its warps and
    the stages its loads are pipelined in.

    At heads of 128 the tile it owns and two of those it reads are 48 KB of shared memory, and ptxas
    gives a thread 104 registers: four programs fit on a multiprocessor of an H100. 32 heads of 640
    tokens make 320 programs, which run at once on its 132; tiles of 128 rows would make 160 of
    twice the work, an uneven load. Chosen by this reasoning, not yet by measurement.
    """

    rows: int = 64
    columns: int = 64
    warps: int = 4
    stages: int = 2


def column_mass_triton(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    lengths: Int[Array, " B"],
    is_visual: Bool[Array, "B T"],
    *,
    sm_scale: float,
    plan: Plan | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """See ``pallas_kernels.attention_mass.attention_mass``; ``query`` and ``key`` have one 16-bit
    dtype, ``H`` is at most 128."""
    batch, length, heads, _ = query.shape
    plan = plan or Plan()
    place = jnp.arange(length)
    kind = jnp.where(is_visual, VISUAL, TEXT)
    kind = jnp.where(place[None] < lengths[:, None], kind, BEYOND).astype(jnp.int32)
    options: dict[str, Any] = {
        "group": heads // key.shape[2],
        "plan": plan,
        # Base 2: exp(x) = exp2(x / log 2).
        "scale": sm_scale / math.log(2),
    }

    def call(kernel, inputs, outputs):
        return pl.pallas_call(
            functools.partial(kernel, **options),
            # Programs start in the order of the first axis, then the second: the longest walks of
            # all heads first.
            grid=(heads, batch, pl.cdiv(length, plan.rows)),
            in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * inputs,
            out_specs=[pl.BlockSpec(memory_space=pl.ANY)] * outputs,
            out_shape=[jax.ShapeDtypeStruct((batch, heads, length), jnp.float32)] * outputs,
            compiler_params=plt.CompilerParams(num_warps=plan.warps, num_stages=plan.stages),
            interpret=interpret,
        )

    (row_sum,) = call(_rows, 3, 1)(query, key, lengths)
    inter, intra = call(_columns, 5, 2)(query, key, lengths, kind, row_sum)
    return inter.sum(1) / heads, intra.sum(1) / heads


class _Tiles:
    """Loads tiles of queries and keys of one head; 0 at or past the sample's length."""

    def __init__(self, head_dim: int, length: Array, sample: Array) -> None:
        self.length, self.sample = length, sample
        self.dim = jnp.arange(max(16, 1 << (head_dim - 1).bit_length()))
        self.inside = self.dim < head_dim

    def load(self, ref: Any, token: Array, head: Array) -> Array:
        """``[len(token), H]``, H padded."""
        place = ref.at[self.sample, token[:, None], head, self.dim[None]]
        mask = (token < self.length)[:, None] & self.inside[None]
        return plt.load(place, mask=mask, other=0)


def _product(left: Array, right: Array) -> Array:
    """``left right^T``, float32."""
    return lax.dot_general(
        left, right, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )


def _rows(query_ref, key_ref, length_ref, sum_ref, *, group: int, plan: Plan, scale: float) -> None:
    """Base-2 log-sum-exp of ``plan.rows`` queries, ``[B, N, T]``; 0 at or past the length."""
    _, total, _, head_dim = query_ref.shape
    head, sample = pl.program_id(0), pl.program_id(1)
    # The last queries see most keys.
    tile = pl.num_programs(2) - 1 - pl.program_id(2)
    length = length_ref[sample]
    tiles = _Tiles(head_dim, length, sample)
    row = tile * plan.rows + jnp.arange(plan.rows)
    queries = tiles.load(query_ref, row, head)

    def step(index, carry):
        top, sums = carry
        column = index * plan.columns + jnp.arange(plan.columns)
        scores = _product(queries, tiles.load(key_ref, column, head // group)) * scale
        # Real queries see real keys alone, so the length needs no mask.
        scores = jnp.where(column[None] <= row[:, None], scores, NEGATIVE)
        # Every row sees key 0: after the first step the maximum is finite.
        new = jnp.maximum(top, scores.max(1))
        weights = jnp.exp2(scores - new[:, None])
        return new, sums * jnp.exp2(top - new) + weights.sum(1)

    # Tiles past the length take no step.
    end = jnp.minimum((tile + 1) * plan.rows, length)
    steps = jnp.where(tile * plan.rows < length, pl.cdiv(end, plan.columns), 0)
    start = jnp.full((plan.rows,), NEGATIVE, jnp.float32), jnp.ones((plan.rows,), jnp.float32)
    top, sums = lax.fori_loop(0, steps, step, start)
    out = jnp.where(row < length, top + jnp.log2(sums), 0.0)
    plt.store(sum_ref.at[sample, head, row], out, mask=row < total)


def _columns(
    query_ref,
    key_ref,
    length_ref,
    kind_ref,
    sum_ref,
    inter_ref,
    intra_ref,
    *,
    group: int,
    plan: Plan,
    scale: float,
) -> None:
    """What ``plan.rows`` keys receive from a head's text and visual queries, ``[B, N, T]`` each."""
    _, total, _, head_dim = query_ref.shape
    # The first keys are seen by most queries.
    head, sample, tile = (pl.program_id(axis) for axis in range(3))
    length = length_ref[sample]
    tiles = _Tiles(head_dim, length, sample)
    row = tile * plan.rows + jnp.arange(plan.rows)
    keys = tiles.load(key_ref, row, head // group)

    def step(index, carry):
        inter, intra = carry
        column = index * plan.columns + jnp.arange(plan.columns)
        real = column < length
        sums = plt.load(sum_ref.at[sample, head, column], mask=real, other=0.0)
        kind = plt.load(kind_ref.at[sample, column], mask=real, other=BEYOND)
        scores = _product(keys, tiles.load(query_ref, column, head)) * scale
        weights = jnp.exp2(scores - sums[None])  # above 1, even inf, where the mask leaves it out
        before, itself = row[:, None] < column[None], row[:, None] == column[None]
        text = before & (kind == TEXT)[None]
        visual = (before | itself) & (kind == VISUAL)[None]
        inter += jnp.where(text, weights, 0.0).sum(1)
        intra += jnp.where(visual, weights, 0.0).sum(1)
        return inter, intra

    zeros = jnp.zeros((plan.rows,), jnp.float32)
    first, end = (tile * plan.rows) // plan.columns, pl.cdiv(length, plan.columns)
    inter, intra = lax.fori_loop(first, end, step, (zeros, zeros))
    for ref, out in ((inter_ref, inter), (intra_ref, intra)):
        plt.store(ref.at[sample, head, row], out, mask=row < total)
