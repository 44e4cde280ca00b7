"""Public entry of attention over whole sequences."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.accelerator import find_gpu, on_platform
from pallas_kernels.attention.reference import causal_attention
from pallas_kernels.dispatch import AUTO, resolve
from pallas_kernels.stable import as_stored

IMPLEMENTATIONS = ("cudnn", "xla")
CUDNN_DTYPES = ("bfloat16", "float16")


def sequence_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    lengths: Int[Array, " B"],
    *,
    sm_scale: float,
    causal: bool = True,
    impl: str = AUTO,
) -> Float[Array, "B T N H"]:
    """``softmax(q k^T * sm_scale) v`` over the first ``lengths`` tokens; rows beyond are undefined.

    Grouped queries: head ``n`` reads key head ``n // (N / K)``. The library kernel (cuDNN) works in
    the dtype of ``query`` with float32 softmax, the reference in float32 throughout.
    """
    dtype, head_dim = query.dtype, query.shape[-1]
    name = resolve(
        "sequence_attention",
        impl,
        automatic(dtype, head_dim),
        IMPLEMENTATIONS,
        refusals(dtype, head_dim),
    )

    def reference(q, k, v, lengths):
        out, _ = causal_attention(q, k, v, lengths, sm_scale=sm_scale, causal=causal)
        return as_stored(out, dtype).astype(dtype)

    def library(q, k, v, lengths):
        return jax.nn.dot_product_attention(
            q,
            k.astype(dtype),
            v.astype(dtype),
            scale=sm_scale,
            is_causal=causal,
            query_seq_lengths=lengths,
            key_value_seq_lengths=lengths,
            implementation="cudnn",
        )

    arrays = query, key, value, lengths.astype(jnp.int32)
    if name == "xla":
        return reference(*arrays)
    return library(*arrays) if impl != AUTO else on_platform("cuda", library, reference)(*arrays)


def operand_dtype(dtype: Any, head_dim: int) -> Any:
    """Dtype that ``sequence_attention`` converts keys and values to, beside queries of ``dtype``.

    Who makes them in it spares the conversion. It holds for what "auto" runs on the accelerator
    that is there: in a program for the CPU of a machine with a GPU they are rounded once more.
    """
    name = resolve("sequence_attention", AUTO, automatic(dtype, head_dim), IMPLEMENTATIONS, {})
    return dtype if name == "cudnn" else jnp.float32


def automatic(dtype: Any, head_dim: int) -> str:
    """cuDNN wherever it can run."""
    return "xla" if "cudnn" in refusals(dtype, head_dim) else "cudnn"


def refusals(dtype: Any, head_dim: int) -> dict[str, str]:
    """Why the library kernel cannot run here."""
    gpu = find_gpu()
    name = jnp.dtype(dtype).name
    if gpu is None or gpu.capability < (8, 0):
        return {"cudnn": "it needs an NVIDIA GPU of compute capability 8.0 or more"}
    if name not in CUDNN_DTYPES:
        return {"cudnn": f"{name} values: it takes {' and '.join(CUDNN_DTYPES)}"}
    if head_dim % 8 or head_dim > 128:
        return {"cudnn": f"heads of {head_dim}: a multiple of 8 up to 128 is needed"}
    return {}
