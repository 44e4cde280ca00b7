"""``kv4_encode`` against the modules it stands for, in the interpreter, and lowered."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels.attention.api as attention_api
import pallas_kernels.kv4_append.api as append_api
import pallas_kernels.kv4_encode.api as encode_api
import quota_jax as qj
from pallas_kernels.attention import operand_dtype
from pallas_kernels.kv4_append import kv4_append
from pallas_kernels.kv4_attention import dequantize
from pallas_kernels.kv4_encode import kv4_encode, kv4_encode_reference
from pallas_kernels.kv4_encode.reference import Sites
from pallas_kernels.packing import unpack_uint4
from quota_jax.bench import example_batch
from quota_jax.config import PRESETS
from quota_jax.nn.attention_cache import CacheQuantizer
from quota_jax.nn.rope import rotary_angles
from quota_jax.quantization import QuantizationConfig
from quota_jax.recipe import Recipe
from tests.decode_samples import METHODS, random_model, tiny_config
from tests.test_transform_quantize import HOPPER, lower, newer_jax, triton

HEADS = [(4, 4, 16), (6, 2, 40), (7, 1, 80)]
LAYERS = 2
"""Layers of a cache; parameters are those of three."""


def example(rng, heads, rows, dtype, *, full) -> tuple[tuple[Any, ...], Sites]:
    """Projection, angles and filled stacks of two layers; parameters of three."""
    num_heads, kv_heads, dim = heads
    shape = (LAYERS, rows, kv_heads)

    def filled():
        codes = jnp.asarray(rng.integers(0, 256, (*shape, dim // 2)), jnp.uint8)
        scale = jnp.asarray(rng.random(shape), jnp.bfloat16)
        return codes, scale, jnp.asarray(rng.integers(0, 16, shape), jnp.uint8)

    def square():
        return jnp.asarray(rng.standard_normal((3, dim, dim)) / dim**0.5, jnp.float32)

    angle = rng.random((rows, dim // 2)) * 6
    cos, sin = (jnp.asarray(f(angle), jnp.float32) for f in (np.cos, np.sin))
    width = (num_heads + 2 * kv_heads) * dim
    qkv = jnp.asarray(rng.standard_normal((rows, width)) + 0.2, dtype)
    clip = jnp.asarray(0.7 + 0.3 * rng.random((3, 2, 2)), jnp.float32)
    sites = Sites(square(), square(), clip) if full else Sites()
    return (qkv, cos, sin, filled(), filled()), sites


def modules(heads, sites: Sites, qkv, angles, layer):
    """What ``CacheQuantizer`` makes of the joined projection of rows ``[B, S]``."""
    num_heads, kv_heads, dim = heads
    names = {"query_transform": sites.query, "key_transform": sites.key, "clip": sites.clip}
    cache = CacheQuantizer(
        {name: value for name, value in names.items() if value is not None},
        QuantizationConfig.parse("W4A4KV4"),
    )
    parts = jnp.split(qkv, (num_heads * dim, (num_heads + kv_heads) * dim), axis=-1)
    query, key, value = (p.reshape(*p.shape[:-1], -1, dim) for p in parts)
    return cache((query, key, value), angles, layer, qkv.dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(("heads", "rows"), [(HEADS[0], 6), (HEADS[1], 5), (HEADS[2], 1)])
def test_the_reference_equals_the_modules_bit_for_bit(heads, rows, full, dtype):
    """A single row of a single head is a matrix-vector product of its own on a CPU."""
    arrays, sites = example(np.random.default_rng(0), heads, rows, jnp.dtype(dtype), full=full)
    qkv, cos, sin, key, value = arrays
    found = jax.jit(functools.partial(kv4_encode, layer=1, site_layer=2, impl="xla"))(
        *arrays, query_transform=sites.query, key_transform=sites.key, clip=sites.clip
    )
    expected = jax.jit(functools.partial(modules, heads, sites))(qkv, (cos, sin), jnp.int32(2))
    for name in ("query", "key", "value"):
        one, other = getattr(found, name), getattr(expected, name)
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    for stack, before, new in zip(found.stored, (key, value), expected.stored, strict=True):
        for array, old, part in zip(stack, before, new, strict=True):
            assert array.dtype == part.dtype
            np.testing.assert_array_equal(array[1], part)
            np.testing.assert_array_equal(array[0], old[0])


def test_angles_of_three_streams_are_taken_as_the_modules_take_them():
    """Qwen's rotary positions of pictures."""
    config = tiny_config("qwen").text
    assert config.mrope_section is not None
    heads = (config.num_heads, config.num_kv_heads, config.head_dim)
    rng = np.random.default_rng(1)
    arrays, sites = example(rng, heads, 10, jnp.float32, full=True)
    angles = rotary_angles(config, jnp.asarray(rng.integers(0, 40, (2, 5, 3))))
    (qkv, _, _, key, value), (cos, sin) = arrays, (a.reshape(10, -1) for a in angles)
    found = kv4_encode(
        qkv, cos, sin, key, value, 0, query_transform=sites.query, key_transform=sites.key,
        clip=sites.clip,
    )  # fmt: skip
    expected = modules(heads, sites, qkv.reshape(2, 5, -1), angles, jnp.int32(0))
    np.testing.assert_array_equal(found.query, expected.query.reshape(found.query.shape))
    np.testing.assert_array_equal(found.key, expected.key.reshape(found.key.shape))


