"""The kernels of a fused decode step, and the one that fills a prompt's cache, on the GPU against
their references, and the whole step against the modules one by one (`make test-gpu`)."""

from __future__ import annotations

import os
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.kv4_append import kv4_append
from pallas_kernels.kv4_attention import dequantize
from pallas_kernels.kv4_encode import kv4_encode
from pallas_kernels.packing import unpack_uint4
from pallas_kernels.transform_quantize import transform_quantize
from quota_jax.models.fused_decode import obstacle
from quota_jax.quant.flatquant import factor_pair
from tests.decode_samples import METHODS, random_groups, random_model, steps, tiny_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning"),
]
SEED = int.from_bytes(os.urandom(6), "little")
BFLOAT16 = 2.0**-8


@pytest.fixture
def rng(request) -> np.random.Generator:
    """Fresh numbers every run; the seed is printed when a test fails."""
    print("seed", SEED)
    return np.random.default_rng([SEED, zlib.crc32(request.node.name.encode())])


def draw(rng, *shape, dtype: Any = jnp.float32, scale: float = 1.0) -> jax.Array:
    return (jnp.asarray(rng.standard_normal(shape, np.float32)) * scale).astype(dtype)


def assert_near(found, expected, share: float) -> None:
    """Codes next to a rounding boundary may fall on its other side."""
    off = np.abs(np.asarray(found, int) - np.asarray(expected, int))
    assert off.max() <= 1
    assert off.mean() <= share


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [1, 8, 300])
@pytest.mark.parametrize("transform", [False, True])
@pytest.mark.parametrize("inputs", [4096, 11008, 18944, 3456, 3584, 1280])
def test_transform_quantize_equals_the_reference(rng, inputs, transform, rows, bits, dtype):
    """Behind a gate at 11008 and 18944 inputs and at 3456, 36 of which are padding; behind sum and
    norm elsewhere."""
    gated, dtype = inputs in (11008, 18944, 3456), jnp.dtype(dtype)
    options: dict[str, Any] = {"bits": bits, "eps": 1e-5, "gated": gated}
    if transform:
        options["padding"] = 36 if inputs == 3456 else 0
        a, b = factor_pair(inputs - options["padding"])
        options["left"] = draw(rng, 3, a, a, scale=a**-0.5)
        options["right"] = draw(rng, 3, b, b, scale=b**-0.5)
        options["clip"] = jnp.asarray(rng.uniform(0.8, 1.0, (3, 2)), jnp.float32)
    if not gated:
        options["norm"] = draw(rng, 3, inputs, dtype=dtype)
        options["added"] = draw(rng, rows, inputs, dtype=dtype)
    x = draw(rng, rows, 2 * inputs if gated else inputs, dtype=dtype)
    found = transform_quantize(x, 2, **options, impl="pallas_triton")
    expected = transform_quantize(x, 2, **options, impl="xla")
    # XLA may keep a gate, a norm or its sum wider than the kernel does before the next rounding:
    # the largest value and with it the scale may be off by a rounding to bfloat16.
    rtol = 1e-4 if dtype == jnp.float32 else 2 * BFLOAT16
    np.testing.assert_allclose(found.scale[:rows], expected.scale[:rows], rtol=rtol)
    # With 8 bits a step is 16 times as small, and so is the distance to its boundaries.
    share = {4: 0.03, 8: 0.4}[bits] if dtype == jnp.bfloat16 else {4: 2e-3, 8: 0.02}[bits]
    assert_near(found.codes, expected.codes, share)
    if not gated:
        np.testing.assert_array_equal(found.states, expected.states)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [1, 8, 584])
@pytest.mark.parametrize("transform", [False, True])
@pytest.mark.parametrize(
    ("inputs", "activation"),
    [
        (1024, None),
        (1152, None),
        (4096, "quick_gelu"),
        (3420, "gelu_pytorch_tanh"),
        (80, "silu"),
        (48, "relu"),
    ],
)
def test_transform_quantize_of_a_tower_equals_the_reference(
    rng, inputs, activation, transform, rows, bits, dtype
):
    """Behind an activation, or behind sum and LayerNorm of rows whose mean is not zero, where
    padding must not count as deviation."""
    dtype = jnp.dtype(dtype)
    options: dict[str, Any] = {"bits": bits, "eps": 1e-5, "activation": activation}
    if transform:
        a, b = factor_pair(inputs)
        options["left"] = draw(rng, 3, a, a, scale=a**-0.5)
        options["right"] = draw(rng, 3, b, b, scale=b**-0.5)
        options["clip"] = jnp.asarray(rng.uniform(0.8, 1.0, (3, 2)), jnp.float32)
    x = draw(rng, rows, inputs, dtype=dtype)
    if activation is None:
        x = x + 5
        options["norm"] = draw(rng, 3, inputs, dtype=dtype)
        options["norm_bias"] = draw(rng, 3, inputs, dtype=dtype)
        options["added"] = draw(rng, rows, inputs, dtype=dtype)
    found = transform_quantize(x, 2, **options, impl="pallas_triton")
    expected = transform_quantize(x, 2, **options, impl="xla")
    rtol = 1e-4 if dtype == jnp.float32 else 2 * BFLOAT16
    np.testing.assert_allclose(found.scale[:rows], expected.scale[:rows], rtol=rtol)
    # As above.
    share = {4: 0.03, 8: 0.4}[bits] if dtype == jnp.bfloat16 else {4: 2e-3, 8: 0.02}[bits]
    # Of a few short rows a single code is more than that share.
    assert_near(found.codes, expected.codes, max(share, 2 / found.codes.size))
    if activation is None:
        np.testing.assert_array_equal(found.states, expected.states)


