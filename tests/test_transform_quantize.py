"""What stands between the matmuls of a decoder layer: ``transform_quantize``, ``kv4_append`` and
the attention kernel with free block sizes, in the interpreter and lowered. A row of several
programs: ``test_transform_split.py``; on a GPU: ``test_gpu_decode.py``."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

import pallas_kernels.kv4_attention.api as attention_api
import pallas_kernels.transform_quantize.api as quantize_api
from pallas_kernels.accelerator import Gpu
from pallas_kernels.kv4_append import kv4_append
from pallas_kernels.kv4_append.reference import Sites as CacheSites
from pallas_kernels.kv4_attention import kv4_attention
from pallas_kernels.packing import pack_int4
from pallas_kernels.transform_quantize import transform_quantize, transform_quantize_reference
from pallas_kernels.transform_quantize.reference import Sites
from quota_jax.nn.linear import kronecker
from quota_jax.nn.norm import Norm
from quota_jax.nn.rope import rotate
from quota_jax.quant.flatquant import factor_pair
from quota_jax.quant.quantizers import quantize_activation, quantize_kv

newer_jax = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="the kernels are for jax 0.11 (Python 3.12)"
)
triton = pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
H100 = AbstractMesh(
    (1,),
    ("x",),
    (AxisType.Explicit,),
    abstract_device=AbstractDevice(
        device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu"
    ),
)
HOPPER = Gpu(capability=(9, 0), num_sms=132)


def lower(function, *shapes) -> str:
    """For a GPU that is not there."""
    with warnings.catch_warnings(), use_abstract_mesh(H100):
        warnings.filterwarnings("ignore", "The Pallas Triton backend", DeprecationWarning)
        return jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


def example(
    rng, rows, inputs, dtype, *, gated, added, norm, transform, clip, padding=0
) -> tuple[Any, Any, Any]:
    """Input, what is added, and parameters of three layers."""

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape, np.float32))

    a, b = factor_pair(inputs) if transform != "heads" else (8, inputs // 8)
    sites = Sites(
        norm=draw(3, inputs).astype(dtype) if norm else None,
        left=draw(3, a, a) / a**0.5 if transform else None,
        right=draw(3, b, b) / b**0.5 if transform == "both" else None,
        clip=jnp.asarray(0.8 + 0.2 * rng.random((3, 2), np.float32)) if clip else None,
    )
    # Padding is not looked at: it may hold anything here.
    x = draw(rows, (2 if gated else 1) * (inputs + padding)).astype(dtype)
    return x, draw(rows, inputs).astype(dtype) if added else None, sites


CASES = {
    "plain": (3, 96, {}),
    "sum and norm": (3, 96, {"added": True, "norm": True}),
    "norm and transform": (5, 96, {"added": True, "norm": True, "transform": "both", "clip": True}),
    "padded factors": (2, 380, {"norm": True, "transform": "both"}),
    "across heads": (3, 128, {"transform": "heads", "clip": True}),
    "gate": (5, 96, {"gated": True, "transform": "both"}),
    "gate and padding": (5, 380, {"gated": True, "transform": "both", "padding": 6}),
}


def made(name, seed, dtype) -> tuple[tuple[Any, Any, Any], Any]:
    rows, inputs, options = CASES[name]
    given = {"gated": False, "added": False, "norm": False, "transform": None, "clip": False}
    return example(np.random.default_rng(seed), rows, inputs, dtype, **(given | options)), options


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_reference_equals_the_layers_it_stands_for(bits, dtype):
    """Bit by bit: residual sum, ``Norm``, ``kronecker``, ``quantize_activation``."""
    (x, added, sites), _ = made("norm and transform", 1, jnp.dtype(dtype))
    found = transform_quantize(
        x, 2, bits=bits, added=added, norm=sites.norm, eps=1e-5, left=sites.left,
        right=sites.right, clip=sites.clip,
    )  # fmt: skip
    states = x + added
    normed = Norm({"scale": sites.norm}, eps=1e-5)(states, 2)
    turned = kronecker(normed, sites.left[2], sites.right[2])
    codes, scale = quantize_activation(turned, bits, sites.clip[2])
    np.testing.assert_array_equal(found.states, states)
    np.testing.assert_array_equal(found.codes, codes)
    np.testing.assert_array_equal(found.scale[: scale.size], scale)


def test_the_transform_is_the_kronecker_product():
    (x, _, sites), _ = made("padded factors", 2, jnp.float32)
    found = transform_quantize(x, 0, bits=8, left=sites.left, right=sites.right)
    whole = np.kron(np.asarray(sites.left[0], np.float64), np.asarray(sites.right[0], np.float64))
    exact = np.asarray(x, np.float64) @ whole
    back = np.asarray(found.codes) * np.asarray(found.scale)[: len(x), None]
    assert np.abs(back - exact).max() <= 0.501 * np.asarray(found.scale).max()
    heads = transform_quantize(x, 0, bits=8, left=sites.left)
    whole = np.kron(np.asarray(sites.left[0], np.float64), np.eye(38))
    back = np.asarray(heads.codes) * np.asarray(heads.scale)[: len(x), None]
    assert np.abs(back - np.asarray(x) @ whole).max() <= 0.501 * np.asarray(heads.scale).max()


def test_padding_gets_zeros_and_changes_nothing_else():
    (x, _, sites), _ = made("gate", 4, jnp.float32)
    own = {"left": sites.left, "right": sites.right, "gated": True, "bits": 4}
    wide = jnp.pad(x.reshape(5, 2, 96), ((0, 0), (0, 0), (0, 32))).reshape(5, 256)
    expected = transform_quantize(x, 1, **own)
    found = transform_quantize(wide, 1, **own, padding=32)
    np.testing.assert_array_equal(found.codes[:, :96], expected.codes)
    np.testing.assert_array_equal(found.codes[:, 96:], 0)
    np.testing.assert_array_equal(found.scale, expected.scale)


def near(found, expected, x) -> None:
    """Operands keep 16 bits, behind bfloat16 activations 11: a code next to a rounding boundary may
    fall on its other side."""
    rows, short = len(x), x.dtype == jnp.bfloat16
    rtol = 2.0**-10 if short else 3e-5
    np.testing.assert_allclose(found.scale[:rows], expected.scale[:rows], rtol=rtol)
    off = np.abs(np.asarray(found.codes, int) - np.asarray(expected.codes, int))
    assert off.max() <= 1
    assert off.mean() <= (5e-3 if short else 2e-3)


@newer_jax
@triton
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_kernel_in_the_interpreter_equals_the_reference(name, rows, dtype):
    from pallas_kernels.transform_quantize.pallas_triton import Plan, transform_quantize_triton

    (x, added, sites), options = made(name, 3, jnp.dtype(dtype))
    kwargs: dict[str, Any] = {"bits": 4, "eps": 1e-5, "gated": options.get("gated", False)}
    kwargs["padding"] = options.get("padding", 0)
    found = transform_quantize_triton(
        x, added, sites, jnp.int32(2), **kwargs, plan=Plan(rows=rows, warps=4), interpret=True
    )
    own = jax.tree.map(lambda a: a[2], sites)
    expected = transform_quantize_reference(x, added, own, **kwargs)
    near(found, expected, x)
    if padding := kwargs["padding"]:
        np.testing.assert_array_equal(found.codes[:, -padding:], 0)
    if added is not None:
        np.testing.assert_array_equal(found.states, expected.states)


@newer_jax
@pytest.mark.parametrize("inputs", [1024, 1280, 3420, 3584, 4096, 11008])
@pytest.mark.parametrize("rows", [1, 8, 2560])
def test_the_kernel_lowers_for_the_sizes_of_both_models(inputs, rows):
    from pallas_kernels.transform_quantize.pallas_triton import transform_quantize_triton

    spec: Any = jax.ShapeDtypeStruct
    a, b = factor_pair(inputs)
    gated = inputs in (3420, 11008)
    sites = Sites(
        norm=None if gated else spec((3, inputs), jnp.bfloat16),
        left=spec((3, a, a), jnp.float32),
        right=spec((3, b, b), jnp.float32),
        clip=spec((3, 2), jnp.float32),
    )
    kernel = functools.partial(transform_quantize_triton, bits=4, eps=1e-5, gated=gated)
    x = spec((rows, 2 * inputs if gated else inputs), jnp.bfloat16)
    added = None if gated else spec((rows, inputs), jnp.bfloat16)
    assert "triton" in lower(kernel, x, added, sites, spec((), jnp.int32))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": 3}, "bits must be 4 or 8"),
        ({"right": jnp.eye(4)}, "right needs left"),
        ({"left": jnp.eye(4), "padding": 4}, "padding needs right"),
        ({"left": jnp.eye(4), "right": jnp.eye(4), "padding": 4}, "do not make 12 inputs"),
        ({"left": jnp.eye(5), "right": jnp.eye(4)}, "do not make 16 inputs"),
        ({"gated": True, "norm": jnp.ones(8)}, "neither a norm nor a sum"),
        ({"impl": "pallas_triton"}, "needs an NVIDIA GPU"),
    ],
)
def test_bad_calls_are_refused(monkeypatch, options, words):
    monkeypatch.setattr(quantize_api, "find_gpu", lambda: None)
    with pytest.raises(ValueError, match=words):
        transform_quantize(jnp.ones((2, 16)), **({"bits": 4} | options))


def test_a_transform_that_does_not_fit_is_refused_and_not_taken(monkeypatch):
    monkeypatch.setattr(quantize_api, "find_gpu", lambda: HOPPER)
    assert quantize_api.automatic(11008, 86) == "pallas_triton"
    assert quantize_api.automatic(18944) == "pallas_triton"
    # Behind a norm one program owns the row.
    assert quantize_api.automatic(18944, 128) == "xla"
    assert "128 x 148" in quantize_api.refusals(18944, 128)["pallas_triton"]
    assert quantize_api.automatic(18944, 128, splits=True) == "pallas_triton"
    assert "128 x 296" in quantize_api.refusals(37888, 128, splits=True)["pallas_triton"]


def append_example(rng, heads, dtype, *, full) -> tuple[Any, Any]:
    """Projections of one token of three samples, two layers of cache with 64 places."""
    num_heads, kv_heads, dim = heads
    cache = (2, 3, kv_heads, 64)

    def filled():
        codes = jnp.asarray(rng.integers(0, 256, (*cache, dim // 2)), jnp.uint8)
        scale = jnp.asarray(rng.random(cache), jnp.bfloat16)
        return codes, scale, jnp.asarray(rng.integers(0, 16, cache), jnp.uint8)

    angle = rng.random((3, dim // 2)) * 6
    qkv = jnp.asarray(rng.standard_normal((3, (num_heads + 2 * kv_heads) * dim)), dtype)
    cos, sin = jnp.asarray(np.cos(angle), jnp.float32), jnp.asarray(np.sin(angle), jnp.float32)

    def square():
        return jnp.asarray(rng.standard_normal((3, dim, dim)) / dim**0.5, jnp.float32)

    clip = jnp.asarray(0.7 + 0.3 * rng.random((3, 2, 2)), jnp.float32)
    bias = jnp.asarray(rng.standard_normal((3, qkv.shape[1])), jnp.bfloat16)
    sites = CacheSites(square(), square(), clip, bias) if full else CacheSites()
    # The last sample's cache is full.
    lengths = jnp.asarray([0, 13, 64], jnp.int32)
    return (qkv, cos, sin, filled(), filled(), lengths), sites


HEADS = [(4, 4, 16), (6, 2, 40), (7, 1, 80)]


@pytest.mark.parametrize("heads", HEADS)
def test_the_append_is_rotation_quantization_and_a_write(heads):
    num_heads, kv_heads, dim = heads
    arrays, sites = append_example(np.random.default_rng(4), heads, jnp.float32, full=True)
    qkv, cos, sin, key, value, _lengths = arrays
    found = kv4_append(
        *arrays, layer=1, site_layer=2, query_transform=sites.query, key_transform=sites.key,
        clip=sites.clip, bias=sites.bias,
    )  # fmt: skip
    qkv = qkv + sites.bias[2].astype(jnp.float32)
    parts = jnp.split(qkv.reshape(3, -1, dim), (num_heads, num_heads + kv_heads), axis=1)
    query = rotate(parts[0], cos, sin) @ sites.query[2]
    keys = rotate(parts[1], cos, sin) @ sites.key[2]
    np.testing.assert_allclose(found.query, query, atol=1e-5)
    for new, old, heads_, clip in (
        (found.key, key, keys, sites.clip[2, 0]),
        (found.value, value, parts[2], sites.clip[2, 1]),
    ):
        low = np.minimum(np.asarray(heads_).min(-1), 0) * float(clip[1])
        high = np.maximum(np.asarray(heads_).max(-1), 0) * float(clip[0])
        step = np.asarray(((high - low) / 15).astype(jnp.bfloat16), np.float32)
        for sample, length in enumerate((0, 13)):
            np.testing.assert_allclose(
                np.asarray(new[1], np.float32)[1, sample, :, length], step[sample], rtol=2**-8
            )
        for one, other in zip(new, old, strict=True):
            changed: Any = np.asarray(one != other).reshape(2, 3, kv_heads, 64, -1).any((2, 4))
            assert not changed[0].any()
            assert not changed[1, 2].any()
            assert set(zip(*np.nonzero(changed[1]), strict=True)) <= {(0, 0), (1, 13)}


@newer_jax
@triton
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("heads", HEADS)
def test_the_append_in_the_interpreter_equals_the_reference(heads, full):
    from pallas_kernels.kv4_append import kv4_append_reference
    from pallas_kernels.kv4_append.pallas_triton import kv4_append_triton

    for dtype in (jnp.float32, jnp.bfloat16):
        # A bias comes with projections in float32.
        given = jnp.float32 if full else dtype
        arrays, sites = append_example(np.random.default_rng(5), heads, given, full=full)
        arrays = (*arrays, jnp.int32(1), jnp.int32(2), sites)
        expected = kv4_append_reference(*arrays, dtype=dtype)
        found = kv4_append_triton(*arrays, dtype=dtype, interpret=True)
        assert found.query.dtype == expected.query.dtype == dtype
        np.testing.assert_allclose(
            np.asarray(found.query, np.float32), np.asarray(expected.query, np.float32), atol=2e-6
        )
        for one, other in zip(found.key + found.value, expected.key + expected.value, strict=True):
            np.testing.assert_array_equal(one, other)


def test_an_append_without_queries_is_refused():
    arrays, _ = append_example(np.random.default_rng(6), (4, 4, 16), jnp.float32, full=False)
    with pytest.raises(ValueError, match="are no queries"):
        kv4_append(arrays[0][:, : 8 * 16], *arrays[1:], layer=0)


@newer_jax
@pytest.mark.parametrize("full", [False, True])
def test_the_append_lowers(full):
    from pallas_kernels.kv4_append.pallas_triton import kv4_append_triton

    spec: Any = jax.ShapeDtypeStruct
    cache = tuple(
        spec((2, 8, 4, 384, *rest), dtype)
        for rest, dtype in (((64,), jnp.uint8), ((), jnp.bfloat16), ((), jnp.uint8))
    )
    square, bias = spec((3, 128, 128), jnp.float32), spec((3, 36 * 128), jnp.bfloat16)
    clip = spec((3, 2, 2), jnp.float32)
    sites = CacheSites(square, square, clip, bias) if full else CacheSites()
    half, index = spec((8, 64), jnp.float32), spec((), jnp.int32)
    qkv = spec((8, 36 * 128), jnp.float32 if full else jnp.bfloat16)
    lengths = spec((8,), jnp.int32)
    kernel = functools.partial(kv4_append_triton, dtype=jnp.dtype(jnp.bfloat16))
    text = lower(kernel, qkv, half, half, cache, cache, lengths, index, index, sites)
    assert "triton" in text


def attention_example(rng, heads, batch):
    num_heads, kv_heads, dim = heads
    stored = []
    for _ in range(2):
        values = rng.standard_normal((2, batch, kv_heads, 192, dim), np.float32) * 2 + 0.3
        codes, scale, zero = quantize_kv(jnp.asarray(values), 4)
        stored.append((pack_int4(codes), scale, zero))
    (k, k_scale, k_zero), (v, v_scale, v_zero) = stored
    q = jnp.asarray(rng.standard_normal((batch, num_heads, dim), np.float32))
    lengths = jnp.asarray(rng.integers(1, 193, batch), jnp.int32)
    return q, k, v, k_scale, v_scale, k_zero, v_zero, lengths


@newer_jax
@triton
@pytest.mark.parametrize("plan", [(32, False), (128, False), (64, True)])
@pytest.mark.parametrize("heads", [(4, 4, 16), (6, 2, 40), (7, 1, 128)])
def test_attention_by_blocks_in_the_interpreter_equals_the_reference(heads, plan):
    from pallas_kernels.kv4_attention.pallas_triton_blocks import Plan, kv4_attention_blocks

    arrays = attention_example(np.random.default_rng(7), heads, 3)
    tokens, grouped = plan
    found = kv4_attention_blocks(
        *arrays, jnp.int32(1), sm_scale=heads[2] ** -0.5, interpret=True,
        plan=Plan(tokens=tokens, warps=2, grouped=grouped),
    )  # fmt: skip
    expected = kv4_attention(*arrays, 1, sm_scale=heads[2] ** -0.5, impl="xla")
    np.testing.assert_allclose(found, expected, atol=5e-5 if grouped else 2e-5)


@newer_jax
@pytest.mark.parametrize("heads", [(4, 4, 128), (14, 2, 80)])
def test_attention_by_blocks_lowers(heads):
    from pallas_kernels.kv4_attention.pallas_triton_blocks import kv4_attention_blocks

    num_heads, kv_heads, dim = heads
    spec: Any = jax.ShapeDtypeStruct
    cache = (3, 2, kv_heads, 128)
    packed, scale, zero = (
        spec((*cache, dim // 2), jnp.uint8), spec(cache, jnp.bfloat16), spec(cache, jnp.uint8)
    )  # fmt: skip
    shapes = spec((2, num_heads, dim), jnp.bfloat16), packed, packed, scale, scale, zero, zero
    kernel = functools.partial(kv4_attention_blocks, sm_scale=0.1)
    assert "triton" in lower(kernel, *shapes, spec((2,), jnp.int32), spec((), jnp.int32))


def test_attention_by_blocks_is_taken_for_the_groups_that_it_holds(monkeypatch):
    monkeypatch.setattr(attention_api, "find_gpu", lambda: HOPPER)
    assert attention_api.automatic(128, 7) == "pallas_triton_blocks"
    assert attention_api.automatic(128, 1) == "pallas_triton_blocks"
    assert attention_api.automatic(128, 32) == "pallas_triton"
