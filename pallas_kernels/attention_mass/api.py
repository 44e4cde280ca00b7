"""Public entry of the column sums of causal attention."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.accelerator import find_gpu, on_platform
from pallas_kernels.attention_mass.reference import column_mass
from pallas_kernels.dispatch import AUTO, resolve

IMPLEMENTATIONS = ("pallas_triton", "xla")
TRITON_DTYPES = ("bfloat16", "float16")


def attention_mass(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    lengths: Int[Array, " B"],
    is_visual: Bool[Array, "B T"],
    *,
    sm_scale: float,
    impl: str = AUTO,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Attention that each token receives, summed over queries and averaged over heads (Eq. 6).

    ``A = softmax(sm_scale Q K^T)`` under the causal and length mask, indexed [query, key];
    ``inter[i] = 1/N sum_h sum_{text j > i} A[h, j, i]`` and
    ``intra[i] = 1/N sum_h sum_{visual k >= i} A[h, k, i]``. Text queries are the real tokens that
    are not visual. Both are 0 at or past ``lengths`` and where no such query follows. Grouped
    queries: head ``n`` reads key head ``n // (N / K)``. float32 softmax, sums and output. Never
    holds a ``T x T`` matrix. Derivatives are the reference's whatever runs.

    Args:
      impl: "auto" or the name of an implementation; a named one that cannot run raises ValueError.
    """
    # Two dtypes of 16 bits that differ have float32 in common.
    dtype, head_dim = jnp.promote_types(query.dtype, key.dtype), query.shape[-1]
    name = resolve(
        "attention_mass",
        impl,
        automatic(dtype, head_dim),
        IMPLEMENTATIONS,
        refusals(dtype, head_dim),
    )

    def reference(query, key, lengths, is_visual):
        return column_mass(query, key, lengths, is_visual, sm_scale=sm_scale)

    @jax.custom_jvp
    def kernel(query, key, lengths, is_visual):
        from pallas_kernels.attention_mass.pallas_triton import column_mass_triton

        return column_mass_triton(query, key, lengths, is_visual, sm_scale=sm_scale)

    @kernel.defjvp
    def _(primals, tangents):
        # Training a pruned model differentiates what it is pruned by, though a choice of tokens
        # has no derivative. Pallas has no rule for this kernel: the reference's is taken.
        rest = primals[2:]
        _, out = jax.jvp(lambda *heads: reference(*heads, *rest), primals[:2], tangents[:2])
        return kernel(*primals), out

    arrays = query, key, lengths.astype(jnp.int32), is_visual
    if name == "xla":
        return reference(*arrays)
    return kernel(*arrays) if impl != AUTO else on_platform("cuda", kernel, reference)(*arrays)


def automatic(dtype: Any, head_dim: int) -> str:
    """The kernel, where it can run."""
    return "xla" if "pallas_triton" in refusals(dtype, head_dim) else "pallas_triton"


def refusals(dtype: Any, head_dim: int) -> dict[str, str]:
    """Why the kernel cannot run here. float32 is left to XLA's full-precision products: a float32
    model is run to compare, and 16-bit operands could change which tokens it keeps."""
    gpu = find_gpu()
    name = jnp.dtype(dtype).name
    if gpu is None or gpu.capability < (8, 0):
        return {"pallas_triton": "it needs an NVIDIA GPU of compute capability 8.0 or more"}
    if name not in TRITON_DTYPES:
        return {"pallas_triton": f"{name} values: it takes {' and '.join(TRITON_DTYPES)}"}
    if head_dim > 128:
        return {"pallas_triton": f"heads of {head_dim}: at most 128"}
    return {}
