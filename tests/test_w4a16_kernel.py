"""The weight-only matmul: the reference as it always was, the kernel in the interpreter, lowered
for a GPU that is not there, in a whole model, and what is refused."""

from __future__ import annotations

import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels.w4a16_matmul.api as api
import quota_jax as qj
from pallas_kernels.packing import as_words, pack_int4, unpack_int4, unpack_uint4
from pallas_kernels.stable import matmul
from pallas_kernels.w4a16_matmul import w4a16_matmul
from pallas_kernels.w4a16_matmul.pallas_triton import Plan, w4a16_matmul_triton
from quota_jax.bench import example_batch
from quota_jax.nn.linear import Linear
from quota_jax.quant.groups import Groups
from quota_jax.quantization import QuantizationConfig
from tests.decode_samples import random_groups, random_model, steps, tiny_config
from tests.test_transform_quantize import HOPPER, lower, newer_jax, triton

SEED = int.from_bytes(os.urandom(6), "little")


@pytest.fixture
def rng() -> np.random.Generator:
    """Fresh numbers every run; the seed is printed when a test fails."""
    print("seed", SEED)
    return np.random.default_rng(SEED)


def example(rng, rows, outputs, inputs, size, *, symmetric, dtype, scale_dtype=None) -> Any:
    """Arguments of the matmul with a stack of two layers; ``size`` None: a scale for each row."""

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape, np.float32), dtype)

    shape = (2, outputs)
    if size is not None:
        shape = (*shape, -(-inputs // size) if size else 1)
    scale = jnp.asarray(0.05 * rng.random(shape, np.float32) + 0.005)
    return {
        "x": draw(rows, inputs),
        "packed": jnp.asarray(rng.integers(0, 256, (2, outputs, inputs // 2)), jnp.uint8),
        "scale": scale.astype(scale_dtype or dtype if size is not None else jnp.float32),
        # Zeros of the first GPTQ format reach 16.
        "zeros": None if symmetric else jnp.asarray(rng.integers(0, 17, shape), jnp.uint8),
        "group_size": size or 0,
        "bias": draw(2, outputs),
    }


def former(x, packed, scale, zeros, group_size, bias, layer) -> jax.Array:
    """What a linear computed before there was such an operation."""
    codes = unpack_int4(packed[layer]) if zeros is None else unpack_uint4(packed[layer])
    if scale.ndim == 2:
        out = matmul(x.astype(jnp.float32), codes.astype(jnp.float32)) * scale[layer]
    else:
        inputs = x.shape[1]
        scale, *shift = (
            jnp.repeat(a[layer], group_size or inputs, axis=1)[:, :inputs].astype(jnp.float32)
            for a in (scale, zeros)
            if a is not None
        )
        values = codes.astype(jnp.float32) - (shift[0] if shift else 0)
        weight = jax.lax.reduce_precision(values * scale, 8, 23)
        out = matmul(x, weight.astype(x.dtype))
    return jax.lax.reduce_precision(out, 8, 23) + bias[layer].astype(jnp.float32)


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("size", "symmetric"), [(32, True), (20, False), (0, False), (None, True)])
def test_xla_computes_what_a_linear_did(rng, rows, dtype, size, symmetric):
    """Bit for bit, alone and through ``Linear``."""
    case = example(rng, rows, 37, 200, size, symmetric=symmetric, dtype=jnp.dtype(dtype))
    run = jax.jit(functools.partial(w4a16_matmul, group_size=size or 0, impl="xla"))
    arrays = {name: value for name, value in case.items() if name != "group_size"}
    found = run(**arrays, layer=jnp.int32(1))
    expected = jax.jit(functools.partial(former, group_size=size or 0, layer=1))(**arrays)
    np.testing.assert_array_equal(found, expected)
    # Without a stack.
    single = {n: v if n == "x" or v is None else v[1] for n, v in arrays.items()}
    np.testing.assert_array_equal(run(**single), expected)
    x = arrays.pop("x")
    module = Linear(
        {name: value for name, value in arrays.items() if value is not None},
        weight_bits=4,
        groups=None if size is None else Groups(bits=4, size=size, symmetric=symmetric),
    )
    through = jax.jit(lambda module, x: module(x, 1))(module, x)
    np.testing.assert_array_equal(through, expected.astype(x.dtype))


@newer_jax
@triton
@pytest.mark.parametrize(
    ("dtype", "scale_dtype", "size", "symmetric"),
    [
        ("bfloat16", "bfloat16", 32, True),
        ("bfloat16", "float16", 16, False),
        ("bfloat16", "float32", 64, False),
        ("float16", "float16", 32, False),
        ("float32", "float32", 0, True),
        ("float32", "bfloat16", 128, False),
        ("bfloat16", None, None, True),
    ],
)
@pytest.mark.parametrize("tensor_cores", [False, True])
def test_the_kernel_multiplies_the_dequantized_weights(
    rng, dtype, scale_dtype, size, symmetric, tensor_cores
):
    """Every weight bit for bit, by tokens of which each is 1 in one place."""
    rows, inputs, outputs = 16 if tensor_cores else 4, 160, 35
    case = example(
        rng, rows, outputs, inputs, size, symmetric=symmetric, dtype=jnp.dtype(dtype),
        scale_dtype=scale_dtype,
    )  # fmt: skip
    # The last 12 of 32 words and 13 of 48 rows are not there.
    plan = Plan(height=16, width=16, warps=4, stages=1, splits=2, tensor_cores=tensor_cores)
    run = jax.jit(
        functools.partial(w4a16_matmul_triton, group_size=size or 0, plan=plan, interpret=True)
    )
    scale = None if size is None else case["scale"]
    weight = []
    for start in range(0, inputs, rows):
        x = jnp.eye(rows, inputs, start, dtype)
        weight.append(np.asarray(run(x, case["packed"], scale, case["zeros"], jnp.int32(1))).T)
    codes = (unpack_int4 if symmetric else unpack_uint4)(case["packed"][1])
    expected = codes.astype(jnp.float32)
    if size is not None:
        grid = Groups(bits=4, size=size, symmetric=symmetric)
        zeros = None if case["zeros"] is None else case["zeros"][1]
        expected = grid.dequantize(codes, case["scale"][1], zeros)
    expected = np.asarray(expected.astype(dtype), np.float32)
    np.testing.assert_array_equal(np.concatenate(weight, axis=1), expected)


@newer_jax
@triton
@pytest.mark.parametrize("rows", [1, 3, 8, 16])
@pytest.mark.parametrize(
    ("outputs", "inputs", "size", "symmetric", "dtype"),
    [
        (67, 384, 128, False, "bfloat16"),
        (33, 264, 32, True, "bfloat16"),  # the last group is shorter
        (50, 320, 64, False, "float32"),
        (41, 200, None, True, "bfloat16"),
        (16, 64, 0, False, "float16"),
    ],
)
def test_the_kernel_in_the_interpreter_equals_the_reference(
    monkeypatch, rng, rows, outputs, inputs, size, symmetric, dtype
):
    """Both multiply the same numbers (the test above), so only sums of ``inputs`` products differ:
    by some sqrt(inputs) roundings of 2^-24 of what is summed. Unrounded weights would differ by
    2^-9 / sqrt(inputs), some 100 times as much."""
    from pallas_kernels.w4a16_matmul import pallas_triton

    case = example(rng, rows, outputs, inputs, size, symmetric=symmetric, dtype=jnp.dtype(dtype))
    expected = w4a16_matmul(**case, layer=1, impl="xla")
    monkeypatch.setattr(api, "find_gpu", lambda: HOPPER)
    kernel = functools.partial(w4a16_matmul_triton, interpret=True)
    monkeypatch.setattr(pallas_triton, "w4a16_matmul_triton", kernel)
    found = w4a16_matmul(**case, layer=1, impl="pallas_triton")
    # No |code - zero| is above 16.
    summed = np.abs(np.asarray(case["x"], np.float32)).sum(1)[:, None]
    scale = np.asarray(case["scale"][1], np.float32).reshape(outputs, -1).max(1)
    bound = 16 * summed * scale[None] * inputs**0.5 * 2**-24 + 2**-22
    assert (np.abs(np.asarray(found) - np.asarray(expected)) <= bound).all()


def test_words_hold_their_nibbles_in_order():
    codes = np.random.default_rng(0).integers(0, 16, (3, 32))
    words = np.asarray(as_words(pack_int4(jnp.asarray(codes))))
    nibbles = (words[..., None] >> (4 * np.arange(8))) & 15
    np.testing.assert_array_equal(nibbles.reshape(3, 32), codes)


@newer_jax
@pytest.mark.parametrize("rows", [1, 3, 8, 16])
@pytest.mark.parametrize(
    ("outputs", "inputs", "size", "symmetric", "dtypes"),
    [
        (4096, 11008, 128, False, ("bfloat16", "float16")),
        (11008, 4096, 128, True, ("bfloat16", "bfloat16")),
        (100, 3416, 32, False, ("float16", "float16")),
        (100, 64, 64, False, ("float32", "float32")),
        (100, 3416, None, True, ("bfloat16", None)),
    ],
)
def test_the_kernel_lowers(rows, outputs, inputs, size, symmetric, dtypes):
    spec = jax.ShapeDtypeStruct
    groups = (3, outputs, -(-inputs // (size or 1)))
    shapes = (
        spec((rows, inputs), jnp.dtype(dtypes[0])),
        spec((3, outputs, inputs // 2), jnp.uint8),
        spec(groups, jnp.dtype(dtypes[1])) if size else None,
        None if symmetric else spec(groups, jnp.uint8),
        spec((), jnp.int32),
    )
    text = lower(functools.partial(w4a16_matmul_triton, group_size=size or 0), *shapes)
    assert "triton" in text


@pytest.mark.parametrize(
    ("outputs", "inputs", "splits"),
    [(22016, 4096, 1), (11008, 4096, 3), (4096, 11008, 8), (4096, 4096, 4), (100, 64, 1)],
)
def test_the_inputs_are_split_where_output_rows_are_few(outputs, inputs, splits):
    plan = Plan.of(outputs, inputs // 8, jnp.bfloat16)
    assert plan.splits == splits
    assert plan.tensor_cores
    assert not Plan.of(outputs, inputs // 8, jnp.float32).tensor_cores
    # No part of the inputs is empty.
    whole = -(-inputs // 8 // plan.width)
    assert (splits - 1) * -(-whole // splits) < whole


@pytest.fixture
def kernels_used(monkeypatch) -> list[int]:
    """Makes "auto" take the interpreted kernel; the numbers of tokens that it was traced with."""
    from pallas_kernels.w4a16_matmul import pallas_triton

    used = []

    def run(x, *arrays, **options):
        used.append(x.shape[0])
        return w4a16_matmul_triton(x, *arrays, **options, interpret=True)

    monkeypatch.setattr(pallas_triton, "w4a16_matmul_triton", run)
    monkeypatch.setattr(api, "find_gpu", lambda: HOPPER)
    monkeypatch.setattr(api, "on_platform", lambda platform, kernel, elsewhere: kernel)
    return used


@newer_jax
@triton
def test_a_whole_model_generates_the_same_tokens(request):
    config = tiny_config("qwen")
    quantization = QuantizationConfig.parse("W4A16G16", symmetric=False)
    model = random_model(config, quantization, jnp.float32)
    batch = example_batch(config, 2, 16)

    def tokens():
        jax.clear_caches()
        found = qj.generate(model, batch, recipe=None, max_new_tokens=8).tokens
        jax.clear_caches()
        return np.asarray(found)

    expected = tokens()
    used = request.getfixturevalue("kernels_used")
    np.testing.assert_array_equal(tokens(), expected)
    assert len(np.unique(expected)) > 2
    # The prompt is dequantized; each of a layer's four linears is traced once for all layers.
    assert used == [2] * 4


@newer_jax
@triton
@pytest.mark.parametrize("label", ["W4A16KV4G16", "W4A16KV4"])
def test_a_step_of_many_samples_is_near_that_of_the_reference(request, monkeypatch, label):
    """bfloat16 on tensor cores: sums that fall on the other side of a boundary move a state by up
    to 2^-8 of its size."""
    config = tiny_config("llava")
    model = random_model(config, QuantizationConfig.parse(label), jnp.bfloat16)
    groups = random_groups(config, [[20, 7, 33, 11, 40, 5]], [4])
    expected, _ = steps(model, groups, 1, monkeypatch, fused=False)
    used = request.getfixturevalue("kernels_used")
    with monkeypatch.context() as inner:
        found, _ = steps(model, groups, 1, inner, fused=False)
    assert used == [6] * 4
    off = np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert off.max() <= 0.02


@pytest.mark.parametrize(
    ("rows", "inputs", "options", "words"),
    [
        (17, 256, {}, "17 tokens: at most 16"),
        (1, 100, {}, "100 inputs: must be a multiple of 8"),
        (1, 256, {"group_size": 20}, "groups of 20: must be a power of two from 8 on"),
        (1, 256, {"group_size": 24}, "groups of 24: must be a power of two from 8 on"),
        (1, 256, {"group_size": 4}, "groups of 4: must be a power of two from 8 on"),
        (1, 256, {"indexed": True}, "activation order"),
        (1, 256, {"dtype": "float8_e4m3fn"}, "inputs are float8_e4m3fn"),
    ],
)
def test_what_the_kernel_cannot_do_is_left_to_xla(monkeypatch, rows, inputs, options, words):
    assert api.refusals(1, 256) == {"pallas_triton": "it needs an NVIDIA GPU"}
    monkeypatch.setattr(api, "find_gpu", lambda: HOPPER)
    assert api.automatic(1, 256) == "pallas_triton"
    assert words in api.refusals(rows, inputs, **options)["pallas_triton"]
    assert api.automatic(rows, inputs, **options) == "xla"
    # A single group may have any size.
    assert api.refusals(1, 24, group_size=100) == {}


def test_a_kernel_that_is_named_but_cannot_run_fails_loudly(monkeypatch, rng):
    case = example(rng, 2, 8, 96, 32, symmetric=False, dtype=jnp.float32)
    run = functools.partial(w4a16_matmul, **case, layer=0)
    monkeypatch.setattr(api, "find_gpu", lambda: None)
    with pytest.raises(ValueError, match="'pallas_triton' cannot run: it needs an NVIDIA GPU"):
        run(impl="pallas_triton")
    with pytest.raises(ValueError, match="no implementation 'mosaic_gpu'"):
        run(impl="mosaic_gpu")
    monkeypatch.setattr(api, "find_gpu", lambda: HOPPER)
    monkeypatch.setattr(api, "on_platform", lambda *arguments: pytest.fail("a kernel was taken"))
    monkeypatch.setenv("QUOTA_JAX_XLA", "w4a16_matmul")
    np.testing.assert_array_equal(run(), run(impl="xla"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layer": None}, r"packed \(2, 8, 48\) with layer None"),
        ({"x": jnp.zeros((2, 80))}, "80 inputs"),
        ({"group_size": 64}, r"scale \(2, 8, 3\), not \(2, 8\) or \(2, 8, 2\)"),
        ({"zeros": jnp.zeros((2, 8, 1), jnp.uint8)}, r"zeros \(2, 8, 1\), scale \(2, 8, 3\)"),
        ({"scale": jnp.zeros((2, 8))}, r"zeros \(2, 8, 3\), scale \(2, 8\)"),
        (
            {"scale": jnp.zeros((2, 8)), "zeros": None, "group_index": jnp.zeros((2, 1, 96))},
            "one scale for each output channel",
        ),
    ],
)
def test_shapes_that_do_not_belong_together_are_refused(rng, changes, words):
    case = example(rng, 2, 8, 96, 32, symmetric=False, dtype=jnp.float32)
    with pytest.raises(ValueError, match=words):
        w4a16_matmul(**(case | {"layer": 1} | changes))