@newer_jax
@triton
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_kernel_in_the_interpreter_equals_the_reference(heads, full, dtype):
    """With more tokens than a program has, and a last program that is not full."""
    from pallas_kernels.kv4_encode.pallas_triton import Plan, kv4_encode_triton

    given, sites = example(np.random.default_rng(2), heads, 21, jnp.dtype(dtype), full=full)
    arrays: Any = (*given, jnp.int32(1), jnp.int32(2), sites)
    plan = Plan(tokens=16, warps=4)
    found = kv4_encode_triton(*arrays, read_dtype=jnp.dtype(dtype), plan=plan, interpret=True)
    expected = kv4_encode_reference(*arrays, read_dtype=jnp.dtype(dtype))
    query, reference = (np.asarray(a.query, np.float32) for a in (found, expected))
    assert found.query.dtype == dtype
    # Operands of a transform keep 16 bits; a result may then round to the next bfloat16.
    near = {"float32": 3e-5 if full else 1e-6, "bfloat16": 2.0**-7 if full else 2.0**-8}[dtype]
    np.testing.assert_allclose(query, reference, rtol=near, atol=near)
    read = found.key, found.value
    for stack, other, before, values in zip(
        found.stored, expected.stored, given[3:5], read, strict=True
    ):
        for array, old in zip(stack, before, strict=True):
            np.testing.assert_array_equal(array[0], old[0])
        codes, scale, zero = (array[1] for array in stack)
        # What attention reads is what the codes say, exactly.
        assert values.dtype == dtype
        np.testing.assert_array_equal(values, dequantize(codes, scale, zero).astype(dtype))
        scales = (np.asarray(a, np.float32) for a in (scale, other[1][1]))
        np.testing.assert_allclose(*scales, rtol=2.0**-7)
        for one, two in ((zero, other[2][1]), (unpack_uint4(codes), unpack_uint4(other[0][1]))):
            off = np.abs(np.asarray(one, int) - np.asarray(two, int))
            assert off.max() <= 1
            # A zero on the other side of a boundary takes all codes of its head along. Without a
            # transform only quotients exactly between two codes differ, which bfloat16 makes
            # frequent: the compiled division is not always correctly rounded.
            assert off.mean() <= (0.03 if full else 0.005)