def test_the_automatic_choice_quantizes_any_number_of_rows_by_the_kernel():
    for rows in (8, 65, 640):
        call = jax.jit(lambda x: transform_quantize(x, bits=4, norm=jnp.ones(4096)))
        text = call.lower(jnp.ones((rows, 4096), jnp.bfloat16)).as_text()
        assert "xla.gpu.triton" in text


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("heads", [(32, 32, 128), (28, 4, 128), (6, 2, 40), (4, 4, 80)])
def test_kv4_append_equals_the_reference(rng, heads, full):
    """Queries within a rounding to bfloat16, codes within 1 of those of the same scale; what is not
    written stays, and nothing is written behind the end."""
    num_heads, kv_heads, dim = heads
    lengths = jnp.asarray([0, 13, 63, 64], jnp.int32)
    shape = (2, 4, kv_heads, 64)

    def stored():
        codes = jnp.asarray(rng.integers(0, 256, (*shape, dim // 2)), jnp.uint8)
        scale = jnp.asarray(rng.random(shape), jnp.bfloat16)
        return codes, scale, jnp.asarray(rng.integers(0, 16, shape), jnp.uint8)

    angle = draw(rng, 4, dim // 2, scale=3)
    outputs = (num_heads + 2 * kv_heads) * dim
    qkv = draw(rng, 4, outputs, dtype=jnp.float32 if full else jnp.bfloat16)
    key, value = stored(), stored()
    options: dict[str, Any] = {"site_layer": 2, "dtype": jnp.bfloat16}
    if full:
        for name in ("query_transform", "key_transform"):
            options[name] = draw(rng, 3, dim, dim, scale=dim**-0.5)
        options["clip"] = jnp.asarray(rng.uniform(0.7, 1.0, (3, 2, 2)), jnp.float32)
        options["bias"] = draw(rng, 3, outputs, dtype=jnp.bfloat16)
    arrays = qkv, jnp.cos(angle), jnp.sin(angle), key, value, lengths, 1
    found = kv4_append(*arrays, **options, impl="pallas_triton")
    expected = kv4_append(*arrays, **options, impl="xla")
    query, reference = (np.asarray(a.query, np.float32) for a in (found, expected))
    assert np.abs(query - reference).max() <= 2 * BFLOAT16 * np.abs(reference).max()
    written = np.zeros(shape, bool)
    for sample, length in enumerate((0, 13, 63)):
        written[1, sample, :, length] = True
    for new, other, old in (
        (found.key, expected.key, key),
        (found.value, expected.value, value),
    ):
        for after, before in zip(new, old, strict=True):
            np.testing.assert_array_equal(np.asarray(after)[~written], np.asarray(before)[~written])
        step, other_step = (np.asarray(a[1], np.float32)[written] for a in (new, other))
        np.testing.assert_allclose(step, other_step, rtol=2 * BFLOAT16)
        assert_near(np.asarray(new[2])[written], np.asarray(other[2])[written], 0.1)
        # What is read back: within two steps, one for the code and one for the zero.
        read = [
            (np.asarray(unpack_uint4(a[0]), np.float32) - np.asarray(a[2], np.float32)[..., None])[
                written
            ]
            * np.asarray(a[1], np.float32)[written][..., None]
            for a in (new, other)
        ]
        off = np.abs(read[0] - read[1]) / other_step[:, None]
        assert off.max() <= 2.2
        assert off.mean() <= 0.1


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("rows", [5, 640])
@pytest.mark.parametrize("heads", [(32, 32, 128), (28, 4, 128), (6, 2, 40), (4, 4, 80)])
def test_kv4_encode_equals_the_reference(rng, heads, rows, full, dtype):
    """Queries within a rounding, codes within 1 of those of the same scale; what is read back are
    the codes' own values, and the other layer's stack stays."""
    (num_heads, kv_heads, dim), dtype = heads, jnp.dtype(dtype)
    shape = (2, rows, kv_heads)

    def stored():
        codes = jnp.asarray(rng.integers(0, 256, (*shape, dim // 2)), jnp.uint8)
        scale = jnp.asarray(rng.random(shape), jnp.bfloat16)
        return codes, scale, jnp.asarray(rng.integers(0, 16, shape), jnp.uint8)

    angle = draw(rng, rows, dim // 2, scale=3)
    qkv = draw(rng, rows, (num_heads + 2 * kv_heads) * dim, dtype=dtype)
    key, value = stored(), stored()
    options: dict[str, Any] = {"site_layer": 2, "read_dtype": dtype}
    if full:
        for name in ("query_transform", "key_transform"):
            options[name] = draw(rng, 3, dim, dim, scale=dim**-0.5)
        options["clip"] = jnp.asarray(rng.uniform(0.7, 1.0, (3, 2, 2)), jnp.float32)
    arrays = qkv, jnp.cos(angle), jnp.sin(angle), key, value, 1
    found = kv4_encode(*arrays, **options, impl="pallas_triton")
    expected = kv4_encode(*arrays, **options, impl="xla")
    assert found.query.dtype == found.key.dtype == found.value.dtype == dtype
    query, reference = (np.asarray(a.query, np.float32) for a in (found, expected))
    # A transform's operands keep 16 bits in the kernel.
    near = 2 * BFLOAT16 if dtype == jnp.bfloat16 else 1e-4
    assert np.abs(query - reference).max() <= near * np.abs(reference).max()
    for new, other, old, read in (
        (found.stored[0], expected.stored[0], key, found.key),
        (found.stored[1], expected.stored[1], value, found.value),
    ):
        for after, before in zip(new, old, strict=True):
            np.testing.assert_array_equal(after[0], before[0])
        own, others = ([array[1] for array in stack] for stack in (new, other))
        step, other_step = (np.asarray(a[1], np.float32) for a in (own, others))
        np.testing.assert_allclose(step, other_step, rtol=2 * BFLOAT16)
        assert_near(own[2], others[2], 0.1)
        back = np.asarray(dequantize(*own))
        np.testing.assert_array_equal(read, jnp.asarray(back).astype(dtype))
        # What is read back: within two steps, one for the code and one for the zero.
        off = np.abs(back - np.asarray(dequantize(*others))) / other_step[..., None]
        assert off.max() <= 2.2
        assert off.mean() <= 0.1


LENGTHS = [[20, 7, 33], [11, 64, 5], [4, 2, 63]]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llava", "qwen"])
def test_the_fused_step_is_near_the_modules(monkeypatch, family, method, dtype):
    """One step. What the first layer appends is compared alone; in the logits a code on the other
    side of a boundary has moved others, so their distance is bounded. In the interpreter, which
    rounds as the kernels do, it was at most 0.05 in float32, 0.11 in bfloat16."""
    config = tiny_config(family)
    model = random_model(config, METHODS[method], jnp.dtype(dtype))
    assert obstacle(model.decoder.layers) is None
    groups = random_groups(config, LENGTHS, [1, 2, 1])
    found, cache = steps(model, groups, 1, monkeypatch, fused=True)
    expected, expected_cache = steps(model, groups, 1, monkeypatch, fused=False)
    off = np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    print("relative distance", off.max())
    assert off.max() <= (0.15 if dtype == "float32" else 0.3)
    for one, other in zip(cache, expected_cache, strict=True):
        np.testing.assert_array_equal(one.lengths, other.lengths)
    for kind in ("key", "value"):
        codes, reference = (
            np.asarray(unpack_uint4(getattr(g[0], kind)[0][0]), int)
            for g in (cache, expected_cache)
        )
        zeros, other_zeros = (
            np.asarray(getattr(g[0], kind)[2][0], int) for g in (cache, expected_cache)
        )
        for sample, length in enumerate(LENGTHS[0]):
            # A zero on the other side of a boundary moves all codes of its head by one, not what
            # they mean: they count from their zero.
            off = codes[sample, :, length] - zeros[sample, :, length, None]
            off -= reference[sample, :, length] - other_zeros[sample, :, length, None]
            # Of unrelated codes it is about 5. In bfloat16 inputs fall on the boundaries between
            # codes more often.
            assert np.abs(off).mean() <= (0.25 if dtype == "float32" else 0.5)
            assert np.abs(off).max() <= 2
            codes[sample, :, length] = reference[sample, :, length]
        np.testing.assert_array_equal(codes, reference)


def test_a_step_makes_no_choice_at_run_time_and_no_copy_of_the_cache():
    """Of a cache that is donated: the kernels write in place."""
    config = tiny_config("llava")
    model = random_model(config, METHODS["FlatQuant"], jnp.bfloat16)
    (group,) = random_groups(config, [[20] * 8], [4], capacity=4096)
    arguments = jnp.zeros(8, jnp.int32), jnp.full(8, 50), (group,), jnp.ones(8, bool)

    def step(model, tokens, position, groups, active):
        return model.decoder.step(tokens, position, groups, active)

    lowered = jax.jit(step, donate_argnums=3).lower(model, *arguments)
    assert "xla.gpu.triton" in lowered.as_text()
    compiled = lowered.compile()
    assert "conditional(" not in (compiled.as_text() or "conditional(")
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.alias_size_in_bytes >= group.nbytes
    assert memory.temp_size_in_bytes < group.nbytes
