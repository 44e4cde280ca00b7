"""``transform_quantize`` for vision towers: LayerNorm and activations without a gate."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels.transform_quantize.api as quantize_api
from pallas_kernels.stable import ACTIVATIONS, activated, summed
from pallas_kernels.transform_quantize import transform_quantize, transform_quantize_reference
from pallas_kernels.transform_quantize.reference import Sites
from quota_jax.config.fields import ACTIVATIONS as CONFIGURED
from quota_jax.nn.linear import kronecker
from quota_jax.nn.norm import Norm
from quota_jax.quant.flatquant import factor_pair
from quota_jax.quant.quantizers import quantize_activation
from tests.test_transform_quantize import HOPPER, lower, newer_jax, triton

IN_KERNEL = [name for name in ACTIVATIONS if name != "gelu"]
SIZES = [1152, 80, 48]
"""None is a power of two: a program's row ends before its tile does."""


def example(seed: int, rows: int, inputs: int, dtype: Any, *, transform: bool, norm: bool = True):
    """Input, what is added, and parameters of three layers. The rows are far off zero, so that
    whatever of the padding came into mean or variance would show."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape, np.float32))

    a, b = factor_pair(inputs)
    sites = Sites(
        norm=(1 + 0.3 * draw(3, inputs)).astype(dtype) if norm else None,
        norm_bias=draw(3, inputs).astype(dtype) if norm else None,
        left=draw(3, a, a) / a**0.5 if transform else None,
        right=draw(3, b, b) / b**0.5 if transform else None,
        clip=jnp.asarray(0.8 + 0.2 * rng.random((3, 2), np.float32)) if transform else None,
    )
    offset = 5.0 if norm else 0.0
    added = draw(rows, inputs).astype(dtype) if norm else None
    return (2 * draw(rows, inputs) + offset).astype(dtype), added, sites


def quantized(x: Any, sites: Sites, bits: int) -> tuple[Any, Any]:
    """Transform and quantization by the modules of layer 2."""
    if sites.left is None:
        return quantize_activation(x, bits, None)
    assert sites.right is not None
    assert sites.clip is not None
    return quantize_activation(kronecker(x, sites.left[2], sites.right[2]), bits, sites.clip[2])


@pytest.mark.parametrize("transform", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_sum_and_a_layer_norm_equal_the_modules_bit_for_bit(dtype, bits, transform):
    x, added, sites = example(1, 5, 48, jnp.dtype(dtype), transform=transform)
    norm = Norm({"scale": sites.norm, "bias": sites.norm_bias}, eps=1e-5)

    def modules(x, added):
        states = summed(x, added)
        return states, *quantized(norm(states, 2), sites, bits)

    def fused(x, added):
        rows = transform_quantize(x, 2, bits=bits, added=added, eps=1e-5, **sites._asdict())
        return rows.states, rows.codes, rows.scale[:5]

    for wrap in (lambda function: function, jax.jit):
        for one, other in zip(wrap(fused)(x, added), wrap(modules)(x, added), strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_layer_norm_is_one(dtype):
    """Against float64, one row nearly constant: its variance is 1e-6 of its mean's square."""
    x, _, sites = example(2, 4, 80, jnp.dtype(dtype), transform=False)
    weight, bias = sites.norm, sites.norm_bias
    assert weight is not None
    assert bias is not None
    x = x.at[0].set((5 + 0.005 * np.sin(np.arange(80.0))).astype(x.dtype))
    found = transform_quantize(x, 1, bits=8, norm=weight, norm_bias=bias, eps=1e-5)
    exact = np.asarray(x, np.float64)
    exact = exact - exact.mean(-1, keepdims=True)
    exact = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-5)
    exact = exact * np.asarray(weight[1], np.float64) + np.asarray(bias[1], np.float64)
    step = np.asarray(found.scale[:4], np.float64)[:, None]
    off = np.abs(np.asarray(found.codes) * step - exact).max(-1)
    assert (off <= step[:, 0] * (0.51 if dtype == "float32" else 1.1)).all()


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("transform", [False, True])
def test_an_activation_equals_the_modules_bit_for_bit(transform, dtype, name):
    x, _, sites = example(3, 5, 80, jnp.dtype(dtype), transform=transform, norm=False)
    found = transform_quantize(x, 2, bits=8, activation=name, **sites._asdict())
    codes, scale = quantized(activated(x, name), sites, 8)
    np.testing.assert_array_equal(found.codes, codes)
    np.testing.assert_array_equal(found.scale[:5], scale)


