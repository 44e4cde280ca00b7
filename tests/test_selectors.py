"""Peers' scores against direct, slow numpy implementations, one sample at a time."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quota_jax.errors import QuotaError
from quota_jax.prune.selectors import (
    div_prune_ranks,
    fastv_scores,
    pyramid_drop_scores,
    random_scores,
    stride_scores,
    withdrawal_layer,
)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


fastv: Any = jax.jit(fastv_scores, static_argnames="sm_scale")
div_prune: Any = jax.jit(div_prune_ranks, static_argnames="count")


# ---- attention of one query


def slow_attention(query, key, place):
    """Mean over heads of softmax(q k / sqrt(H)) of the query at ``place``; [N, H], [S, K, H]."""
    heads, dim = query.shape
    out = np.zeros(key.shape[0])
    for head in range(heads):
        keys = key[: place + 1, head // (heads // key.shape[1])].astype(np.float64)
        scores = keys @ query[head].astype(np.float64) / np.sqrt(dim)
        weights = np.exp(scores - scores.max())
        out[: place + 1] += weights / weights.sum() / heads
    return out


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 4, 16), (6, 2, 40), (7, 1, 80)])
def test_fastv_and_pyramid_drop_score_by_one_query(heads, kv_heads, dim):
    query, key = 3 * normal(3, 50, heads, dim), normal(3, 50, kv_heads, dim, seed=1)
    lengths, instruction = np.array([50, 31, 1]), np.array([44, 30, 0])
    arrays = jnp.asarray(query), jnp.asarray(key)
    last = fastv_scores(*arrays, jnp.asarray(lengths), sm_scale=dim**-0.5)
    pyramid = pyramid_drop_scores(*arrays, jnp.asarray(instruction), sm_scale=dim**-0.5)
    for b in range(3):
        for found, place in ((last, lengths[b] - 1), (pyramid, instruction[b])):
            expected = slow_attention(query[b, place], key[b], place)
            np.testing.assert_allclose(found[b], expected, atol=2e-6)
            np.testing.assert_allclose(found[b].sum(), 1, rtol=1e-5)
    assert np.abs(np.asarray(last[0] - pyramid[0])).max() > 0.01


def test_one_query_attention_by_hand():
    # Two heads share one key head; scores of head 0: ln 3 and 0, of head 1: 0 and 0.
    query = jnp.asarray([[[[9.0, 9.0]] * 2, [[np.log(3), 0.0], [0.0, 0.0]]]])
    key = jnp.asarray([[[[1.0, 0.0]], [[0.0, 1.0]]]])
    found = fastv_scores(query, key, jnp.asarray([2]), sm_scale=1.0)
    np.testing.assert_allclose(found, [[(0.75 + 0.5) / 2, (0.25 + 0.5) / 2]], rtol=1e-6)


@settings(max_examples=10, deadline=None)
@given(
    st.sampled_from([(4, 2, 16), (1, 1, 16), (3, 1, 40)]),
    st.sampled_from([1, 33, 90]),
    st.sampled_from([0, 1, 40]),
    st.integers(0, 2),
)
def test_neither_padding_nor_neighbours_change_a_bit_of_attention(
    shape, length, padding, neighbours
):
    heads, kv_heads, dim = shape
    query = normal(1 + neighbours, length + padding, heads, dim)
    key = normal(1 + neighbours, length + padding, kv_heads, dim, seed=1)
    lengths = np.full(1 + neighbours, length)
    alone = fastv(query[:1, :length], key[:1, :length], lengths[:1], sm_scale=0.25)
    query[0, length:], key[0, length:] = 77.0, -5.0
    beside = fastv(query, key, lengths, sm_scale=0.25)
    np.testing.assert_array_equal(alone[0], beside[0, :length])


# ---- DivPrune


def slow_div_prune(features, count):
    """The authors' procedure on one sample's visual tokens; picked indices in order."""
    x = features.astype(np.float64)
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    distance = 1 - x @ x.T
    picked: list[int] = []
    while len(picked) < min(count, len(x)):
        best, best_gap = -1, -np.inf
        for i in range(len(x)):
            if i in picked:
                continue
            rest = picked or [j for j in range(len(x)) if j != i]
            gap = min((distance[i, j] for j in rest), default=np.inf)
            if gap > best_gap:
                best, best_gap = i, gap
        picked.append(best)
    return picked


def picks(ranks, count):
    order = np.argsort(ranks, kind="stable")
    return [int(i) for i in order if ranks[i] < len(ranks)][:count]


@pytest.mark.parametrize("count", [1, 2, 9, 30, 100])
def test_div_prune_equals_the_slow_procedure(count):
    rng = np.random.default_rng(3)
    features = normal(4, 70, 12)
    features[:, 40:] = 50 * rng.standard_normal((4, 30, 1))  # text: never compared
    masks = np.zeros((4, 70), bool)
    masks[0, 5:40] = masks[1, [1, 3, 4, 20]] = masks[2, 7] = True  # the last has no picture
    ranks = np.asarray(div_prune_ranks(jnp.asarray(features), jnp.asarray(masks), count))
    for b, mask in enumerate(masks):
        places = np.flatnonzero(mask)
        expected = [int(places[i]) for i in slow_div_prune(features[b, mask], count)]
        assert picks(ranks[b], count) == expected
        assert (ranks[b][~mask] == 70).all()
        assert sorted(ranks[b][expected]) == list(range(len(expected)))


def test_div_prune_by_hand_with_ties():
    # Directions 0, 0, 180, 90 degrees: token 2 and 3 are 1 from their nearest, the tie goes to 2;
    # then 0 and 1 are 2 away from it, the tie goes to 0; then 3; the copy 1 comes last.
    features = jnp.asarray([[[1.0, 0], [2.0, 0], [-3.0, 0], [0, 5.0]]])
    ranks = div_prune_ranks(features, jnp.ones((1, 4), bool), 4)
    np.testing.assert_array_equal(ranks, [[1, 3, 0, 2]])
    # The picks of a smaller budget are the first ones of a larger budget.
    np.testing.assert_array_equal(
        div_prune_ranks(features, jnp.ones((1, 4), bool), 2), [[1, 4, 0, 4]]
    )


def test_div_prune_survives_tokens_of_zeros():
    ranks = div_prune_ranks(jnp.zeros((1, 3, 4)), jnp.ones((1, 3), bool), 3)
    np.testing.assert_array_equal(ranks, [[0, 1, 2]])


@settings(max_examples=10, deadline=None)
@given(st.sampled_from([1, 20, 80]), st.sampled_from([0, 1, 50]), st.integers(0, 2))
def test_neither_padding_nor_neighbours_change_div_prune(length, padding, neighbours):
    features = normal(1 + neighbours, length + padding, 32, seed=length)
    mask = np.random.default_rng(length).random((1 + neighbours, length + padding)) < 0.8
    mask[0, length:] = False
    alone = np.asarray(div_prune(features[:1, :length], mask[:1, :length], length))
    beside = np.asarray(div_prune(features, mask, length))
    assert picks(alone[0], length) == picks(beside[0], length)


# ---- controls


def test_stride_equals_the_slow_rule():
    mask = np.random.default_rng(0).random((3, 60)) < 0.6
    mask[2] = False
    target = np.array([7, 30, 0])
    found = np.asarray(stride_scores(jnp.asarray(mask), jnp.asarray(target)))
    for b in range(2):
        places, n = np.flatnonzero(mask[b]), int(mask[b].sum())
        k = min(int(target[b]), n)
        chosen = [p for i, p in enumerate(places) if (i + 1) * k // n > i * k // n]
        assert len(chosen) == k
        np.testing.assert_array_equal(np.flatnonzero(found[b] * mask[b]), chosen)
        gaps = np.diff(np.searchsorted(places, chosen))
        assert gaps.max() - gaps.min() <= 1
    assert not found[2].any()


def test_random_draws_depend_on_the_ordinal_and_the_seed_alone():
    mask = np.zeros((2, 40), bool)
    mask[0, 5:25] = mask[1, 10:30] = True
    found = np.asarray(random_scores(jnp.asarray(mask), 3))
    np.testing.assert_array_equal(found[0, 5:25], found[1, 10:30])
    one = [float(jax.random.uniform(jax.random.fold_in(jax.random.key(3), i))) for i in range(20)]
    np.testing.assert_array_equal(found[0, 5:25], np.asarray(one, np.float32))
    other = np.asarray(random_scores(jnp.asarray(mask), 4))
    assert (found[0, 5:25] != other[0, 5:25]).all()


# ---- VTW


def test_withdrawal_layer_is_the_first_below_the_threshold():
    # Two tokens, p = (1/2, 1/2); KL(p || q) = -ln(2 sqrt(q (1 - q))).
    full = np.zeros((2, 2))

    def logits(q):
        return np.full((2, 2), np.log([q, 1 - q]))

    withdrawn = np.stack([logits(0.1), logits(0.4), logits(0.45), logits(0.5)])
    divergences = [-np.log(2 * np.sqrt(q * (1 - q))) for q in (0.1, 0.4, 0.45)]
    assert divergences[1] == pytest.approx(0.0204, abs=1e-4)
    assert withdrawal_layer(full, withdrawn, [5, 6, 7, 8], eta=0.021) == 6
    assert withdrawal_layer(full, withdrawn, [5, 6, 7, 8], eta=0.006) == 7
    assert withdrawal_layer(full, withdrawn, [5, 6, 7, 8]) == 8
    # The mean over samples decides, and logits may be shifted by any constant.
    mixed = withdrawn[:1].copy()
    mixed[0, 1] = 1000.0
    assert withdrawal_layer(full, mixed, [5], eta=divergences[0] / 2 + 1e-9) == 5
    with pytest.raises(QuotaError, match=r"no layer of \[5\] has mean KL <= 0.1; the smallest is"):
        withdrawal_layer(full, withdrawn[:1], [5], eta=0.1)
    with pytest.raises(QuotaError, match="4 withdrawals for 1 layers"):
        withdrawal_layer(full, withdrawn, [5])
