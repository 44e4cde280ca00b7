"""Kernels on the GPU against the jnp references, on fresh random inputs (`make test-gpu`)."""

from __future__ import annotations

import functools
import os
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import jax_triton_calls
from pallas_kernels.accelerator import find_gpu
from pallas_kernels.attention import causal_attention, sequence_attention
from pallas_kernels.attention_mass import attention_mass
from pallas_kernels.int4_matmul import int4_matmul
from pallas_kernels.int4_matmul.api import refusals
from pallas_kernels.kv4_attention import kv4_attention
from pallas_kernels.kv4_attention.api import refusals as attention_refusals
from pallas_kernels.packing import pack_int4
from pallas_kernels.w4a16_matmul import w4a16_matmul
from quota_jax.quant.quantizers import quantize_kv

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning"),
]
SEED = int.from_bytes(os.urandom(6), "little")


@pytest.fixture
def rng(request) -> np.random.Generator:
    """Fresh numbers every run; the seed is printed when a test fails."""
    print("seed", SEED)
    return np.random.default_rng([SEED, zlib.crc32(request.node.name.encode())])


def skip_refused(impl: str, refused: dict[str, str]) -> None:
    if impl == jax_triton_calls.NAME and (reason := jax_triton_calls.broken()):
        refused = {**refused, impl: reason}
    if impl in refused:
        pytest.skip(refused[impl])


@pytest.mark.parametrize("impl", ["mosaic_gpu", "pallas_triton", "triton"])
@pytest.mark.parametrize("rows", [1, 3, 8, 33, 237, 577])
@pytest.mark.parametrize(("outputs", "inputs"), [(384, 1280), (4096, 11008), (1024, 4096)])
def test_int4_matmul_is_exact(rng, impl, rows, outputs, inputs):
    skip_refused(impl, refusals(rows, outputs, inputs))
    codes = rng.integers(-8, 8, (3, outputs, inputs)).astype(np.int8)
    x = jnp.asarray(rng.integers(-128, 128, (rows, inputs)).astype(np.int8))
    x_scale = jnp.asarray(rng.random(rows, np.float32) + 0.1)
    scale = jnp.asarray(rng.random((3, outputs), np.float32) + 0.1)
    packed = pack_int4(jnp.asarray(codes))
    for layer in (0, 2):
        arguments = (x, x_scale, packed, scale, layer)
        # Unscaled, so that every integer is seen; then with its scales.
        plain = (x, jnp.ones_like(x_scale), packed, jnp.ones_like(scale), layer)
        exact = np.asarray(x, np.int64) @ codes[layer].astype(np.int64).T
        np.testing.assert_array_equal(int4_matmul(*plain, impl=impl), exact.astype(np.float32))
        found = int4_matmul(*arguments, impl=impl)
        np.testing.assert_allclose(found, int4_matmul(*arguments, impl="xla"), rtol=3e-7)
        short = int4_matmul(*arguments, impl=impl, out_dtype=jnp.bfloat16)
        np.testing.assert_array_equal(short, found.astype(jnp.bfloat16))
        bias = jnp.asarray(rng.standard_normal((3, outputs), np.float32))
        biased = int4_matmul(*arguments, bias=bias, impl=impl)
        np.testing.assert_allclose(biased, found + bias[layer], rtol=3e-7, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 4, 8, 16])
