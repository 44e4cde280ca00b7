"""Packing, integer matmul and attention references against independent numpy."""

from __future__ import annotations

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

import pallas_kernels.attention.api as attention_api
import pallas_kernels.attention_mass.api as mass_api
import pallas_kernels.int4_matmul.api as matmul_api
import pallas_kernels.int4_matmul.reference as matmul_reference
from pallas_kernels.accelerator import Gpu, find_gpu
from pallas_kernels.attention import BLOCK, causal_attention
from pallas_kernels.attention_mass import attention_mass
from pallas_kernels.choices import choices
from pallas_kernels.dispatch import resolve
from pallas_kernels.int4_matmul import int4_matmul, integer_matmul
from pallas_kernels.kv4_attention import (
    decode_attention,
    dense_decode_attention,
    dequantize,
    kv4_attention,
)
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


@pytest.mark.parametrize(
    ("impl", "words"),
    [("magic", "no implementation 'magic'"), ("mosaic_gpu", "needs a Hopper GPU")],
)
def test_a_named_implementation_that_cannot_run_fails_loudly(monkeypatch, impl, words):
    monkeypatch.setattr(matmul_api, "find_gpu", lambda: None)
    x, x_scale = quantize_activation(jnp.asarray(random(2, 128)), 8)
    codes, scale = quantize_weight(jnp.asarray(random(128, 128)), 4)
    with pytest.raises(ValueError, match=words):
        int4_matmul(x, x_scale, pack_int4(codes), scale, impl=impl)


def test_operations_can_be_left_to_xla(monkeypatch):
    def auto(operation):
        return resolve(operation, "auto", "pallas_triton", ("pallas_triton", "xla"), {})

    assert auto("kv4_append") == "pallas_triton"
    monkeypatch.setenv("QUOTA_JAX_XLA", "int4_matmul, kv4_append")
    assert (auto("kv4_append"), auto("kv4_attention")) == ("xla", "pallas_triton")
    monkeypatch.setenv("QUOTA_JAX_XLA", "all")
    assert auto("kv4_attention") == "xla"
    # One that is named is taken all the same.
    known = ("pallas_triton", "xla")
    assert resolve("kv4_append", "pallas_triton", "xla", known, {}) == "pallas_triton"
    monkeypatch.setenv("QUOTA_JAX_XLA", "int4_matmull")
    with pytest.raises(ValueError, match="int4_matmull"):
        auto("kv4_append")


def test_int8_products_are_refused_where_xla_gets_them_wrong(monkeypatch):
    rows = jnp.ones((2, 8), jnp.int8), jnp.ones(2), jnp.ones((4, 8), jnp.int8), jnp.ones(4)
    monkeypatch.setenv("XLA_FLAGS", "--xla_foo=1 --xla_gpu_autotune_level=0")
    assert float(integer_matmul(*rows)[0, 0]) == 8  # no GPU
    gpu = Gpu(capability=(9, 0), num_sms=132)
    monkeypatch.setattr(matmul_reference, "find_gpu", lambda: gpu)
    with pytest.raises(ValueError, match="autotune_level=0"):
        integer_matmul(*rows)
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_autotune_level=4")
    assert float(integer_matmul(*rows)[0, 0]) == 8


def test_auto_follows_the_gpu_and_the_shape(monkeypatch):
    hopper, ada = (Gpu(capability=c, num_sms=132) for c in ((9, 0), (8, 9)))
    expected = {
        (None, 1): "xla",
        (hopper, 1): "pallas_triton",
        (hopper, 640): "mosaic_gpu",
        (ada, 1): "pallas_triton",
        (ada, 640): "xla",
    }
    for (gpu, rows), name in expected.items():
        monkeypatch.setattr(matmul_api, "find_gpu", lambda gpu=gpu: gpu)
        assert matmul_api.automatic(rows, 4096, 4096) == name
    assert matmul_api.automatic(640, 4096, 3420) == "xla"
    monkeypatch.setattr(attention_api, "find_gpu", lambda: hopper)
    assert attention_api.automatic(jnp.bfloat16, 80) == "cudnn"
    assert attention_api.automatic(jnp.float32, 80) == "xla"
    monkeypatch.setattr(mass_api, "find_gpu", lambda: ada)
    assert mass_api.automatic(jnp.bfloat16, 80) == "pallas_triton"
    assert mass_api.automatic(jnp.float32, 80) == "xla"
    monkeypatch.setattr(mass_api, "find_gpu", lambda: None)
    assert mass_api.automatic(jnp.bfloat16, 80) == "xla"


