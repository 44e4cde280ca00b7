"""QUOTA's metrics, their rescaling and their sum (Eq. 6-8) against values worked out by hand."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.attention import causal_attention
from pallas_kernels.attention_mass import attention_mass
from quota_jax.errors import QuotaError
from quota_jax.prune.scores import (
    QuotaWeights,
    inter,
    intra,
    magnitude,
    quota_score,
    rescale,
    residual,
)
from quota_jax.prune.weights import METRICS

T, F = True, False


def test_magnitude_is_the_norm_of_each_token():
    x = jnp.asarray([[[3.0, 4.0], [0.0, 0.0]], [[-6.0, 8.0], [1.0, 0.0]]])
    np.testing.assert_array_equal(magnitude(x), [[5, 0], [10, 1]])
    assert magnitude(x.astype(jnp.bfloat16)).dtype == jnp.float32


def test_residual_is_the_norm_of_the_rounding_error():
    # 4 bits: largest 7 -> scale 1, so 0.25 and -2.5 (to even: -2) are rounded off.
    x = jnp.asarray([[[7.0, 0.25, -2.5, 0.0], [7.0, 1.0, -3.0, 2.0]]])
    np.testing.assert_allclose(residual(x, 4), [[np.hypot(0.25, 0.5), 0]], rtol=1e-6)
    # 8 bits: the nearest multiples of 7/127.
    step = 7 / 127
    errors = [[0.25, 2.5], [1.0, 3.0, 2.0]]
    expected = [np.linalg.norm([v - round(v / step) * step for v in row]) for row in errors]
    np.testing.assert_allclose(residual(x, 8), [expected], rtol=1e-5)
    np.testing.assert_array_equal(residual(jnp.zeros((1, 2, 4)), 4), [[0, 0]])
    with pytest.raises(QuotaError, match=r"16-bit activations .* redistribute=True"):
        residual(x, 16)


def test_inter_and_intra_divide_by_the_queries():
    is_text = jnp.asarray([[T, F, F, T, T, F]])
    is_visual = jnp.asarray([[F, T, T, F, F, F]])
    sums = jnp.full((1, 6), 6.0)
    np.testing.assert_array_equal(inter(sums, is_text), [[3, 3, 3, 6, 6, 6]])
    np.testing.assert_array_equal(intra(sums, is_visual), [[3] * 6])
    # Token 1 is seen by the visual queries 1 and 2, token 2 by itself.
    np.testing.assert_array_equal(intra(sums, is_visual, causal_mean=True)[0, 1:3], [3, 6])
    nothing = jnp.zeros((1, 6), bool)
    for found in (
        inter(sums * 0, nothing),
        intra(sums * 0, nothing),
        intra(sums * 0, nothing, causal_mean=True),
    ):
        np.testing.assert_array_equal(found, np.zeros((1, 6)))


def test_inter_of_the_mass_is_the_mean_over_the_text_queries_after_a_token():
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.standard_normal((2, 90, n, 16)), jnp.float32) for n in (4, 2))
    lengths = jnp.asarray([90, 40])
    place = jnp.arange(90)[None]
    is_visual = jnp.asarray((place > 3) & (place < 30)) & jnp.ones((2, 1), bool)
    is_text = (place < lengths[:, None]) & ~is_visual
    mass, _ = attention_mass(q, k, lengths, is_visual, sm_scale=0.25)
    _, weights = causal_attention(q, k, k, lengths, sm_scale=0.25)
    weights = np.asarray(weights).mean(1)
    for b in range(2):
        for i in range(4, 30):
            later = [t for t in np.flatnonzero(is_text[b]) if t > i]
            expected = weights[b, later, i].mean()
            np.testing.assert_allclose(inter(mass, is_text)[b, i], expected, rtol=1e-5)


def test_rescale_clips_at_percentiles_of_real_visual_tokens():
    # 21 visual tokens 0..20: P5 = 1, P95 = 19. Padding and text must not count.
    metric = jnp.asarray([[1e9, *range(21), -1e9, np.nan]], jnp.float32)
    is_visual = jnp.asarray([[F, *[T] * 21, F, F]])
    found = np.asarray(rescale(metric, is_visual))[0]
    np.testing.assert_allclose(found[1:22], np.clip((np.arange(21) - 1) / 18, 0, 1), rtol=1e-6)
    np.testing.assert_array_equal(found[[0, 22, 23]], 0)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([7.0], [0.0]),  # one token: its percentiles are equal
        ([1.0, 3.0], [0.0, 1.0]),  # P5 = 1.1, P95 = 2.9
        ([2.0, 1.0, 2.0], [1.0, 0.0, 1.0]),  # ties stay ties
        ([5.0] * 9, [0.0] * 9),
        ([0.0] * 60 + [1.0], [0.0] * 61),  # one outlier lies beyond P95: still constant
        ([], []),
    ],
    ids=["one", "two", "ties", "constant", "outlier", "none"],
)
def test_rescale_of_few_constant_and_no_tokens(values, expected):
    count = len(values)
    metric = jnp.asarray([[*values, 99.0, np.inf]], jnp.float32)
    is_visual = jnp.asarray([[*[T] * count, F, F]])
    np.testing.assert_array_equal(rescale(metric, is_visual), [[*expected, 0, 0]])


def test_rescale_between_other_percentiles():
    metric = jnp.asarray([[0.0, 1.0, 4.0]])
    found = rescale(metric, jnp.ones((1, 3), bool), percentiles=(0.0, 100.0))
    np.testing.assert_array_equal(found, [[0, 0.25, 1]])
    with pytest.raises(QuotaError, match=r"got \(95.0, 5.0\)"):
        rescale(metric, jnp.ones((1, 3), bool), percentiles=(95.0, 5.0))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 70), st.integers(0, 1000))
def test_rescale_equals_numpy_percentiles(count, seed):
    padding = 80 - count
    rng = np.random.default_rng(seed)
    values = rng.lognormal(size=count).astype(np.float32)
    metric = np.concatenate([values, rng.standard_normal(padding).astype(np.float32)])
    is_visual = np.arange(count + padding) < count
    found = np.asarray(rescale(jnp.asarray(metric[None]), jnp.asarray(is_visual[None])))[0]
    low, high = np.percentile(values.astype(np.float64), [5, 95])
    expected = (np.clip(values, low, high) - low) / (high - low) if count > 1 else np.zeros(1)
    np.testing.assert_allclose(found[:count], expected, atol=1e-5)
    assert not found[count:].any()


def test_score_by_hand():
    # Two tokens rescale to 0 and 1: each metric adds its weight to the token that is larger.
    is_visual = jnp.asarray([[F, T, T, F]])
    metrics = {
        "inter": jnp.asarray([[9.0, 1, 2, 9]]),
        "magnitude": jnp.asarray([[9.0, 5, 4, 9]]),
        "intra": jnp.asarray([[9.0, 1, 2, 9]]),
        "residual": jnp.asarray([[9.0, 3, 3, 9]]),
    }
    found = quota_score(metrics, is_visual)
    np.testing.assert_allclose(found, [[0, 0.25, 0.55, 0]], rtol=1e-6)
    # Without the residual its .20 goes to the others: .45 + .20/3, .25 + .20/3, .10 + .20/3.
    del metrics["residual"]
    with pytest.raises(QuotaError, match=r"no residual to score by .* redistribute=True"):
        quota_score(metrics, is_visual)
    found = quota_score(metrics, is_visual, redistribute=True)
    np.testing.assert_allclose(found, [[0, 0.25 + 0.2 / 3, 0.55 + 0.4 / 3, 0]], rtol=1e-6)
    only = quota_score(
        metrics, is_visual, QuotaWeights(inter=1.0, magnitude=0.0, intra=0.0, residual=0.0)
    )
    np.testing.assert_array_equal(only, [[0, 0, 1, 0]])


def test_a_sample_without_a_picture_scores_zero():
    metrics = {name: jnp.full((2, 5), np.inf) for name in METRICS}
    metrics = {name: value.at[1].set(jnp.arange(5.0)) for name, value in metrics.items()}
    is_visual = jnp.asarray([[F] * 5, [T] * 5])
    found = np.asarray(quota_score(metrics, is_visual))
    np.testing.assert_array_equal(found[0], 0)
    np.testing.assert_allclose(found[1, [0, 2, 4]], [0, 0.5, 1], atol=1e-6)


@pytest.mark.parametrize("left_out", [(), ("magnitude",), ("inter", "residual")])
def test_weights_as_arrays_give_the_same_score(left_out):
    """One program for all weights; a metric of weight 0 is as good as left out."""
    key, weights = jax.random.key(0), QuotaWeights().without(*left_out)
    metrics = {
        name: jax.random.normal(jax.random.fold_in(key, i), (2, 9)) * 10.0**i
        for i, name in enumerate(METRICS)
    }
    is_visual = jax.random.bernoulli(key, 0.7, (2, 9))
    expected = jax.jit(lambda metrics: quota_score(metrics, is_visual, weights))(metrics)
    arrays = {name: jnp.float32(getattr(weights, name)) for name in METRICS}
    found = jax.jit(lambda metrics, arrays: quota_score(metrics, is_visual, arrays))
    np.testing.assert_allclose(found(metrics, arrays), expected, rtol=1e-6)
    assert np.asarray(expected).any()


def test_weights_redistribute_as_table_5():
    paper = QuotaWeights()
    assert (paper.inter, paper.magnitude, paper.intra, paper.residual) == (0.45, 0.25, 0.10, 0.20)

    def values(weights):
        return [weights.inter, weights.magnitude, weights.intra, weights.residual]

    np.testing.assert_allclose(values(paper.without("inter")), [0, 0.40, 0.25, 0.35])
    for name in METRICS:
        assert sum(values(paper.without(name))) == pytest.approx(1)
        assert name not in paper.without(name).used
    # Two at once, or one after the other: what is out stays out.
    expected = [0, 0.25 + 0.325, 0.10 + 0.325, 0]
    np.testing.assert_allclose(values(paper.without("inter", "residual")), expected)
    np.testing.assert_allclose(values(paper.without("inter").without("residual")), expected)
    assert paper.without() == paper
    assert hash(paper) == hash(QuotaWeights())


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: QuotaWeights(inter=-0.1), "weight of inter .* got -0.1"),
        (lambda: QuotaWeights(residual=float("nan")), "weight of residual .* got nan"),
        (lambda: QuotaWeights(inter=0.0, magnitude=0.0, intra=0.0, residual=0.0), "all weights"),
        (lambda: QuotaWeights().without("colour"), "unknown metric 'colour'"),
        (
            lambda: QuotaWeights().without(*METRICS),
            "no metric remains",
        ),
    ],
)
def test_bad_weights_are_named(call: Any, words):
    with pytest.raises(QuotaError, match=words):
        call()


@jax.jit
def run(x, sums, is_visual, is_text):
    metrics = {
        "magnitude": magnitude(x),
        "residual": residual(x, 4),
        "inter": inter(sums[0], is_text),
        "intra": intra(sums[1], is_visual),
    }
    return quota_score(metrics, is_visual)


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 40), st.sampled_from([0, 1, 24, 64]), st.integers(0, 3), st.integers(0, 999))
def test_neither_padding_nor_neighbours_change_a_bit(length, padding, neighbours, seed):
    rng = np.random.default_rng(seed)
    width, size = length + padding, 1 + neighbours
    x = rng.standard_normal((size, width, 48)).astype(np.float32)
    sums = rng.random((2, size, width)).astype(np.float32)
    is_visual = rng.random((size, width)) < 0.7
    is_text = ~is_visual
    is_visual[0, length:] = is_text[0, length:] = False

    alone = run(x[:1, :length], sums[:, :1, :length], is_visual[:1, :length], is_text[:1, :length])
    beside = run(x, sums, is_visual, is_text)
    np.testing.assert_array_equal(alone[0], beside[0, :length])
    assert np.isfinite(np.asarray(beside)).all()