@newer_jax
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("heads", [(32, 32, 128), (28, 4, 128), (6, 2, 40), (4, 4, 80)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_kernel_lowers(heads, full, dtype):
    from pallas_kernels.kv4_encode.pallas_triton import kv4_encode_triton

    num_heads, kv_heads, dim = heads
    spec: Any = jax.ShapeDtypeStruct
    shape, rows = (3, 640, kv_heads), 640
    stack = (
        spec((*shape, dim // 2), jnp.uint8), spec(shape, jnp.bfloat16), spec(shape, jnp.uint8)
    )  # fmt: skip
    square, clip = spec((3, dim, dim), jnp.float32), spec((3, 2, 2), jnp.float32)
    sites = Sites(square, square, clip) if full else Sites()
    angle, index = spec((rows, dim // 2), jnp.float32), spec((), jnp.int32)
    qkv = spec((rows, (num_heads + 2 * kv_heads) * dim), jnp.dtype(dtype))
    kernel = functools.partial(kv4_encode_triton, read_dtype=jnp.dtype(dtype))
    text = lower(kernel, qkv, angle, angle, stack, stack, index, index, sites)
    assert text.count("custom_call @__gpu$xla.gpu.triton") == 1


@newer_jax
@triton
def test_the_kernel_fits_into_the_prefill(monkeypatch):
    """A pruned prefill of two prompts in the interpreter. Codes on the other side of a boundary
    move what comes after them, so that only the first segment's cache is compared, and the logits'
    distance is bounded (0.003 was seen)."""
    from pallas_kernels.kv4_encode import pallas_triton

    config = tiny_config("qwen")
    model = random_model(config, METHODS["FlatQuant of heads, keys and cache"], jnp.float32)
    batch = example_batch(config, 2, 16)
    recipe = Recipe.uniform(num_layers=4, layers=[1], keep=0.5)
    expected, expected_cache = qj.prefill(model, batch, recipe=recipe)
    kernel, used = pallas_triton.kv4_encode_triton, []

    def interpreted(*arrays, **options):
        used.append(arrays[0].shape[0])
        return kernel(*arrays, **options, interpret=True)

    monkeypatch.setattr(pallas_triton, "kv4_encode_triton", interpreted)
    monkeypatch.setattr(encode_api, "find_gpu", lambda: HOPPER)
    monkeypatch.setattr(encode_api, "on_platform", lambda platform, kernel, elsewhere: kernel)
    jax.clear_caches()
    found, cache = qj.prefill(model, batch, recipe=recipe)
    jax.clear_caches()
    assert len(set(used)) == 2
    off = np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert off.max() <= 0.03
    for kind in ("key", "value"):
        codes, other = (getattr(c.groups[0], kind)[0][0] for c in (cache, expected_cache))
        off = np.abs(np.asarray(unpack_uint4(codes), int) - np.asarray(unpack_uint4(other), int))
        assert off.max() <= 1
        assert off.mean() <= 0.01


def call(**changes: Any):
    """A call of 5 tokens, 4 query heads, 2 key heads of 16, with some arguments changed."""
    arrays, sites = example(np.random.default_rng(3), (4, 2, 16), 5, jnp.float32, full=True)
    names = ("qkv", "cos", "sin", "key", "value")
    given = dict(zip(names, arrays, strict=True)) | {"layer": 0}
    given |= {"query_transform": sites.query, "key_transform": sites.key, "clip": sites.clip}
    return kv4_encode(**(given | changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"qkv": jnp.ones((5, 4 * 16))}, "are no queries beside 2 x 2 heads of 16"),
        ({"qkv": jnp.ones((5, 8 * 16 + 1))}, "are no queries"),
        ({"qkv": jnp.ones((4, 8 * 16))}, r"cos of shape \(5, 8\), expected \(4, 8\)"),
        ({"sin": jnp.ones((5, 4))}, "sin of shape"),
        ({"value": (jnp.ones((2, 5, 2, 8)),) * 3}, "value scales of shape"),
        ({"key_transform": jnp.ones((3, 8, 8))}, "key_transform of shape"),
        ({"query_transform": jnp.ones((16, 16))}, "query_transform of shape"),
        ({"clip": jnp.ones((3, 2))}, "clip of shape"),
        ({"impl": "pallas_triton"}, "needs an NVIDIA GPU"),
        ({"impl": "cudnn"}, "no implementation 'cudnn'"),
    ],
)
def test_bad_calls_are_refused(monkeypatch, changes, words):
    monkeypatch.setattr(encode_api, "find_gpu", lambda: None)
    with pytest.raises(ValueError, match=words):
        call(**changes)


def test_auto_follows_the_gpu_and_the_size_of_heads(monkeypatch):
    monkeypatch.setattr(encode_api, "find_gpu", lambda: None)
    assert encode_api.automatic(128) == "xla"
    monkeypatch.setattr(encode_api, "find_gpu", lambda: HOPPER)
    for dim in (16, 40, 80, 128):
        assert encode_api.automatic(dim, transformed=True) == "pallas_triton"
    assert encode_api.automatic(256) == "pallas_triton"
    assert encode_api.automatic(256, transformed=True) == "xla"
    assert "a multiple of 4 up to 256" in encode_api.refusals(18)["pallas_triton"]


@pytest.mark.parametrize(("batch", "fits"), [(46, True), (47, False), (93, False), (94, True)])
def test_caches_whose_codes_the_kernels_cannot_reach_are_left_to_xla(monkeypatch, batch, fits):
    """LLaVA-1.5-7B unpruned, 704 places a sample: 2^31 bytes of keys are between 46 and 47 samples,
    2^32 between 93 and 94."""
    taken = []

    def on_platform(platform, kernel, elsewhere):
        taken.append(platform)
        return elsewhere

    for api in (encode_api, append_api):
        monkeypatch.setattr(api, "find_gpu", lambda: HOPPER)
        monkeypatch.setattr(api, "on_platform", on_platform)
    spec: Any = jax.ShapeDtypeStruct
    qkv = spec((batch, 96 * 128), jnp.bfloat16)
    half, index = spec((batch, 64), jnp.float32), spec((), jnp.int32)

    def stack(*shape):
        return spec((*shape, 64), jnp.uint8), spec(shape, jnp.bfloat16), spec(shape, jnp.uint8)

    cache = stack(32, batch, 32, 704)
    lengths = spec((batch,), jnp.int32)
    jax.eval_shape(kv4_append, qkv, half, half, cache, cache, lengths, index)
    assert taken == ["cuda"] * fits
    rows = batch * 704
    qkv, half = spec((rows, 96 * 128), jnp.bfloat16), spec((rows, 64), jnp.float32)
    cache = stack(32, rows, 32)
    jax.eval_shape(kv4_encode, qkv, half, half, cache, cache, index)
    assert taken == ["cuda"] * 2 * fits


def test_keys_are_read_back_in_the_dtype_that_attention_takes(monkeypatch):
    """cuDNN's is that of the queries; its reference's is float32, which the modules give too."""
    monkeypatch.setattr(attention_api, "find_gpu", lambda: None)
    assert operand_dtype(jnp.bfloat16, 128) == jnp.float32
    monkeypatch.setattr(attention_api, "find_gpu", lambda: HOPPER)
    head_dim = PRESETS["qwen2_5_vl_7b"].text.head_dim
    assert operand_dtype(jnp.bfloat16, head_dim) == jnp.bfloat16
    assert operand_dtype(jnp.float32, head_dim) == jnp.float32
    monkeypatch.setenv("QUOTA_JAX_XLA", "sequence_attention")
    assert operand_dtype(jnp.bfloat16, head_dim) == jnp.float32
