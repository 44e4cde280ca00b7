"""Column sums of attention against a dense float64 softmax, and their independence of padding; the
GPU kernel in the interpreter against them."""

from __future__ import annotations

import functools
import os
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pallas_kernels.attention_mass.api as api
from pallas_kernels.accelerator import Gpu
from pallas_kernels.attention_mass import BLOCK, attention_mass


def draw(batch, length, heads, kv_heads, dim, seed=0):
    """Queries and keys whose attention is far from uniform."""
    rng = np.random.default_rng(seed)
    query = 3 * rng.standard_normal((batch, length, heads, dim)).astype(np.float32)
    key = rng.standard_normal((batch, length, kv_heads, dim)).astype(np.float32)
    return query, key


def dense(query, key, is_visual):
    """inter and intra of one sample without padding: plain loops over float64 softmax rows."""
    length, heads, dim = query.shape
    inter, intra = np.zeros(length), np.zeros(length)
    for head in range(heads):
        keys = key[:, head // (heads // key.shape[1])].astype(np.float64)
        for row in range(length):
            scores = keys[: row + 1] @ query[row, head].astype(np.float64) * dim**-0.5
            weights = np.exp(scores - scores.max())
            weights /= weights.sum()
            if is_visual[row]:
                intra[: row + 1] += weights / heads
            else:
                inter[:row] += weights[:row] / heads
    return inter, intra


def visual_runs(length, *runs):
    mask = np.zeros(length, bool)
    for start, stop in runs:
        mask[start:stop] = True
    return mask


mass = jax.jit(attention_mass, static_argnames=("sm_scale", "impl"))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"), [(4, 4, 16), (6, 2, 40), (7, 1, 80), (1, 1, 16)]
)
def test_mass_equals_a_dense_float64_softmax(heads, kv_heads, dim):
    length = 2 * BLOCK + 9
    lengths = np.array([length, 77, 1, 30])
    query, key = draw(4, length, heads, kv_heads, dim)
    is_visual = np.stack(
        [
            visual_runs(length, (5, 60), (70, 90)),  # two pictures, text between and after
            visual_runs(length, (2, 40)),
            visual_runs(length),  # one text token
            visual_runs(length, (3, 30)),  # nothing after the picture
        ]
    )
    inter, intra = mass(*map(jnp.asarray, (query, key, lengths, is_visual)), sm_scale=dim**-0.5)
    assert inter.dtype == intra.dtype == jnp.float32
    for b, n in enumerate(lengths):
        expected = dense(query[b, :n], key[b, :n], is_visual[b, :n])
        np.testing.assert_allclose(inter[b, :n], expected[0], atol=1e-5, rtol=1e-5)
        np.testing.assert_allclose(intra[b, :n], expected[1], atol=1e-5, rtol=1e-5)
        assert not np.asarray(inter[b, n:]).any()
        assert not np.asarray(intra[b, n:]).any()
    assert not np.asarray(inter[3, 3:]).any()  # no text after the picture
    assert not np.asarray(intra[2]).any()  # no picture
    # Every visual query gives away 1.
    real = is_visual & (np.arange(length) < lengths[:, None])
    np.testing.assert_allclose(intra.sum(1), real.sum(1), rtol=1e-5)


def test_a_token_alone_and_no_token_at_all():
    query, key = draw(2, 3, 2, 2, 16)
    visual = jnp.asarray([[True, False, False], [True, True, True]])
    inter, intra = mass(
        jnp.asarray(query), jnp.asarray(key), jnp.asarray([1, 0]), visual, sm_scale=1.0
    )
    np.testing.assert_array_equal(inter, np.zeros((2, 3)))
    np.testing.assert_array_equal(intra, [[1, 0, 0], [0, 0, 0]])


