"""Scores of QUOTA's peers and controls, as pure functions of arrays; higher is kept.

Batched with masks: one row per sample, scores of places that are no real visual token are never
compared. On CPU a sample's scores depend neither on padding nor on batch neighbours.
``scores.score`` maps a recipe's selectors to them. VTW needs no score: it is a stage that keeps 0,
at the layer that ``withdrawal_layer`` finds.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.stable import exp_difference, fixed_order_sum, rounded
from quota_jax.errors import QuotaError

BLOCK = 64
NEGATIVE = -1e30


def random_scores(is_visual: Bool[Array, "B S"], seed: int) -> Float[Array, "B S"]:
    """Uniform draws: the i-th visual token of every sample gets the same one.

    A control; positions as the recipe says (``keep`` by default).
    """
    ordinal = jnp.cumsum(is_visual, axis=1) - 1
    key = jax.random.key(seed)
    draw = jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(key, i)))
    return draw(ordinal.reshape(-1)).reshape(ordinal.shape)


def stride_scores(is_visual: Bool[Array, "B S"], target: Int[Array, " B"]) -> Float[Array, "B S"]:
    """1 for ``target`` evenly spaced visual tokens of a sample, 0 for the others.

    A control; positions as the recipe says (``keep`` by default).
    """
    ordinal = jnp.cumsum(is_visual, axis=1) - 1
    count = jnp.maximum(is_visual.sum(1), 1)[:, None]
    step = target[:, None]
    return ((ordinal + 1) * step // count > ordinal * step // count).astype(jnp.float32)


def query_attention(
    query: Float[Array, "B N H"],
    key: Float[Array, "B S K H"],
    place: Int[Array, " B"],
    *,
    sm_scale: float,
) -> Float[Array, "B S"]:
    """Attention of one query per sample, the one at ``place``, on the keys up to it; mean over
    heads.

    Queries and keys after rotation. Grouped queries: head ``n`` reads key head ``n // (N / K)``.
    float32. Without matrix products, whose summation order depends on the shape.
    """
    batch, num_heads, head_dim = query.shape
    kv_heads = key.shape[2]
    query = query.astype(jnp.float32).reshape(batch, 1, kv_heads, -1, head_dim) * sm_scale
    products = rounded(rounded(query) * key.astype(jnp.float32)[:, :, :, None])
    scores = fixed_order_sum(products).reshape(batch, -1, num_heads)
    seen = jnp.arange(key.shape[1])[None, :, None] <= place[:, None, None]
    scores = jnp.where(seen, scores, NEGATIVE)
    weights = jnp.where(seen, exp_difference(scores, scores.max(1, keepdims=True)), 0.0)
    total = fixed_order_sum(weights.swapaxes(1, 2))[:, None]
    return fixed_order_sum(rounded(weights / total)) / num_heads


def fastv_scores(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    lengths: Int[Array, " B"],
    *,
    sm_scale: float,
) -> Float[Array, "B T"]:
    """FastV: the last token's attention, mean over heads.

    As its code has it (pkunlp-icler/FastV; the paper averages over all queries): queries and keys
    of layer K-1, tokens dropped at the entry of layer K, original positions kept. As a stage: after
    the attention of layer K-1, whose own cache is not trimmed.
    """
    return pyramid_drop_scores(query, key, lengths - 1, sm_scale=sm_scale)


def pyramid_drop_scores(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    last_instruction: Int[Array, " B"],
    *,
    sm_scale: float,
) -> Float[Array, "B T"]:
    """PyramidDrop: attention of the last instruction token, mean over heads.

    Queries and keys are those of the layer about to run (its norm, projections and rotation),
    tokens dropped at its entry, positions renumbered (Cooperx521/PyramidDrop).
    """
    last = jnp.maximum(last_instruction, 0)
    row = jnp.take_along_axis(query, last[:, None, None, None], axis=1)[:, 0]
    return query_attention(row, key, last, sm_scale=sm_scale)


def div_prune_ranks(
    features: Float[Array, "B S D"], is_visual: Bool[Array, "B S"], count: int
) -> Int[Array, "B S"]:
    """DivPrune: the turn, from 0, in which max-min cosine distance picks each token.

    First the token farthest from its nearest other one, then again and again the one farthest from
    its nearest picked one; ties to the lowest index. ``features`` are the projector's outputs.
    Tokens not picked within ``count`` turns, and places that are not visual, rank ``S``. The first
    k turns are the picks for every budget k <= ``count``: ``-ranks`` is a score. Holds one
    ``S x S`` matrix of cosines. The authors' decoder sees the shorter sequence in ascending order
    (vbdi/divprune, issue 8), numbered without gaps (``renumber``).
    """
    batch, length, _ = features.shape
    padded = -(-length // BLOCK) * BLOCK
    features = jnp.pad(features.astype(jnp.float32), [(0, 0), (0, padded - length), (0, 0)])
    mask = jnp.pad(is_visual, [(0, 0), (0, padded - length)])
    norm = rounded(jnp.sqrt(fixed_order_sum(rounded(jnp.square(features)))))
    unit = jnp.where(mask[..., None], features / jnp.maximum(norm, 1e-12)[..., None], 0.0)
    cosine = jnp.einsum("bid,bjd->bij", unit, unit, precision="highest")
    distance = rounded(1.0 - cosine)

    others = mask[:, None] & ~jnp.eye(padded, dtype=bool)
    nearest = jnp.where(others, distance, jnp.inf).min(2)

    def turn(index, state):
        nearest, candidates, ranks = state
        pick = jnp.where(candidates, nearest, -jnp.inf).argmax(1)
        chosen = (jnp.arange(padded)[None] == pick[:, None]) & candidates
        row = jnp.take_along_axis(distance, pick[:, None, None], axis=1)[:, 0]
        # The first pick starts the distances to the picked set.
        nearest = jnp.where(index == 0, row, jnp.minimum(nearest, row))
        return nearest, candidates & ~chosen, jnp.where(chosen, index, ranks)

    ranks = jnp.full((batch, padded), length, jnp.int32)
    _, _, ranks = jax.lax.fori_loop(0, min(count, length), turn, (nearest, mask, ranks))
    return ranks[:, :length]


def withdrawal_layer(
    full: Float[np.ndarray, "samples vocab"],
    withdrawn: Float[np.ndarray, "layers samples vocab"],
    layers: Sequence[int],
    *,
    eta: float = 0.003,
) -> int:
    """VTW's K: the first of ``layers`` with mean KL(full || withdrawn at it) <= eta.

    Logits of the next token on some 20 samples; the authors search from layer 5 with eta .003
    (7B), .0005 (13B), 1e-4 (LLaVA-NeXT-7B). ``vtw.find_withdrawal`` runs the model for it.
    """
    return first_below(divergences(full, withdrawn).mean(1), layers, eta)


def divergences(
    full: Float[np.ndarray, "samples vocab"], withdrawn: Float[np.ndarray, "layers samples vocab"]
) -> Float[np.ndarray, "layers samples"]:
    """KL(full || withdrawn) of each sample in nats, from logits; float64."""
    log_full = _log_softmax(full)
    ratio = [(log_full - _log_softmax(logits)) for logits in withdrawn]
    return np.stack([(np.exp(log_full) * part).sum(-1) for part in ratio])


def first_below(means: Float[np.ndarray, " layers"], layers: Sequence[int], eta: float) -> int:
    """The first of ``layers`` whose mean divergence is at most ``eta``."""
    if len(means) != len(layers):
        raise QuotaError(f"logits of {len(means)} withdrawals for {len(layers)} layers")
    for layer, mean in zip(layers, means, strict=True):
        if mean <= eta:
            return layer
    raise QuotaError(
        f"withdrawing at no layer of {list(layers)} has mean KL <= {eta}; the smallest is "
        f"{min(means):.4g}"
    )


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
