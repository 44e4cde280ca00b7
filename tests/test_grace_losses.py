"""GRACE's loss terms against slow references, and the gradients of learned scales."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quota_jax.quant.grace_losses import (
    control,
    cross_entropy,
    decoupled,
    gated_mean,
    gates,
    relational,
)
from quota_jax.quant.grace_student import FACTORS, first_scales
from quota_jax.quant.groups import Groups
from quota_jax.quant.quantizers import quantize_weight
from quota_jax.quant.straight_through import (
    simulated_groups,
    simulated_product,
    simulated_weight,
)

ROWS, VOCABULARY = 5, 7


@pytest.fixture
def logits():
    rng = np.random.default_rng(0)
    teacher, student = (3 * rng.standard_normal((ROWS, VOCABULARY)) for _ in range(2))
    return teacher, student, rng.integers(0, VOCABULARY, ROWS)


def probabilities(row: np.ndarray) -> np.ndarray:
    powers = np.exp(row - row.max())
    return powers / powers.sum()


def divergence(p: np.ndarray, q: np.ndarray) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def test_decoupled_distillation(logits):
    teacher, student, labels = logits
    options = {"temperature": 2.0, "target_weight": 1.5, "rest_weight": 4.0}
    found = decoupled(jnp.float32(teacher), jnp.float32(student), jnp.array(labels), **options)
    for row in range(ROWS):
        label = labels[row]
        p, q = (probabilities(x[row] / 2) for x in (teacher, student))
        target = divergence(np.array([p[label], 1 - p[label]]), np.array([q[label], 1 - q[label]]))
        rest = divergence(*(np.delete(x, label) / (1 - x[label]) for x in (p, q)))
        assert found[row] == pytest.approx(4 * (1.5 * target + 4 * rest), rel=1e-5)


def test_decoupled_with_its_own_weights_is_plain_distillation(logits):
    """KL = binary KL + (1 - p_label) KL of the rest, the identity behind the method."""
    teacher, student, labels = logits
    for row in range(ROWS):
        p, q = (probabilities(x[row]) for x in (teacher, student))
        found = decoupled(
            jnp.float32(teacher[row]),
            jnp.float32(student[row]),
            jnp.int32(labels[row]),
            temperature=1.0,
            target_weight=1.0,
            rest_weight=1 - p[labels[row]],
        )
        assert found == pytest.approx(divergence(p, q), rel=1e-5)


def test_decoupled_is_finite_where_the_teacher_is_certain():
    sure = jnp.array([[80.0, -80.0, -90.0]])
    value, slope = jax.value_and_grad(
        lambda x: decoupled(
            sure, x, jnp.array([0]), temperature=2.0, target_weight=1.0, rest_weight=4.0
        ).sum()
    )(jnp.array([[-50.0, 60.0, 0.0]]))
    assert np.isfinite(value)
    assert np.isfinite(slope).all()


def test_gates_and_means(logits):
    teacher, student, labels = logits
    found = gates(jnp.float32(teacher))
    for row in range(ROWS):
        p = probabilities(teacher[row])
        entropy = -sum(x * math.log(x) for x in p)
        assert found[row] == pytest.approx(math.exp(-entropy / math.log(VOCABULARY)), rel=1e-5)
    assert gates(jnp.zeros(VOCABULARY)) == pytest.approx(1 / math.e)
    weights = np.array([1, 0, 1, 1, 0], np.float32)
    losses = np.arange(ROWS, dtype=np.float32)
    mean = gated_mean(jnp.asarray(losses), found, jnp.asarray(weights))
    chosen = weights > 0
    assert mean == pytest.approx(np.average(losses[chosen], weights=found[chosen]), rel=1e-5)
    nats = [-math.log(probabilities(student[i])[labels[i]]) for i in np.flatnonzero(chosen)]
    ce = cross_entropy(jnp.float32(student), jnp.array(labels), jnp.array(weights))
    assert ce == pytest.approx(np.mean(nats), rel=1e-5)


def test_relational_loss_is_one_minus_cka():
    rng = np.random.default_rng(1)
    teacher, student = rng.standard_normal((3, 6, 4)), rng.standard_normal((3, 6, 5))
    mask = np.arange(6) < np.array([6, 4, 1])[:, None]
    expected = []
    for row, count in ((0, 6), (1, 4)):
        grams = []
        for tokens in (teacher, student):
            z = tokens[row, :count]
            z = z / np.linalg.norm(z, axis=1, keepdims=True)
            centre = np.eye(count) - 1 / count
            grams.append(centre @ (z @ z.T) @ centre)
        a, b = grams
        expected.append(1 - (a * b).sum() / (np.linalg.norm(a) * np.linalg.norm(b)))
    args = jnp.asarray(teacher, jnp.float32), jnp.asarray(student, jnp.float32)
    assert relational(*args, jnp.asarray(mask)) == pytest.approx(np.mean(expected), rel=1e-5)
    # What is outside the mask is not read, and rotated or scaled tokens relate as before.
    turned = np.linalg.qr(rng.standard_normal((4, 4)))[0]
    same = jnp.asarray(np.where(mask[..., None], 3 * teacher @ turned, 1e6), jnp.float32)
    assert relational(args[0], same, jnp.asarray(mask)) == pytest.approx(0, abs=1e-5)
    none = jnp.zeros_like(jnp.asarray(mask))
    value, slope = jax.value_and_grad(lambda x: relational(args[0], x, none))(args[1])
    assert value == 0
    assert np.isfinite(slope).all()


def test_controller():
    options = {"rate": 0.1, "target": 3.0, "bounds": (0.1, 1.0), "decay": 0.75}
    beta, average = jnp.float32(0.5), jnp.float32(0)
    slow_beta, slow = 0.5, None
    for loss in (4.0, 8.0, 20.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0):
        first = slow is None
        beta, average = control(beta, average, jnp.float32(loss), jnp.asarray(first), **options)
        slow = loss if slow is None else 0.75 * slow + 0.25 * loss
        slow_beta = min(1.0, max(0.1, slow_beta + 0.1 * (slow - 3)))
        assert average == pytest.approx(slow, rel=1e-5)
        assert beta == pytest.approx(slow_beta, rel=1e-5)


def lsq_slopes(weight: np.ndarray, scale: np.ndarray, upstream: np.ndarray):
    """LSQ's gradients of ``s clip(round(w / s))`` for 4 bits, element by element."""
    slopes = np.zeros_like(weight), np.zeros_like(scale)
    for row, column in np.ndindex(weight.shape):
        ratio = weight[row, column] / scale[row]
        if ratio <= -8:
            step, passes = -8.0, 0.0
        elif ratio >= 7:
            step, passes = 7.0, 0.0
        else:
            step, passes = np.round(ratio) - ratio, 1.0
        slopes[0][row, column] += passes * upstream[row, column]
        slopes[1][row] += step * upstream[row, column]
    return slopes