@pytest.mark.parametrize(
    ("capability", "dtypes", "dim", "words"),
    [
        (None, ("bfloat16", "bfloat16"), 16, "needs an NVIDIA GPU"),
        ((7, 5), ("float16", "float16"), 16, r"compute capability 8\.0"),
        ((9, 0), ("float32", "float32"), 16, "float32 values"),
        ((9, 0), ("bfloat16", "float16"), 16, "float32 values"),
        ((9, 0), ("bfloat16", "bfloat16"), 136, "heads of 136: at most 128"),
    ],
)
def test_the_column_sums_name_why_their_kernel_cannot_run(
    monkeypatch, capability, dtypes, dim, words
):
    gpu = None if capability is None else Gpu(capability=capability, num_sms=132)
    monkeypatch.setattr(mass_api, "find_gpu", lambda: gpu)
    query, key = (jnp.ones((1, 3, 2, dim), dtype) for dtype in dtypes)
    arrays = query, key, jnp.asarray([3]), jnp.ones((1, 3), bool)
    with pytest.raises(ValueError, match=words):
        attention_mass(*arrays, sm_scale=1.0, impl="pallas_triton")
    attention_mass(*arrays, sm_scale=1.0)  # left to itself, it takes xla


def test_on_the_cpu_every_operation_is_the_reference():
    if find_gpu() is None:
        assert {name for _, _, name in choices()} == {"xla"}


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 4, 16), (6, 2, 40)])
def test_dense_decode_attention_equals_the_blockwise_one(heads, kv_heads, dim):
    lengths = jnp.asarray([1, 64, 101])
    k, v = (jnp.asarray(random(3, kv_heads, 2 * BLOCK, dim, seed=s)) for s in (1, 2))
    q = jnp.asarray(random(3, heads, dim, seed=3))

    def cut(array):
        return lambda start: jax.lax.dynamic_slice_in_dim(array, start, BLOCK, 2)

    one = decode_attention(q, cut(k), cut(v), 2 * BLOCK, lengths, sm_scale=0.3)
    other = dense_decode_attention(q, k, v, lengths, sm_scale=0.3)
    np.testing.assert_allclose(one, other, atol=2e-6)


# Lowering for a GPU that is not there: catches unsupported operations, not what ptxas refuses.
H100 = AbstractMesh(
    (1,),
    ("x",),
    (AxisType.Explicit,),
    abstract_device=AbstractDevice(
        device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu"
    ),
)
newer_jax = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="the kernels are for jax 0.11 (Python 3.12)"
)


def lower(function, *shapes) -> str:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The Pallas Triton backend", DeprecationWarning)
        with use_abstract_mesh(H100):
            lowered = jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",))
    return lowered.as_text()


def matmul_shapes(rows, outputs, inputs):
    spec = jax.ShapeDtypeStruct
    return (
        spec((rows, inputs), jnp.int8),
        spec((rows,), jnp.float32),
        spec((3, outputs, inputs // 2), jnp.uint8),
        spec((3, outputs), jnp.float32),
        spec((), jnp.int32),
    )


@newer_jax
@pytest.mark.parametrize("rows", [1, 5, 16, 64, 100, 237, 640])
@pytest.mark.parametrize("inputs", [1280, 11008])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_mosaic_matmul_lowers_for_every_number_of_tokens(rows, inputs, dtype):
    from pallas_kernels.int4_matmul.mosaic_gpu import int4_matmul_mosaic

    kernel = functools.partial(int4_matmul_mosaic, out_dtype=jnp.dtype(dtype))
    shapes = matmul_shapes(rows, 384, inputs)
    assert "mosaic_gpu" in lower(kernel, *shapes)
    assert "mosaic_gpu" in lower(kernel, *shapes, jax.ShapeDtypeStruct((3, 384), jnp.bfloat16))


@pytest.mark.parametrize(
    ("rows", "outputs", "inputs", "tokens", "splits"),
    [
        (640, 22016, 4096, 256, 1),
        (237, 22016, 4096, 128, 1),
        (237, 4096, 11008, 64, 1),
        (577, 3072, 1024, 128, 1),
        (8, 4096, 11008, 8, 4),
        (8, 22016, 4096, 8, 1),
        (64, 3584, 18944, 64, 4),
        (8, 1024, 256, 8, 1),
    ],
)
def test_tiles_fill_the_multiprocessors(rows, outputs, inputs, tokens, splits):
    """Sizes that were measured as the fastest (``measured/kernel_choices.md``), or whose inputs
    have to be split; a part is never shorter than what is loaded ahead."""
    from pallas_kernels.int4_matmul.mosaic_gpu import Tiles

    tiles = Tiles.of(rows, outputs, inputs)
    assert (tiles.tokens, tiles.splits) == (tokens, splits)
    assert inputs // tiles.inputs // tiles.splits >= (tiles.steps if splits > 1 else 1)


@newer_jax
@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(1, 384, 4096), (4, 100, 3416)])
def test_the_dot_product_matmul_lowers(rows, outputs, inputs):
    from pallas_kernels.int4_matmul.pallas_triton import int4_matmul_dot

    kernel = functools.partial(int4_matmul_dot, out_dtype=jnp.float32)
    assert "triton" in lower(kernel, *matmul_shapes(rows, outputs, inputs))


