"""Packing, integer matmul and attention references against independent numpy."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.dispatch import choices, choose
from pallas_kernels.int4_matmul import int4_matmul
from pallas_kernels.kv4_attention import BLOCK, causal_attention, dequantize, kv4_attention
from pallas_kernels.packing import pack_int4, unpack_int4, unpack_uint4
from pallas_kernels.stable import fixed_order_sum
from quota_jax.quant.quantizers import quantize_activation, quantize_kv, quantize_weight


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(0, 1000))
def test_packing_keeps_every_code_and_the_low_nibble_comes_first(rows, half, seed):
    codes = np.random.default_rng(seed).integers(-8, 8, (rows, 2 * half)).astype(np.int8)
    packed = np.asarray(pack_int4(jnp.asarray(codes)))
    assert packed.shape == (rows, half)
    np.testing.assert_array_equal(packed & 15, codes[:, 0::2] & 15)
    np.testing.assert_array_equal(packed >> 4, codes[:, 1::2] & 15)
    np.testing.assert_array_equal(unpack_int4(jnp.asarray(packed)), codes)
    np.testing.assert_array_equal(unpack_uint4(jnp.asarray(packed)), codes & 15)


def test_an_odd_number_of_codes_is_refused():
    with pytest.raises(ValueError, match="odd number"):
        pack_int4(jnp.zeros((2, 3), jnp.int8))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(1, 32, 8), (5, 40, 96), (70, 80, 24)])
def test_int4_matmul_is_exact_in_integers(bits, shape):
    rows, inputs, outputs = shape
    x, x_scale = quantize_activation(jnp.asarray(random(rows, inputs)), bits)
    codes, scale = quantize_weight(jnp.asarray(random(3, outputs, inputs, seed=1)), 4)
    out = int4_matmul(x, x_scale, pack_int4(codes), scale, 2)
    exact = np.asarray(x, np.int64) @ np.asarray(codes[2], np.int64).T
    expected = exact.astype(np.float32) * np.asarray(x_scale)[:, None] * np.asarray(scale[2])
    np.testing.assert_array_equal(out, expected)


def test_quantizers_stay_within_half_a_step():
    weight = random(6, 50)
    codes, scale = quantize_weight(jnp.asarray(weight), 4)
    error = np.abs(np.asarray(codes) * np.asarray(scale)[:, None] - weight)
    assert (error <= 0.5001 * np.asarray(scale)[:, None]).all()
    assert np.abs(codes).max() == 7
    keys = random(7, 3, 16) * 3
    codes, scale, zero = quantize_kv(jnp.asarray(keys), 4)
    step = np.asarray(scale, np.float32)[..., None]
    back = (np.asarray(codes, np.float32) - np.asarray(zero, np.float32)[..., None]) * step
    # bfloat16 scales round by up to 2^-9, which clips the ends by up to 15 * 2^-9 of a step.
    assert (np.abs(back - keys) <= 0.56 * step + 15 / 256 * step).all()
    packed = pack_int4(codes)
    np.testing.assert_array_equal(dequantize(packed, scale, zero), back)


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0])
def test_constant_rows_survive_quantization(value):
    row = jnp.full((2, 8), value, jnp.float32)
    codes, scale = quantize_activation(row, 4)
    np.testing.assert_allclose(codes * scale[:, None], row, rtol=1e-6, atol=1e-7)
    codes, scale, zero = quantize_kv(row, 4)
    steps = codes.astype(jnp.float32) - zero.astype(jnp.float32)[..., None]
    np.testing.assert_allclose(steps * scale.astype(jnp.float32)[..., None], row, rtol=0.01)


def softmax_attention(q, k, v, allowed):
    """Plain numpy in float64; q [N, T, H], k and v [N, S, H], allowed [T, S]."""
    scores = q.astype(np.float64) @ k.astype(np.float64).swapaxes(1, 2) * q.shape[-1] ** -0.5
    scores = np.where(allowed, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return weights @ v, weights


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 4, 16), (6, 2, 40), (7, 1, 80)])
def test_attention_equals_float64_softmax(heads, kv_heads, dim):
    batch, length, lengths = 2, 70, np.array([70, 33])
    q, k, v = (random(batch, length, n, dim, seed=n) for n in (heads, kv_heads, kv_heads))
    out, weights = causal_attention(
        jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), jnp.asarray(lengths), sm_scale=dim**-0.5
    )
    group = heads // kv_heads
    for b in range(batch):
        n = lengths[b]
        keys, values = (np.repeat(a[b, :n].swapaxes(0, 1), group, 0) for a in (k, v))
        expected, mass = softmax_attention(
            q[b, :n].swapaxes(0, 1), keys, values, np.tril(np.ones((n, n), bool))
        )
        np.testing.assert_allclose(out[b, :n].swapaxes(0, 1), expected, atol=2e-6)
        np.testing.assert_allclose(weights[b, :, :n, :n], mass, atol=2e-6)


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 4, 16), (6, 2, 40)])
def test_kv4_decode_attention_equals_attention_over_dequantized_keys(heads, kv_heads, dim):
    layers, batch, capacity, lengths = 2, 3, 2 * BLOCK, np.array([1, 64, 101])
    k, v = (random(layers, batch, kv_heads, capacity, dim, seed=s) for s in (1, 2))
    q = random(batch, heads, dim, seed=3)
    stored = [quantize_kv(jnp.asarray(a), 4) for a in (k, v)]
    (k_codes, k_scale, k_zero), (v_codes, v_scale, v_zero) = stored
    packed = pack_int4(k_codes), pack_int4(v_codes)
    out = kv4_attention(
        jnp.asarray(q),
        *packed,
        k_scale,
        v_scale,
        k_zero,
        v_zero,
        jnp.asarray(lengths),
        1,
        sm_scale=dim**-0.5,
    )
    keys = np.asarray(dequantize(packed[0], k_scale, k_zero))[1]
    values = np.asarray(dequantize(packed[1], v_scale, v_zero))[1]
    group = heads // kv_heads
    for b, n in enumerate(lengths):
        expected, _ = softmax_attention(
            q[b][:, None],
            np.repeat(keys[b, :, :n], group, 0),
            np.repeat(values[b, :, :n], group, 0),
            np.ones((1, n), bool),
        )
        np.testing.assert_allclose(out[b], expected[:, 0], atol=2e-6)


def test_fixed_order_sum_sums():
    x = random(5, 37)
    np.testing.assert_allclose(fixed_order_sum(jnp.asarray(x)), x.sum(-1), rtol=1e-5, atol=1e-5)


def test_a_named_implementation_that_does_not_exist_fails_loudly():
    with pytest.raises(ValueError, match="no implementation 'mosaic'"):
        choose("int4_matmul", ("xla",), "mosaic")
    assert choices() == {"int4_matmul": "xla", "kv4_attention": "xla"}