def test_activations_are_those_of_the_configurations_and_near_their_definitions():
    assert set(ACTIVATIONS) == set(CONFIGURED)
    x = jnp.linspace(-12, 12, 2001)
    definitions = {
        "gelu": functools.partial(jax.nn.gelu, approximate=False),
        "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
        "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
        "relu": jax.nn.relu,
        "silu": jax.nn.silu,
    }
    for name, definition in definitions.items():
        np.testing.assert_allclose(activated(x, name), definition(x), rtol=1e-6, atol=2e-6)
        rounded = activated(x.astype(jnp.bfloat16), name).astype(jnp.float32)
        exact = definition(x.astype(jnp.bfloat16).astype(jnp.float32))
        # One rounding, half a unit in the last of 8 places, and none in between.
        np.testing.assert_allclose(rounded, exact, rtol=2.0**-8, atol=2e-6)


def compare(x, added, sites, kwargs, rows):
    from pallas_kernels.transform_quantize.pallas_triton import Plan, transform_quantize_triton

    found = transform_quantize_triton(
        x, added, sites, jnp.int32(2), **kwargs, plan=Plan(rows=rows, warps=4), interpret=True
    )
    expected = transform_quantize_reference(x, added, jax.tree.map(lambda a: a[2], sites), **kwargs)
    np.testing.assert_allclose(found.scale[: len(x)], expected.scale[: len(x)], rtol=3e-5)
    off = np.abs(np.asarray(found.codes, int) - np.asarray(expected.codes, int))
    assert off.max() <= 1
    assert off.mean() <= 2e-3
    if added is not None:
        np.testing.assert_array_equal(found.states, expected.states)


@newer_jax
@triton
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("transform", [False, True])
@pytest.mark.parametrize("inputs", SIZES)
def test_the_layer_norm_in_the_interpreter_equals_the_reference(inputs, transform, rows):
    x, added, sites = example(4, 5, inputs, jnp.float32, transform=transform)
    compare(x, added, sites, {"bits": 4, "eps": 1e-5}, rows)


@newer_jax
@triton
@pytest.mark.parametrize("transform", [False, True])
@pytest.mark.parametrize(
    ("inputs", "name"), [*((80, name) for name in IN_KERNEL), (1152, "quick_gelu")]
)
def test_an_activation_in_the_interpreter_equals_the_reference(inputs, name, transform):
    x, _, sites = example(5, 5, inputs, jnp.float32, transform=transform, norm=False)
    compare(x, None, sites, {"bits": 4, "eps": 0.0, "activation": name}, 1)


@newer_jax
@pytest.mark.parametrize("rows", [8, 584])
@pytest.mark.parametrize("transform", [False, True])
@pytest.mark.parametrize(
    ("inputs", "name"), [(1024, None), (1152, None), *((4096, name) for name in IN_KERNEL)]
)
def test_the_kernel_lowers_for_a_tower(inputs, name, transform, rows):
    from pallas_kernels.transform_quantize.pallas_triton import transform_quantize_triton

    made = functools.partial(example, 6, rows, inputs, jnp.bfloat16, transform=transform)
    x, added, sites = jax.eval_shape(functools.partial(made, norm=name is None))
    kernel = functools.partial(transform_quantize_triton, bits=4, eps=1e-5, activation=name)
    assert "triton" in lower(kernel, x, added, sites, jax.ShapeDtypeStruct((), jnp.int32))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"norm_bias": jnp.ones(16)}, "norm_bias needs norm"),
        ({"activation": "swish"}, "no activation 'swish'; known: .*'quick_gelu'"),
        ({"activation": "silu", "gated": True}, "has an activation already"),
        ({"activation": "silu", "norm": jnp.ones(16)}, "neither a norm nor a sum"),
        ({"activation": "silu", "added": jnp.ones((2, 16))}, "neither a norm nor a sum"),
    ],
)
def test_bad_calls_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        transform_quantize(jnp.ones((2, 16)), **({"bits": 4} | options))


def test_an_exact_gelu_is_left_to_xla(monkeypatch):
    monkeypatch.setattr(quantize_api, "find_gpu", lambda: HOPPER)
    assert quantize_api.automatic(4096, 1, "quick_gelu") == "pallas_triton"
    assert quantize_api.automatic(4096, 1, "gelu") == "xla"
    assert transform_quantize(jnp.ones((2, 16)), bits=4, activation="gelu").codes.max() == 7
    with pytest.raises(ValueError, match="no error function"):
        transform_quantize(jnp.ones((2, 16)), bits=4, activation="gelu", impl="pallas_triton")