@pytest.mark.parametrize(
    ("outputs", "inputs", "size", "dtype", "scale_dtype", "symmetric"),
    [
        (4096, 11008, 128, "bfloat16", "float16", False),
        (11008, 4096, 128, "bfloat16", "bfloat16", True),
        (387, 3416, 32, "float16", "float16", False),
        (1024, 4096, 64, "float32", "float32", False),
        (1024, 4096, None, "bfloat16", "float32", True),
    ],
)
def test_w4a16_matmul_multiplies_the_dequantized_weights(
    rng, rows, outputs, inputs, size, dtype, scale_dtype, symmetric
):
    """Weights bit for bit, by tokens that are 1 in one place; then sums of random tokens, whose
    order differs (both stay within some sqrt(inputs) roundings of 2^-24 of what is summed)."""
    shape = (3, outputs) if size is None else (3, outputs, -(-inputs // size))
    scale = 0.05 * rng.random(shape, np.float32) + 0.005
    arrays = {
        "packed": jnp.asarray(rng.integers(0, 256, (3, outputs, inputs // 2)), jnp.uint8),
        "scale": jnp.asarray(scale, scale_dtype),
        "zeros": None if symmetric else jnp.asarray(rng.integers(0, 17, shape), jnp.uint8),
        "bias": jnp.asarray(rng.standard_normal((3, outputs), np.float32)),
    }
    run = jax.jit(functools.partial(w4a16_matmul, group_size=size or 0), static_argnames="impl")

    def both(x, **changes):
        given = arrays | changes
        return (
            np.asarray(run(x, **given, layer=2, impl=impl)) for impl in ("pallas_triton", "xla")
        )

    ones = np.zeros((rows, inputs))
    ones[np.arange(rows), rng.integers(0, inputs, rows)] = 1
    found, expected = both(jnp.asarray(ones, dtype), bias=None)
    np.testing.assert_array_equal(found, expected)
    x = jnp.asarray(rng.standard_normal((rows, inputs), np.float32), dtype)
    found, expected = both(x)
    summed = np.abs(np.asarray(x, np.float32)).sum(1)[:, None]
    bound = 16 * summed * scale[2].reshape(outputs, -1).max(1)[None] * 1.01
    assert (np.abs(found - expected) <= bound * inputs**0.5 * 2**-24 + 2**-20).all()


@pytest.mark.parametrize("heads", [(32, 32, 128), (28, 4, 128), (6, 2, 40), (4, 4, 80)])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("impl", ["pallas_triton_blocks", "pallas_triton", "triton"])
def test_kv4_attention_equals_the_reference(rng, impl, heads, batch):
    num_heads, kv_heads, dim = heads
    skip_refused(impl, attention_refusals(dim, num_heads // kv_heads))
    shape = (2, batch, kv_heads, 320, dim)
    stored = []
    for _ in range(2):
        codes, scale, zero = quantize_kv(
            jnp.asarray(rng.standard_normal(shape, np.float32) * 3 + 0.5), 4
        )
        stored.append((pack_int4(codes), scale, zero))
    (k, k_scale, k_zero), (v, v_scale, v_zero) = stored
    q = jnp.asarray(rng.standard_normal((batch, num_heads, dim), np.float32))
    lengths = jnp.asarray(rng.integers(1, 321, batch), jnp.int32)
    arguments = (q, k, v, k_scale, v_scale, k_zero, v_zero, lengths, 1)
    found, expected = (
        kv4_attention(*arguments, sm_scale=dim**-0.5, impl=each) for each in (impl, "xla")
    )
    # Blocks sum codes + 16 and take the rest off again, "triton" keeps 16 bits of its operands.
    near = {"pallas_triton": 2e-5, "pallas_triton_blocks": 1e-4, "triton": 2e-4}
    np.testing.assert_allclose(found, expected, atol=near[impl])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", [(4, 4, 64), (6, 2, 128), (2, 2, 80)])
def test_library_attention_equals_the_reference(rng, causal, heads):
    num_heads, kv_heads, dim = heads
    q, k, v = (
        jnp.asarray(rng.standard_normal((3, 577, n, dim), np.float32), jnp.bfloat16)
        for n in (num_heads, kv_heads, kv_heads)
    )
    lengths = jnp.asarray([577, 100, 1], jnp.int32)
    options = {"sm_scale": dim**-0.5, "causal": causal}
    found = np.asarray(sequence_attention(q, k, v, lengths, **options, impl="cudnn"), np.float32)
    expected, _ = causal_attention(q, k, v, lengths, **options)
    for row, length in enumerate(np.asarray(lengths)):
        np.testing.assert_allclose(found[row, :length], expected[row, :length], atol=0.03)


@pytest.mark.parametrize("heads", [(32, 32, 128), (28, 4, 128), (6, 2, 40), (4, 4, 80)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("length", [640, 333])
def test_column_sums_equal_the_reference(rng, heads, dtype, length):
    num_heads, kv_heads, dim = heads
    lengths = np.array([length, rng.integers(2, length), 1, 0])
    query = 3 * rng.standard_normal((4, length, num_heads, dim), np.float32)
    key = rng.standard_normal((4, length, kv_heads, dim), np.float32)
    beyond = np.arange(length) >= lengths[:, None]
    query[beyond], key[beyond] = np.nan, np.inf
    is_visual = rng.random((4, length)) < 0.6
    is_visual[1, : length // 2] = True
    arrays = (
        *(jnp.asarray(array, dtype) for array in (query, key)),
        jnp.asarray(lengths, jnp.int32),
        jnp.asarray(is_visual),
    )
    found, expected = (
        attention_mass(*arrays, sm_scale=dim**-0.5, impl=impl) for impl in ("pallas_triton", "xla")
    )
    # Products of 16-bit values are exact; tensor cores cut their float32 sums off instead of
    # rounding. With scores up to 20, unscaled 200, some 2^-22 of those are 1e-5 of a weight.
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
        assert not np.asarray(one)[beyond].any()
    again = attention_mass(*arrays, sm_scale=dim**-0.5, impl="pallas_triton")
    for one, other in zip(found, again, strict=True):
        np.testing.assert_array_equal(one, other)


def test_this_machine_takes_the_kernels():
    gpu = find_gpu()
    assert gpu is not None
    if not gpu.is_hopper:
        pytest.skip(f"compute capability {gpu.capability}: tensor-core kernels are for 9.0")
    assert set(refusals(1, 4096, 4096)) == {"pallas_tpu"}
    x = jnp.ones((640, 4096), jnp.int8)
    text = jax.jit(int4_matmul).lower(
        x, jnp.ones(640), jnp.ones((4096, 2048), jnp.uint8), jnp.ones(4096)
    )
    assert "mosaic_gpu" in text.as_text()
