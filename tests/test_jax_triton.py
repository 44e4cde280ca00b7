"""The kernels in Triton's own language: in its interpreter where triton and torch are installed
(it takes torch's arrays), and how they are chosen and refused anywhere. On a GPU:
``test_gpu_kernels.py``."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels.int4_matmul.api as matmul_api
import pallas_kernels.kv4_attention.api as attention_api
from pallas_kernels import jax_triton_calls
from pallas_kernels.accelerator import Gpu
from pallas_kernels.int4_matmul import int4_matmul
from pallas_kernels.kv4_attention import kv4_attention
from pallas_kernels.packing import pack_int4
from quota_jax.quant.quantizers import quantize_kv
from tests.conftest import ROOT

AMPERE, TURING, HOPPER = (
    Gpu(capability=capability, num_sms=108) for capability in ((8, 0), (7, 5), (9, 0))
)
interpreted = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton (extra 'cuda')"
)


def machine(monkeypatch, gpu, *, installed=True) -> None:
    for module in (matmul_api, attention_api, jax_triton_calls):
        monkeypatch.setattr(module, "find_gpu", lambda: gpu)
    found = importlib.util.find_spec

    def find(name):
        return found("jax") if installed and name == "jax_triton" else found(name)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    if not installed:
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name: None if name == "jax_triton" else found(name)
        )


@pytest.mark.parametrize(
    ("gpu", "installed", "words"),
    [
        (None, True, "an NVIDIA GPU"),
        (TURING, True, "the GPU has 7.5"),
        (HOPPER, False, "quota-jax\\[cuda\\]"),
    ],
)
def test_what_is_missing_is_told(monkeypatch, gpu, installed, words):
    machine(monkeypatch, gpu, installed=installed)
    x, scale = jnp.ones((1, 128), jnp.int8), jnp.ones(128)
    packed = jnp.zeros((128, 64), jnp.uint8)
    with pytest.raises(ValueError, match=words):
        int4_matmul(x, scale[:1], packed, scale, impl="triton")
    with pytest.raises(ValueError, match=words):
        kv4_attention(*attention_example(1, 2, 2, 64), sm_scale=1.0, impl="triton")


def test_it_is_taken_where_there_is_no_hopper_and_it_can_be_imported(monkeypatch):
    machine(monkeypatch, HOPPER)
    assert matmul_api.automatic(64, 4096, 4096) == "mosaic_gpu"
    assert matmul_api.automatic(64, 1000, 4096) == "xla"
    machine(monkeypatch, AMPERE)
    monkeypatch.setattr(jax_triton_calls, "broken", lambda: "versions")
    assert matmul_api.automatic(64, 4096, 4096) == "xla"
    monkeypatch.setattr(jax_triton_calls, "broken", lambda: None)
    assert matmul_api.automatic(1, 4096, 4096) == "pallas_triton"
    assert matmul_api.automatic(64, 4096, 4096) == "triton"
    assert matmul_api.automatic(64, 4096, 4092) == "xla"
    machine(monkeypatch, AMPERE, installed=False)
    assert matmul_api.automatic(64, 4096, 4096) == "xla"


def test_versions_that_do_not_go_together_are_told(monkeypatch):
    class Finder:
        def find_spec(self, name, *_):
            if name == "jax_triton":
                raise AttributeError("'_Stub' object has no attribute 'backend'")

    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    monkeypatch.delitem(sys.modules, "jax_triton", raising=False)
    jax_triton_calls.load.cache_clear()
    with pytest.raises(ValueError, match=r"cannot be imported beside jax .*_Stub"):
        jax_triton_calls.load()


@pytest.fixture
def interpret(monkeypatch):
    """Kernels run in Triton's interpreter, on torch's arrays."""
    torch = pytest.importorskip("torch", exc_type=ImportError)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    # Kernels belong to the interpreter or not from the moment that they are defined.
    for name in [name for name in sys.modules if name.endswith(".jax_triton")]:
        monkeypatch.delitem(sys.modules, name)

    def tensor(array):
        if array.dtype == jnp.bfloat16:
            return torch.tensor(np.asarray(array, np.float32)).to(torch.bfloat16)
        return torch.tensor(np.asarray(array))

    def call(kernel, *arrays, out, grid, warps, stages, **sizes):
        shapes = jax.tree.leaves(out)
        made = [torch.zeros(each.shape, dtype=getattr(torch, each.dtype.name)) for each in shapes]
        kernel[grid](*map(tensor, arrays), *made, **sizes)
        results = [jnp.asarray(each.float().numpy(), dtype) for each, dtype in
                   zip(made, (s.dtype for s in shapes), strict=True)]  # fmt: skip
        return jax.tree.unflatten(jax.tree.structure(out), results)

    def module(name):
        loaded = importlib.import_module(name)
        monkeypatch.setattr(loaded, "call", call)
        return loaded

    return module


@interpreted
@pytest.mark.parametrize(
    ("rows", "outputs", "inputs"), [(3, 70, 136), (33, 40, 520), (130, 160, 72)]
)
def test_the_matmul_is_exact(interpret, rows, outputs, inputs):
    module = interpret("pallas_kernels.int4_matmul.jax_triton")
    rng = np.random.default_rng(rows)
    codes = rng.integers(-8, 8, (2, outputs, inputs)).astype(np.int8)
    x = jnp.asarray(rng.integers(-128, 128, (rows, inputs)).astype(np.int8))
    x_scale = jnp.asarray(rng.random(256, np.float32) + 0.1)
    scale = jnp.asarray(rng.random((2, outputs), np.float32) + 0.1)
    packed = pack_int4(jnp.asarray(codes))
    found = module.int4_matmul_jax_triton(
        x, x_scale, packed, scale, jnp.int32(1), out_dtype=jnp.float32
    )
    expected = int4_matmul(x, x_scale, packed, scale, 1, impl="xla")
    np.testing.assert_array_equal(found, expected)


def attention_example(
    batch: int, heads: int, kv_heads: int, dim: int, capacity: int = 192
) -> tuple[Any, ...]:
    rng = np.random.default_rng(dim)
    stored = []
    for _ in range(2):
        values = rng.standard_normal((2, batch, kv_heads, capacity, dim), np.float32) * 2 + 0.3
        codes, scale, zero = quantize_kv(jnp.asarray(values), 4)
        stored.append((pack_int4(codes), scale, zero))
    (k, k_scale, k_zero), (v, v_scale, v_zero) = stored
    q = jnp.asarray(rng.standard_normal((batch, heads, dim), np.float32))
    lengths = jnp.asarray(rng.integers(1, capacity + 1, batch), jnp.int32).at[0].set(capacity)
    return q, k, v, k_scale, v_scale, k_zero, v_zero, lengths, 1


@interpreted
@pytest.mark.parametrize(
    ("batch", "heads", "capacity"),
    [(2, (4, 4, 32), 192), (1, (7, 1, 128), 320), (3, (6, 2, 40), 64)],
)
def test_attention_equals_the_reference(
    monkeypatch, interpret, batch: int, heads: tuple[int, int, int], capacity: int
):
    module = interpret("pallas_kernels.kv4_attention.jax_triton")
    import triton.language as tl

    monkeypatch.setattr(module, "PART", tl.constexpr(tl.float16))
    dim = heads[2]
    arrays = attention_example(batch, *heads, capacity)
    *given, layer = arrays
    found = module.kv4_attention_jax_triton(*given, jnp.int32(layer), sm_scale=dim**-0.5)
    expected = kv4_attention(*arrays, sm_scale=dim**-0.5, impl="xla")
    np.testing.assert_allclose(found, expected, atol=2e-4)


COMPILE = """
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pallas_kernels.int4_matmul import jax_triton as matmul
from pallas_kernels.kv4_attention import jax_triton as attention


