"""Public entry of decode attention over a 4-bit key/value cache."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from pallas_kernels import jax_triton_calls
from pallas_kernels.accelerator import find_gpu, has_tpu, on_platform
from pallas_kernels.attention.reference import BLOCK
from pallas_kernels.dispatch import AUTO, resolve
from pallas_kernels.kv4_attention.reference import decode_attention, dequantize

IMPLEMENTATIONS = (
    "pallas_triton_blocks", "pallas_triton", jax_triton_calls.NAME, "pallas_tpu", "xla",
)  # fmt: skip


def kv4_attention(
    query: Float[Array, "B N H"],
    key: UInt8[Array, "L B K S bytes"],
    value: UInt8[Array, "L B K S bytes"],
    key_scale: Float[Array, "L B K S"],
    value_scale: Float[Array, "L B K S"],
    key_zero: UInt8[Array, "L B K S"],
    value_zero: UInt8[Array, "L B K S"],
    lengths: Int[Array, " B"],
    layer: Array | int,
    *,
    sm_scale: float,
    out_dtype: Any = jnp.float32,
    impl: str = AUTO,
) -> Float[Array, "B N H"]:
    """Attention of one query per sample over packed keys and values of one layer of the stack.

    Asymmetric 4-bit per token per head: ``x = scale * (code - zero)``. Rows at or past ``lengths``
    are ignored. Grouped queries: head ``n`` reads key head ``n // (N / K)``. float32 softmax and
    output, which is rounded to ``out_dtype`` at the end.
    """
    head_dim, group = query.shape[-1], query.shape[1] // key.shape[2]
    name = resolve(
        "kv4_attention",
        impl,
        automatic(head_dim, group),
        IMPLEMENTATIONS,
        refusals(head_dim, group),
    )
    arrays = (
        *(query, key, value, key_scale, value_scale, key_zero, value_zero),
        lengths.astype(jnp.int32),
        jnp.asarray(layer, jnp.int32),
    )

    def reference(*arrays):
        return _reference(*arrays, sm_scale=sm_scale).astype(out_dtype)

    if name == "xla":
        return reference(*arrays)
    if name == "pallas_tpu":
        from pallas_kernels.kv4_attention.pallas_tpu import kv4_attention_tpu as run
    elif name == "pallas_triton_blocks":
        from pallas_kernels.kv4_attention.pallas_triton_blocks import kv4_attention_blocks

        run = functools.partial(kv4_attention_blocks, out_dtype=out_dtype)
    elif name == jax_triton_calls.NAME:
        jax_triton_calls.load()
        from pallas_kernels.kv4_attention.jax_triton import kv4_attention_jax_triton

        run = functools.partial(kv4_attention_jax_triton, out_dtype=out_dtype)
    else:
        from pallas_kernels.kv4_attention.pallas_triton import kv4_attention_split as run

    def kernel(*arrays):
        return run(*arrays, sm_scale=sm_scale).astype(out_dtype)

    if impl != AUTO:
        return kernel(*arrays)
    return on_platform("tpu" if name == "pallas_tpu" else "cuda", kernel, reference)(*arrays)


def automatic(head_dim: int, group: int = 1) -> str:
    """A kernel wherever one can run; ``group``: queries per key head.

    ``pallas_triton_blocks`` was the faster one at every size tried but one, where both took 11 us
    (``measured/decode_kernels.md``).
    """
    refused = refusals(head_dim, group)
    order = ("pallas_triton_blocks", "pallas_triton", "pallas_tpu")
    return next((name for name in order if name not in refused), "xla")


def refusals(head_dim: int, group: int = 1) -> dict[str, str]:
    """Why a kernel cannot run here."""
    found = {}
    for name in ("pallas_triton", "pallas_triton_blocks"):
        if find_gpu() is None:
            found[name] = "it needs an NVIDIA GPU"
        elif head_dim % 8:
            found[name] = f"heads of {head_dim}: a multiple of 8 is needed"
    if (reason := jax_triton_calls.refusal()) is not None:
        found[jax_triton_calls.NAME] = reason
    elif group > 64:
        found[jax_triton_calls.NAME] = f"{group} queries per key head: at most 64"
    if group > 16:
        found.setdefault("pallas_triton_blocks", f"{group} queries per key head: at most 16")
    if not has_tpu():
        found["pallas_tpu"] = "it needs a TPU"
    return found


def _reference(
    query, key, value, key_scale, value_scale, key_zero, value_zero, lengths, layer, *, sm_scale
):
    def reader(packed, scale, zero):
        def block(start):
            def cut(array):
                sizes = list(array.shape)
                sizes[0], sizes[3] = 1, BLOCK
                begin = [layer, 0, 0, start, 0][: array.ndim]
                return jax.lax.dynamic_slice(array, begin, sizes)[0]

            return dequantize(cut(packed), cut(scale), cut(zero))

        return block

    return decode_attention(
        query,
        reader(key, key_scale, key_zero),
        reader(value, value_scale, value_zero),
        key.shape[3],
        lengths,
        sm_scale=sm_scale,
    )
