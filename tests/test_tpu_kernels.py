"""The TPU kernels without a TPU: in the TPU interpreter against the references, and lowered."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.experimental.pallas import tpu as pltpu

import pallas_kernels.int4_matmul.api as matmul_api
import pallas_kernels.kv4_attention.api as attention_api
from pallas_kernels.int4_matmul import int4_matmul
from pallas_kernels.int4_matmul.pallas_tpu import int4_matmul_tpu
from pallas_kernels.int4_matmul.reference import int4_matmul_reference
from pallas_kernels.kv4_attention import kv4_attention
from pallas_kernels.kv4_attention.pallas_tpu import kv4_attention_tpu

INTERPRET = pltpu.InterpretParams()


def matmul_arrays(rows, outputs, inputs, layers=3):
    rng = np.random.default_rng(rows + inputs)
    return (
        jnp.asarray(rng.integers(-128, 128, (rows, inputs)).astype(np.int8)),
        jnp.asarray(rng.random(rows, np.float32)),
        jnp.asarray(rng.integers(0, 256, (layers, outputs, inputs // 2)).astype(np.uint8)),
        jnp.asarray(rng.random((layers, outputs), np.float32)),
    )


def attention_arrays(
    heads, kv_heads, capacity, dim, batch=3, layers=2, dtype=jnp.float32
) -> list[Any]:
    rng = np.random.default_rng(heads + dim)
    shape = (layers, batch, kv_heads, capacity)
    codes = [jnp.asarray(rng.integers(0, 256, (*shape, dim // 2)).astype(np.uint8)) for _ in "kv"]
    scales = [jnp.asarray(0.1 * rng.random(shape, np.float32), dtype) for _ in "kv"]
    zeros = [jnp.asarray(rng.integers(0, 16, shape).astype(np.uint8)) for _ in "kv"]
    query = jnp.asarray(rng.standard_normal((batch, heads, dim), np.float32))
    lengths = jnp.asarray([1, capacity, capacity - 37], jnp.int32)
    return [query, *codes, *scales, *zeros, lengths]


# One tile, ragged tiles of tokens and rows, several steps with a ragged last one.
@pytest.mark.parametrize(
    ("rows", "outputs", "inputs"), [(1, 96, 64), (5, 300, 1096), (300, 64, 3420)]
)
def test_the_matmul_is_exact(rows, outputs, inputs):
    arrays = matmul_arrays(rows, outputs, inputs)
    layer = jnp.int32(2)
    found = int4_matmul_tpu(*arrays, layer, out_dtype=jnp.float32, interpret=INTERPRET)
    np.testing.assert_array_equal(found, int4_matmul_reference(*arrays, layer))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "capacity", "dim"),
    [(4, 4, 64, 16), (6, 2, 576, 40), (7, 1, 1088, 128)],
)
def test_decode_attention_equals_the_reference(heads, kv_heads, capacity, dim):
    arrays = attention_arrays(heads, kv_heads, capacity, dim)
    found = kv4_attention_tpu(*arrays, layer=jnp.int32(1), sm_scale=dim**-0.5, interpret=INTERPRET)
    expected = kv4_attention(*arrays, layer=1, sm_scale=dim**-0.5, impl="xla")
    np.testing.assert_allclose(found, expected, atol=2e-6 * float(jnp.abs(expected).max()) + 1e-6)


def test_nothing_past_the_lengths_is_read_into_the_result():
    query, key, value, key_scale, value_scale, *rest = attention_arrays(4, 2, 64, 16)
    outside = jnp.arange(64) >= rest[-1][None, :, None, None]
    spoilt = (jnp.where(outside, jnp.nan, scale) for scale in (key_scale, value_scale))
    run = functools.partial(kv4_attention_tpu, sm_scale=0.2, interpret=INTERPRET)
    clean = run(query, key, value, key_scale, value_scale, *rest, layer=jnp.int32(0))
    np.testing.assert_array_equal(run(query, key, value, *spoilt, *rest, layer=jnp.int32(0)), clean)


def lower_for_tpu(function, *arrays) -> str:
    return export.export(jax.jit(function), platforms=["tpu"])(*arrays).mlir_module()


def shapes(arrays):
    return [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays]


# q/k/v, gate/up, down and Qwen's padded vision width, at one token, a few, and a prefill.
@pytest.mark.parametrize("rows", [1, 8, 640])
@pytest.mark.parametrize(("outputs", "inputs"), [(12288, 4096), (4096, 11008), (1280, 3456)])
def test_the_matmul_lowers(monkeypatch, rows, outputs, inputs):
    monkeypatch.setattr(matmul_api, "has_tpu", lambda: True)
    assert matmul_api.automatic(rows, outputs, inputs) == "pallas_tpu"
    spec = jax.ShapeDtypeStruct
    given = (
        spec((rows, inputs), jnp.int8),
        spec((rows,), jnp.float32),
        spec((32, outputs, inputs // 2), jnp.uint8),
        spec((32, outputs), jnp.float32),
        spec((), jnp.int32),
    )
    matmul = functools.partial(int4_matmul, out_dtype=jnp.bfloat16)
    assert "tpu_custom_call" in lower_for_tpu(matmul, *given)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "capacity", "dim"), [(32, 32, 768, 128), (28, 4, 1472, 128)]
)
def test_decode_attention_lowers(monkeypatch, heads, kv_heads, capacity, dim):
    monkeypatch.setattr(attention_api, "has_tpu", lambda: True)
    given = shapes(attention_arrays(heads, kv_heads, capacity, dim, dtype=jnp.bfloat16))
    attend = functools.partial(kv4_attention, sm_scale=0.1)
    layer = jax.ShapeDtypeStruct((), jnp.int32)
    assert "tpu_custom_call" in lower_for_tpu(attend, *given, layer)


def test_a_process_with_a_tpu_still_computes_on_its_cpu(monkeypatch):
    arrays = matmul_arrays(3, 32, 64)
    expected = int4_matmul(*arrays, 1)
    monkeypatch.setattr(matmul_api, "has_tpu", lambda: True)
    np.testing.assert_array_equal(int4_matmul(*arrays, 1), expected)


def test_without_a_tpu_the_kernel_is_refused_by_name():
    with pytest.raises(ValueError, match="'pallas_tpu' cannot run: it needs a TPU"):
        int4_matmul(*matmul_arrays(2, 8, 16), 0, impl="pallas_tpu")