def compile(kernel, pointers, constants, capability, **options):
    names = kernel.arg_names
    signature = dict.fromkeys(names, "constexpr")
    signature |= dict(zip(names, ("*" + kind for kind in pointers.split()), strict=False))
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return made.asm["ptx"]


for capability in (80, 89, 90):
    sizes = {"outputs": 4096, "words": 1376, "height": 4, "width": 512, "asm": matmul.DOT}
    ptx = compile(matmul._one_token, "i32 i32 fp32 fp32 i32 bf16", sizes, capability)
    assert "dp4a" in ptx
    for rows in (8, 640):
        tiles = matmul.Tiles.of(rows)
        sizes = {
            "rows": rows, "outputs": 4096, "half": 5504,
            "tokens": tiles.tokens, "height": tiles.outputs, "width": tiles.bytes,
        }
        given = {"num_warps": tiles.warps, "num_stages": tiles.stages}
        ptx = compile(matmul._tile, "u8 i8 i8 fp32 fp32 i32 bf16", sizes, capability, **given)
        assert "mma" in ptx
    shared = {"heads": 28, "splits": 6, "half": 64, "width": 64}
    sizes = {
        "kv_heads": 4, "capacity": 768, "group": 7, "rows": 16, "tokens": 64, "steps": 2, **shared
    }
    kinds = "fp32 u8 u8 bf16 bf16 u8 u8 i32 i32 fp32 fp32 fp32"
    assert "mma" in compile(attention._part, kinds, sizes, capability)
    compile(attention._join, "fp32 fp32 fp32 bf16", {"padded": 8, **shared}, capability)
print("compiled")
"""


@interpreted
def test_kernels_compile_for_ampere_ada_and_hopper():
    run = subprocess.run(
        [sys.executable, "-c", COMPILE], capture_output=True, text=True, cwd=ROOT, timeout=600
    )
    assert run.stdout.strip() == "compiled", run.stderr[-3000:]
