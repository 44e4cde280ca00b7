"""Public entry of the column sums of causal attention."""

from __future__ import annotations

from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.attention_mass.reference import column_mass
from pallas_kernels.dispatch import AUTO, resolve

IMPLEMENTATIONS = ("xla",)


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
    holds a ``T x T`` matrix.
    """
    resolve("attention_mass", impl, "xla", IMPLEMENTATIONS, {})
    return column_mass(query, key, lengths, is_visual, sm_scale=sm_scale)
