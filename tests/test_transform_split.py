"""A row whose transform several programs share, and its range in float16: interpreted, lowered."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels.transform_quantize.api as quantize_api
from pallas_kernels.transform_quantize import transform_quantize_reference
from pallas_kernels.transform_quantize.reference import Sites
from quota_jax.quant.flatquant import factor_pair
from tests.test_transform_quantize import lower, made, near, newer_jax, triton


@newer_jax
@triton
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e4, 1e30, 0.0])
def test_rows_of_any_size_are_brought_into_the_range_of_float16(size, split):
    from pallas_kernels.transform_quantize.pallas_triton import transform_quantize_triton
    from pallas_kernels.transform_quantize.pallas_triton_split import transform_quantize_split

    (x, _, sites), _ = made("gate", 6, jnp.bfloat16)
    x = (x[:, :96].astype(jnp.float32) * size).astype(jnp.bfloat16)
    sites = Sites(left=sites.left, right=sites.right)
    if split:
        found = transform_quantize_split(x, sites, jnp.int32(1), bits=4, interpret=True)
    else:
        found = transform_quantize_triton(
            x, None, sites, jnp.int32(1), bits=4, eps=0.0, interpret=True
        )
    own = jax.tree.map(lambda a: a[1], sites)
    near(found, transform_quantize_reference(x, None, own, bits=4, eps=0.0), x)


def test_rows_are_shared_where_they_must_be_or_are_few_and_long():
    assert quantize_api.is_split(2560, 18944, 128)
    assert quantize_api.is_split(8, 11008, 86)
    assert not quantize_api.is_split(2560, 11008, 86)
    assert not quantize_api.is_split(1, 4096, 64)


SPLIT: dict[str, Any] = {
    # rows, factors, options; 6 x 148 is read as 128 + 32 columns of which 20 are real.
    "gate": (5, (8, 12), {"gated": True}),
    "gate and padding": (3, (19, 20), {"gated": True, "padding": 6}),
    "large right": (2, (6, 148), {"gated": True, "clip": True}),
    "tall": (2, (86, 16), {"clip": True}),
    "activation": (2, (12, 20), {"activation": "quick_gelu", "padding": 3}),
}


def split_example(name, dtype) -> tuple[Any, Any, dict[str, Any]]:
    rows, (a, b), options = SPLIT[name]
    rng = np.random.default_rng(11)

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape, np.float32))

    clip = jnp.asarray(0.8 + 0.2 * rng.random((3, 2), np.float32))
    sites = Sites(
        left=draw(3, a, a) / a**0.5,
        right=draw(3, b, b) / b**0.5,
        clip=clip if options.get("clip") else None,
    )
    options = {key: value for key, value in options.items() if key != "clip"}
    width = (2 if options.get("gated") else 1) * (a * b + options.get("padding", 0))
    return draw(rows, width).astype(dtype), sites, options


@newer_jax
@triton
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("columns", [16, 32])
@pytest.mark.parametrize("name", SPLIT)
def test_a_row_of_several_programs_equals_the_reference(name, columns, dtype):
    from pallas_kernels.transform_quantize.pallas_triton_split import (
        Plan,
        transform_quantize_split,
    )

    x, sites, options = split_example(name, jnp.dtype(dtype))
    plan = Plan(columns=columns, warps=4)
    found = transform_quantize_split(
        x, sites, jnp.int32(2), bits=4, **options, plan=plan, interpret=True
    )
    own = jax.tree.map(lambda a: a[2], sites)
    expected = transform_quantize_reference(x, None, own, bits=4, eps=0.0, **options)
    near(found, expected, x)
    if padding := options.get("padding"):
        np.testing.assert_array_equal(found.codes[:, -padding:], 0)


@newer_jax
@pytest.mark.parametrize("rows", [1, 8, 2560])
@pytest.mark.parametrize("inputs", [11008, 18944])
def test_a_row_of_several_programs_lowers(inputs, rows):
    from pallas_kernels.transform_quantize.pallas_triton_split import transform_quantize_split

    spec: Any = jax.ShapeDtypeStruct
    a, b = factor_pair(inputs)
    sites = Sites(
        left=spec((3, a, a), jnp.float32),
        right=spec((3, b, b), jnp.float32),
        clip=spec((3, 2), jnp.float32),
    )
    kernel = functools.partial(transform_quantize_split, bits=4, gated=True)
    text = lower(kernel, spec((rows, 2 * inputs), jnp.bfloat16), sites, spec((), jnp.int32))
    assert text.count("triton") >= 2