def test_padding_may_hold_anything():
    query, key = draw(1, 40, 4, 2, 16)
    visual = visual_runs(40, (3, 40))[None]
    clean = mass(*map(jnp.asarray, (query, key, np.array([25]), visual)), sm_scale=0.25)
    query[:, 25:], key[:, 25:] = np.nan, np.inf
    dirty = mass(*map(jnp.asarray, (query, key, np.array([25]), visual)), sm_scale=0.25)
    for a, b in zip(clean, dirty, strict=True):
        np.testing.assert_array_equal(a, b)


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from([(4, 2, 16), (1, 1, 16), (3, 1, 40), (2, 2, 80)]),
    st.sampled_from([1, 64, 150]),
    st.sampled_from([0, 1, 64, 130]),
    st.integers(0, 2),
    st.integers(0, 99),
)
def test_neither_padding_nor_neighbours_change_a_bit(shape, length, padding, neighbours, seed):
    heads, kv_heads, dim = shape
    rng = np.random.default_rng(seed)
    query, key = draw(1 + neighbours, length + padding, heads, kv_heads, dim, seed)
    is_visual = rng.random((1 + neighbours, length + padding)) < 0.6
    lengths = rng.integers(1, length + padding + 1, 1 + neighbours)
    lengths[0] = length
    alone = mass(
        *(jnp.asarray(array[:1, :length]) for array in (query, key)),
        jnp.asarray(lengths[:1]),
        jnp.asarray(is_visual[:1, :length]),
        sm_scale=dim**-0.5,
    )
    beside = mass(*map(jnp.asarray, (query, key, lengths, is_visual)), sm_scale=dim**-0.5)
    for one, many in zip(alone, beside, strict=True):
        np.testing.assert_array_equal(one[0], many[0, :length])


def test_no_array_of_the_program_has_two_long_axes():
    length = 20 * BLOCK
    shapes = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (
            ((1, length, 2, 16), jnp.bfloat16),
            ((1, length, 1, 16), jnp.bfloat16),
            ((1,), jnp.int32),
            ((1, length), jnp.bool_),
        )
    ]
    made = jax.make_jaxpr(functools.partial(attention_mass, sm_scale=0.25))(*shapes)

    def largest(jaxpr):
        sizes = [out.aval.size for equation in jaxpr.eqns for out in equation.outvars]
        for equation in jaxpr.eqns:
            for value in equation.params.values():
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    sizes.append(largest(inner))
        return max(sizes)

    assert largest(made.jaxpr) <= 2 * 2 * BLOCK * length < 2 * length * length


def test_an_unknown_implementation_fails_loudly():
    query, key = (jnp.asarray(array) for array in draw(1, 4, 2, 2, 16))
    with pytest.raises(ValueError, match="no implementation 'mosaic'"):
        attention_mass(
            query, key, jnp.asarray([4]), jnp.ones((1, 4), bool), sm_scale=1.0, impl="mosaic"
        )


# The kernel in the interpreter, on fresh numbers. It multiplies the same 16-bit values as the
# reference, and products of those are exact in float32: what differs are orders of float32 sums and
# a base-2 exponent. Scores up to 20 are thereby off by some 1e-6, and a weight by that share.
SEED = int.from_bytes(os.urandom(6), "little")
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
newer_jax = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="the kernels are for jax 0.11 (Python 3.12)"
)
triton = pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")


@pytest.fixture
def rng(request) -> np.random.Generator:
    """The seed is printed when a test fails."""
    print("seed", SEED)
    return np.random.default_rng([SEED, zlib.crc32(request.node.name.encode())])


def fresh(rng, batch, length, heads, kv_heads, dim, dtype=jnp.bfloat16):
    """Queries and keys whose attention is far from uniform."""
    query = 3 * rng.standard_normal((batch, length, heads, dim), np.float32)
    key = rng.standard_normal((batch, length, kv_heads, dim), np.float32)
    return jnp.asarray(query, dtype), jnp.asarray(key, dtype)


@functools.cache
def interpreted(dim: int, rows: int = 64, columns: int = 64):
    from pallas_kernels.attention_mass.pallas_triton import Plan, column_mass_triton

    plan = Plan(rows=rows, columns=columns)
    return jax.jit(
        functools.partial(column_mass_triton, sm_scale=dim**-0.5, plan=plan, interpret=True)
    )


