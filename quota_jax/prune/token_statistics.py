"""Two numbers about a layer's visual tokens: attention from the text on its favourites, and how
alike the tokens are.

No query-key matrix over the whole sequence is held: text queries go in blocks, and a bounded number
of tokens is compared.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from quota_jax.prune.select import Sequence

BLOCK = 64
NEGATIVE = -1e30


def top_text_attention(
    query: Float[Array, "B S N H"],
    key: Float[Array, "B S K H"],
    sequence: Sequence,
    *,
    top: int,
    sm_scale: float,
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """Attention of a text query on the ``top`` visual tokens it attends to most; the mean over the
    text queries that stand behind a visual token.

    The attention map is the mean over heads. First result: as a part of all attention of the query
    (visual tokens fewer than ``top`` count all); second: as a part of its attention on visual
    tokens. NaN for samples without such a query. Grouped queries: head n reads key head
    ``n // (N / K)``.
    """
    batch, length, heads, width = query.shape
    nothing = jnp.full((batch,), jnp.nan, jnp.float32)
    if not sequence.visual_bucket or not sequence.text_bucket:
        return nothing, nothing
    groups = key.shape[2]
    visual, places = sequence.is_visual, jnp.arange(length)
    behind = sequence.is_text & (jnp.cumsum(visual, axis=1) > 0)
    # At most text_bucket queries count: they come first.
    order = jnp.argsort(~behind, axis=1, stable=True)[:, : sequence.text_bucket]
    order = jnp.pad(order, [(0, 0), (0, -order.shape[1] % BLOCK)])
    used = jnp.arange(order.shape[1])[None] < behind.sum(1, keepdims=True)
    key = key.astype(jnp.float32)

    def block(index):
        rows, counted = (
            jax.lax.dynamic_slice_in_dim(array, index * BLOCK, BLOCK, axis=1)
            for array in (order, used)
        )
        queries = jnp.take_along_axis(query, rows[..., None, None], axis=1)
        queries = queries.astype(jnp.float32) * sm_scale
        queries = queries.reshape(batch, BLOCK, groups, heads // groups, width)
        scores = jnp.einsum("btkgh,bskh->bkgts", queries, key, precision="highest")
        seen = places[None, None] <= rows[..., None]  # causal; padding stands behind all queries
        weights = jax.nn.softmax(jnp.where(seen[:, None, None], scores, NEGATIVE), axis=-1)
        paid = jnp.where(visual[:, None] & seen, weights.mean((1, 2)), 0.0)
        best = jax.lax.top_k(paid, min(top, length))[0].sum(-1)
        total = paid.sum(-1)
        share = best / jnp.where(total > 0, total, 1.0)
        return tuple(jnp.where(counted, part, 0.0).sum(1) for part in (best, share))

    sums = jax.lax.map(block, jnp.arange(order.shape[1] // BLOCK))
    count = behind.sum(1)
    found = [jnp.where(count > 0, part.sum(0) / jnp.maximum(count, 1), jnp.nan) for part in sums]
    return found[0], found[1]


def median_cosine(x: Float[Array, "B S D"], tokens: Int[Array, "B M"]) -> Float[Array, " B"]:
    """The median cosine of all pairs of two different ``tokens`` (places; -1 is none).

    NaN where there are fewer than two. A token of zeros has cosine 0 with all others.
    """
    batch, count = tokens.shape
    if count < 2:
        return jnp.full((batch,), jnp.nan, jnp.float32)
    rows = jnp.take_along_axis(x, jnp.maximum(tokens, 0)[..., None], axis=1).astype(jnp.float32)
    norm = jnp.sqrt(jnp.square(rows).sum(-1, keepdims=True))
    unit = rows / jnp.maximum(norm, 1e-12)
    cosine = jnp.einsum("bid,bjd->bij", unit, unit, precision="highest")
    one, other = np.triu_indices(count, 1)
    # -1 stands only behind the last token, so the later one of a pair decides.
    pairs = jnp.where(tokens[:, other] >= 0, cosine[:, one, other], jnp.inf)
    pairs = jnp.sort(pairs, axis=1)
    real = (tokens >= 0).sum(1)
    number = real * (real - 1) // 2
    middle = jnp.stack([(number - 1) // 2, number // 2], axis=1)
    found = jnp.take_along_axis(pairs, jnp.maximum(middle, 0), axis=1).mean(1)
    return jnp.where(number > 0, found, jnp.nan)