def test_scales_have_the_gradient_of_lsq():
    rng = np.random.default_rng(2)
    weight, upstream = rng.standard_normal((2, 4, 12)).astype(np.float32)
    scale = np.array([0.08, 0.2, 0.3, 0.4], np.float32)

    def whole(weight, scale):
        codes, step = simulated_weight(weight, 4, scale)
        return (codes * step[:, None] * upstream).sum()

    expected = lsq_slopes(weight, scale, upstream)
    for found, slope in zip(jax.jit(jax.grad(whole, (0, 1)))(weight, scale), expected, strict=True):
        np.testing.assert_allclose(found, slope, rtol=1e-4, atol=1e-4)

    # Of a product with quantized inputs: the upstream gradient is that of the weight.
    x = rng.standard_normal((6, 12)).astype(np.float32)
    rows = rng.standard_normal((6, 4)).astype(np.float32)
    found = jax.jit(
        jax.grad(lambda w, s: (simulated_product(x, w, None, 4, 8, s) * rows).sum(), (0, 1))
    )(weight, scale)
    step = np.abs(x).max(1, keepdims=True) / 127
    expected = lsq_slopes(weight, scale, rows.T @ (np.round(x / step) * step))
    for value, slope in zip(found, expected, strict=True):
        np.testing.assert_allclose(value, slope, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("columns", [16, 20])
def test_group_scales_have_the_gradient_of_lsq(columns):
    rng = np.random.default_rng(3)
    weight, upstream = rng.standard_normal((2, 3, columns)).astype(np.float32)
    groups = Groups(bits=4, size=8, scale_dtype="bfloat16")
    scale = rng.uniform(0.1, 0.4, (3, groups.count(columns))).astype(np.float32)
    stored = np.asarray(jnp.asarray(scale, jnp.bfloat16), np.float32)
    arrays = jnp.asarray(weight), jnp.asarray(scale)
    found = simulated_groups(*arrays, groups)
    np.testing.assert_array_equal(found, groups.dequantize(*groups.quantize(*arrays)))
    slopes = jax.jit(
        jax.grad(lambda w, s: (simulated_groups(w, s, groups) * upstream).sum(), (0, 1))
    )(*arrays)
    for group in range(scale.shape[1]):
        part = np.s_[:, 8 * group : 8 * (group + 1)]
        expected = lsq_slopes(weight[part], stored[:, group], upstream[part])
        np.testing.assert_allclose(slopes[0][part], expected[0], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(slopes[1][:, group], expected[1], rtol=1e-4, atol=1e-4)


def test_search_takes_the_best_of_its_factors():
    rng = np.random.default_rng(4)
    weight = (rng.standard_normal((3, 24)) ** 3).astype(np.float32)
    found = np.asarray(
        first_scales(jnp.asarray(weight), Groups(bits=4, size=8, scale_dtype="float32"), "search")
    )
    assert found.shape == (3, 3)
    clipped = 0
    for row, group in np.ndindex(3, 3):
        values = weight[row, 8 * group : 8 * group + 8].astype(np.float64)
        errors = []
        for factor in FACTORS:
            scale = factor * np.abs(values).max() / 7
            codes = np.clip(np.round(values / scale), -8, 7)
            errors.append(((codes * scale - values) ** 2).sum())
        best = FACTORS[int(np.argmin(errors))] * np.abs(values).max() / 7
        assert found[row, group] == pytest.approx(best, rel=1e-5)
        clipped += best < 0.99 * np.abs(values).max() / 7
    assert clipped
    nearest = first_scales(jnp.asarray(weight), Groups(bits=4, scale_dtype="float32"), "nearest")
    np.testing.assert_array_equal(nearest, quantize_weight(jnp.asarray(weight), 4)[1])