@newer_jax
@triton
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "dtype", "tile"),
    [
        (4, 4, 128, "bfloat16", (64, 64)),
        (6, 2, 40, "bfloat16", (64, 64)),
        (7, 1, 80, "bfloat16", (16, 64)),
        (2, 1, 8, "float16", (64, 16)),
    ],
)
def test_the_kernel_in_the_interpreter_equals_the_reference(rng, heads, kv_heads, dim, dtype, tile):
    length = 137
    lengths = np.array([length, 77, 30, 1, 0])
    query, key = fresh(rng, 5, length, heads, kv_heads, dim, dtype)
    is_visual = np.stack(
        [
            visual_runs(length, (5, 60), (70, 137)),  # no text after the last picture
            visual_runs(length),  # no picture
            visual_runs(length, (2, 20)),
            visual_runs(length, (0, 1)),
            visual_runs(length, (0, 137)),
        ]
    )
    arrays = query, key, jnp.asarray(lengths), jnp.asarray(is_visual)
    expected = mass(*arrays, sm_scale=dim**-0.5, impl="xla")
    beyond = jnp.arange(length)[None, :, None, None] >= lengths[:, None, None, None]
    dirty = jnp.where(beyond, jnp.nan, query), jnp.where(beyond, jnp.inf, key)
    found = interpreted(dim, *tile)(*dirty, *arrays[2:])
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == jnp.float32
        np.testing.assert_allclose(one, other, **CLOSE)
        assert not np.asarray(one)[np.arange(length) >= lengths[:, None]].any()
    inter, intra = map(np.asarray, found)
    assert not inter[0, 69:].any()
    assert not intra[1].any()
    np.testing.assert_allclose(intra[3, 0], 1, rtol=1e-6)


@newer_jax
@triton
def test_the_kernels_sums_by_kind_add_up_to_what_all_queries_give(rng):
    """Every query gives away 1. A column's ``inter + intra`` lacks its own share where it is text
    (text counts from the next query on), so it is the sum over all queries taken for visual at a
    visual token, and over all taken for text at a text token."""
    length, lengths, dim = 70, np.array([70, 41]), 16
    query, key = fresh(rng, 2, length, 4, 2, dim)
    is_visual = rng.random((2, length)) < 0.6
    real = np.arange(length) < lengths[:, None]
    run = functools.partial(interpreted(dim, 16, 32), query, key, jnp.asarray(lengths))
    nothing, received = map(np.asarray, run(jnp.ones((2, length), bool)))
    assert not nothing.any()
    np.testing.assert_allclose(received.sum(1), lengths, rtol=1e-5)
    from_others, nothing = map(np.asarray, run(jnp.zeros((2, length), bool)))
    assert not nothing.any()
    inter, intra = map(np.asarray, run(jnp.asarray(is_visual)))
    np.testing.assert_allclose(intra.sum(1), (is_visual & real).sum(1), rtol=1e-5)
    whole = np.where(is_visual, received, from_others)
    np.testing.assert_allclose(inter + intra, whole, **CLOSE)


@newer_jax
@triton
def test_neither_padding_nor_a_neighbour_changes_a_bit_of_the_kernel(rng):
    length, dim = 45, 40
    query, key = fresh(rng, 2, 100, 2, 1, dim)
    is_visual = jnp.asarray(rng.random((2, 100)) < 0.6)
    run = interpreted(dim, 16, 32)
    beside = run(query, key, jnp.asarray([length, 100]), is_visual)
    alone = run(query[:1, :length], key[:1, :length], jnp.asarray([length]), is_visual[:1, :length])
    for one, many in zip(alone, beside, strict=True):
        np.testing.assert_array_equal(one[0], many[0, :length])


@newer_jax
@triton
def test_a_pruned_model_can_be_trained_where_the_kernel_runs(rng, monkeypatch):
    """Pallas itself cannot differentiate the kernel; here the program runs on the CPU."""
    monkeypatch.setattr(api, "find_gpu", lambda: Gpu(capability=(9, 0), num_sms=132))
    query, key = fresh(rng, 1, 20, 2, 1, 16)
    rest = jnp.asarray([17]), jnp.asarray(rng.random((1, 20)) < 0.6)

    def received(query, key, impl):
        inter, intra = attention_mass(query, key, *rest, sm_scale=0.25, impl=impl)
        return (inter**2 + intra).sum()

    found, expected = (
        jax.jit(jax.grad(functools.partial(received, impl=impl), (0, 1)))(query, key)
        for impl in ("auto", "xla")
    )
    for one, other in zip(found, expected, strict=True):
        assert np.asarray(one, np.float32).any()
        np.testing.assert_array_equal(np.asarray(one, np.float32), np.asarray(other, np.float32))

    def kept(query, key):
        order = jnp.argsort(attention_mass(query, key, *rest, sm_scale=0.25)[1], axis=-1)
        chosen = jnp.take_along_axis(query, order[..., :5, None, None], 1)
        return chosen.astype(jnp.float32).sum()

    gradient = np.asarray(jax.jit(jax.grad(kept))(query, key), np.float32)
    assert gradient.sum() == 5 * 2 * 16