@newer_jax
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 4, 128), (14, 2, 80)])
def test_kv4_attention_lowers(heads, kv_heads, dim):
    from pallas_kernels.kv4_attention.pallas_triton import kv4_attention_split

    spec = jax.ShapeDtypeStruct
    cache = (3, 2, kv_heads, 128)
    packed, scale, zero = (
        spec((*cache, dim // 2), jnp.uint8),
        spec(cache, jnp.bfloat16),
        spec(cache, jnp.uint8),
    )
    kernel = functools.partial(kv4_attention_split, sm_scale=0.1)
    shapes = (spec((2, heads, dim), jnp.bfloat16), packed, packed, scale, scale, zero, zero)
    assert "triton" in lower(kernel, *shapes, spec((2,), jnp.int32), spec((), jnp.int32))


@newer_jax
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(32, 32, 128), (28, 4, 80), (6, 2, 40)])
@pytest.mark.parametrize("length", [640, 77])
def test_the_column_sums_lower(monkeypatch, heads, kv_heads, dim, length):
    monkeypatch.setattr(mass_api, "find_gpu", lambda: Gpu(capability=(9, 0), num_sms=132))
    spec = jax.ShapeDtypeStruct
    shapes = (
        spec((2, length, heads, dim), jnp.bfloat16),
        spec((2, length, kv_heads, dim), jnp.bfloat16),
        spec((2,), jnp.int32),
        spec((2, length), jnp.bool_),
    )
    text = lower(functools.partial(attention_mass, sm_scale=0.1), *shapes)
    assert text.count("custom_call @__gpu$xla.gpu.triton") == 2


@newer_jax
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 4, 16), (6, 2, 40), (7, 1, 80)])
def test_kv4_attention_in_the_interpreter_equals_the_reference(heads, kv_heads, dim):
    from pallas_kernels.kv4_attention.pallas_triton import kv4_attention_split

    stored = []
    for seed in (1, 2):
        values = jnp.asarray(random(2, 3, kv_heads, 3 * BLOCK, dim, seed=seed) * 2 + 0.3)
        codes, scale, zero = quantize_kv(values, 4)
        stored.append((pack_int4(codes), scale, zero))
    (k, k_scale, k_zero), (v, v_scale, v_zero) = stored
    q = jnp.asarray(random(3, heads, dim, seed=3))
    lengths = jnp.asarray([1, 64, 150], jnp.int32)
    arrays = (q, k, v, k_scale, v_scale, k_zero, v_zero, lengths)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The Pallas Triton backend", DeprecationWarning)
        found = kv4_attention_split(*arrays, jnp.int32(1), sm_scale=0.2, interpret=True)
    expected = kv4_attention(*arrays, 1, sm_scale=0.2, impl="xla")
    # Values around 15 steps of the scale cancel against the zero: some 1e-6 of them remains.
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_the_dot_products_of_the_kernel_in_plain_numpy():
    """The arithmetic of the inline PTX, which no interpreter runs: words, halves, bytes."""
    rng = np.random.default_rng(0)
    codes = rng.integers(-8, 8, (5, 64)).astype(np.int8)
    x = rng.integers(-128, 128, 64).astype(np.int8)
    words = np.asarray(pack_int4(jnp.asarray(codes))).view(np.int32)
    low = ((words << 4) & np.int32(-252645136)).view(np.int8).reshape(5, -1, 4)
    high = (words & np.int32(-252645136)).view(np.int8).reshape(5, -1, 4)
    even, odd = x[0::2].reshape(-1, 4), x[1::2].reshape(-1, 4)
    total = (low.astype(int) * even).sum((1, 2)) + (high.astype(int) * odd).sum((1, 2))
    assert np.array_equal(total % 16, np.zeros(5))
    np.testing.assert_array_equal(total >> 4, codes.astype(int) @ x.astype(int))
