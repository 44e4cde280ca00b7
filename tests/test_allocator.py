"""QUOTA's budgets (Eq. 1-5) against hand-computed values."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quota_jax.errors import QuotaError
from quota_jax.prune.allocator import (
    allocate,
    normalise,
    quota_recipe,
    relative_error,
    sensitivity,
)
from quota_jax.recipe import Recipe, Selector, kept

# Reference §2.3: uniform pi, LLaVA candidates 2-6, 576 tokens.
BUDGETS = {
    0.50: [519, 461, 404, 346, 288],
    0.40: [507, 438, 369, 300, 231],
    0.30: [496, 415, 335, 254, 173],
    0.20: [484, 392, 300, 208, 116],
    0.10: [473, 369, 265, 162, 58],
    0.05: [467, 358, 248, 139, 29],
}


def test_sensitivity_is_the_median_of_relative_norms():
    # Norms: x = (3, 4) -> 5; errors 0.5, 1, 5 -> ratios .1, .2, 1; the mean would be .43.
    x = [np.array([[3.0, 4.0]])] * 3
    errors = [0.5, 1.0, 5.0]
    x_q = [np.array([[3.0, 4.0 + e]]) for e in errors]
    assert sensitivity(x, x_q) == pytest.approx(0.2, rel=1e-6)
    assert sensitivity(x, x_q, eta=5.0) == pytest.approx(0.1)
    # An even number of samples: halfway between .1 and .2.
    assert sensitivity(x[:2], x_q[:2]) == pytest.approx(0.15, rel=1e-6)


def test_one_norm_per_sample_is_not_the_mean_of_norms_per_token():
    x_fp = np.array([[1.0, 0.0], [0.0, 10.0]])
    x_q = np.array([[2.0, 0.0], [0.0, 10.0]])
    assert relative_error(x_fp, x_q) == pytest.approx(1 / math.sqrt(101), rel=1e-6)
    assert relative_error(x_fp, x_q, per="token") == pytest.approx(0.5, rel=1e-5)


def test_a_layer_of_zeros_is_infinitely_sensitive_only_up_to_eta():
    assert relative_error(np.zeros((2, 3)), np.zeros((2, 3))) == 0.0
    assert relative_error(np.zeros((1, 1)), np.ones((1, 1))) == pytest.approx(1e6)


def test_float16_activations_are_measured_in_float64():
    x = np.full((600, 4096), 200.0, np.float16)  # the sum of squares overflows float16
    assert relative_error(x, (x * 1.5).astype(np.float16)) == pytest.approx(0.5, rel=1e-9)


def test_normalise_clips_between_the_percentiles():
    # 0..10: P10 = 1, P90 = 9, so (s - 1) / 8 clipped to [.1, .9].
    got = normalise([float(s) for s in range(11)])
    expected = [0.1, 0.1, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 0.9, 0.9]
    np.testing.assert_allclose(got, expected, rtol=1e-12)
    wide = normalise([0.0, 1.0, 4.0], percentiles=(0.0, 100.0), clip=(0.0, 1.0))
    np.testing.assert_allclose(wide, [0.0, 0.25, 1.0])


def test_allocation_by_hand():
    # P10 = .12, P90 = .28 -> S^ = .1 (clipped from -.125), .5, .9; exponents .9, .5, .1.
    found = allocate([0.1, 0.2, 0.3], [2, 3, 4], 0.4)
    np.testing.assert_allclose(found.normalised, [0.1, 0.5, 0.9], rtol=1e-12)
    parts = np.exp([0.9, 0.5, 0.1])
    pi = parts / parts.sum()
    np.testing.assert_allclose(found.weights, pi, rtol=1e-12)
    np.testing.assert_allclose(found.drops, 0.6 * pi, rtol=1e-12)
    ratios = [1 - 0.6 * pi[0], 1 - 0.6 * (pi[0] + pi[1]), 0.4]
    np.testing.assert_allclose(found.ratios, ratios, rtol=1e-12)
    assert found.weights[0] / found.weights[2] == pytest.approx(math.exp(0.8))
    # The least sensitive layer drops most, and a small tau gives it nearly everything.
    sharp = allocate([0.1, 0.2, 0.3], [2, 3, 4], 0.4, tau=0.01)
    assert sharp.drops[0] == pytest.approx(0.6, abs=1e-12)
    flat = allocate([0.1, 0.2, 0.3], [2, 3, 4], 0.4, tau=1e9)
    np.testing.assert_allclose(flat.weights, [1 / 3] * 3, rtol=1e-8)


@pytest.mark.parametrize(
    "sensitivities", [[0.2] * 5, [0.0] * 5, [0.2] * 11 + [9.0]], ids=["equal", "zero", "outlier"]
)
def test_equal_percentiles_give_uniform_weights(sensitivities):
    count = len(sensitivities)
    found = allocate(sensitivities, range(count), 0.3)
    np.testing.assert_allclose(found.weights, [1 / count] * count, rtol=1e-12)
    assert found.ratios[-1] == 0.3


def test_one_candidate_takes_the_whole_drop():
    found = allocate([0.7], [5], 0.25)
    assert (found.weights, found.drops, found.ratios) == ((1.0,), (0.75,), (0.25,))


@pytest.mark.parametrize(("rho", "budgets"), BUDGETS.items())
def test_uniform_budgets_equal_the_reference_vectors(rho, budgets):
    found = allocate([1.0] * 5, [2, 3, 4, 5, 6], rho)
    recipe = quota_recipe(32, found.candidates, found.ratios)
    assert [kept(576, stage.keep) for stage in recipe.stages] == budgets
    uniform = Recipe.uniform(num_layers=32, layers=[2, 3, 4, 5, 6], keep=rho)
    for n in range(0, 4097, 7):
        for mine, theirs in zip(recipe.stages, uniform.stages, strict=True):
            assert kept(n, mine.keep) == kept(n, theirs.keep)


@pytest.mark.parametrize("percent", [5, 10, 20, 25, 30, 40, 50, 60, 70, 90])
def test_budgets_are_exact_for_every_length(percent):
    """ceil(r n) in integers, for rho itself and for all uniform ratios on the way to it."""
    ratios = allocate([1.0] * 5, [2, 3, 4, 5, 6], percent / 100).ratios
    for i, ratio in enumerate(ratios, start=1):
        share = 500 - (100 - percent) * i  # of 500
        exact = [-(-n * share // 500) for n in range(4097)]
        assert [kept(n, ratio) for n in range(4097)] == exact


def test_qwen_budgets_equal_the_reference_vectors():
    found = allocate([1.0] * 5, [7, 8, 9, 10, 11], 0.3)
    assert [kept(360, r) for r in found.ratios] == [310, 260, 209, 159, 108]


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.floats(0, 1e3), min_size=1, max_size=12),
    st.floats(0, 1),
    st.floats(1e-3, 1e3),
)
def test_ratios_never_grow_and_end_at_rho(sensitivities, rho, tau):
    found = allocate(sensitivities, range(len(sensitivities)), rho, tau)
    assert found.ratios[-1] == rho
    assert all(a >= b for a, b in pairwise((1.0, *found.ratios)))
    assert sum(found.weights) == pytest.approx(1)
    order = np.argsort(sensitivities)
    weights = np.asarray(found.weights)[order]
    assert (np.diff(weights) <= 1e-12).all()  # more sensitive, never a larger share
    quota_recipe(12, found.candidates, found.ratios)


def test_the_recipe_carries_its_options():
    recipe = quota_recipe(
        8,
        [1, 3],
        [0.6, 0.3],
        selector=Selector(name="random", seed=4),
        point="before_attention",
        positions="renumber",
        trim_own_cache=False,
    )
    assert [(s.layer, s.keep, s.point) for s in recipe.stages] == [
        (1, 0.6, "before_attention"),
        (3, 0.3, "before_attention"),
    ]
    assert {s.selector for s in recipe.stages} == {Selector(name="random", seed=4)}
    assert recipe.positions == "renumber"
    assert not any(s.trim_own_cache for s in recipe.stages)
    assert quota_recipe(8, [1], [1.0]).is_none


SAMPLE = [np.ones((2, 3))]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: allocate([0.1], [2, 3], 0.3), "1 sensitivities for 2 candidate layers"),
        (lambda: allocate([], [], 0.3), "no candidate layers"),
        (lambda: allocate([0.1, 0.2], [3, 3], 0.3), r"must ascend, got \[3, 3\]"),
        (lambda: allocate([0.1], [-1], 0.3), "non-negative integers, got -1"),
        (lambda: allocate([0.1], [True], 0.3), "non-negative integers, got True"),
        (lambda: allocate([0.1], [1], 1.2), r"rho must lie in \[0, 1\], got 1.2"),
        (lambda: allocate([0.1], [1], math.nan), "rho must lie in .* got nan"),
        (lambda: allocate([0.1], [1], 0.3, tau=0.0), "tau must be positive, got 0"),
        (lambda: allocate([math.nan], [1], 0.3), "finite and not negative, got nan"),
        (lambda: allocate([-0.5], [1], 0.3), "finite and not negative, got -0.5"),
        (lambda: normalise([1.0], percentiles=(90.0, 10.0)), r"percentiles .* got \(90.0, 10.0\)"),
        (lambda: normalise([1.0], clip=(0.1, 1.9)), r"clip bounds .* got \(0.1, 1.9\)"),
        (lambda: normalise([]), "no sensitivities"),
        (lambda: sensitivity([], []), "got 0 and 0"),
        (lambda: sensitivity(SAMPLE, SAMPLE * 2), "got 1 and 2"),
        (lambda: sensitivity(SAMPLE, SAMPLE, per="head"), "got 'head'"),
        (lambda: sensitivity(SAMPLE, [np.ones((3, 2))]), r"got \(2, 3\) and \(3, 2\)"),
        (lambda: quota_recipe(8, [1], [0.5, 0.3]), "2 ratios for 1 candidate layers"),
        (lambda: quota_recipe(8, [1, 2], [0.3, 0.5]), "grows at layer 2"),
        (lambda: quota_recipe(2, [2], [0.3]), "the decoder has 2 layers"),
        (lambda: quota_recipe(8, [1], [0.3], selector="magic"), "unknown selector 'magic'"),
    ],
)
def test_bad_values_are_named(call: Any, words):
    with pytest.raises(QuotaError, match=words):
        call()
