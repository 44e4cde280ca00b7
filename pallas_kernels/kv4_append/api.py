"""Public entry of the append to a 4-bit key/value cache."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.accelerator import find_gpu, on_platform, triton_refusal
from pallas_kernels.dispatch import AUTO, resolve
from pallas_kernels.kv4_append.reference import Appended, Packed, Sites, kv4_append_reference
from pallas_kernels.kv4_encode.reference import query_heads

IMPLEMENTATIONS = ("pallas_triton", "xla")


def kv4_append(
    qkv: Float[Array, "B rows"],
    cos: Float[Array, "B half"],
    sin: Float[Array, "B half"],
    key: Packed,
    value: Packed,
    lengths: Int[Array, " B"],
    layer: Array | int,
    *,
    site_layer: Array | int | None = None,
    query_transform: Float[Array, "L H H"] | None = None,
    key_transform: Float[Array, "L H H"] | None = None,
    clip: Float[Array, "L 2 2"] | None = None,
    bias: Float[Array, "L rows"] | None = None,
    dtype: Any = None,
    impl: str = AUTO,
) -> Appended:
    """Rotates the new token's queries and keys; writes its keys and values at ``lengths``.

    Args:
      qkv: the fused projection of one token per sample, ``N + 2 K`` heads of ``H``: queries, keys,
        values.
      cos, sin: rotary angles, ``[B, H/2]``; pair ``(i, i + H/2)`` of a head is turned in float32.
      key, value: codes ``[L, B, K, S, H/2]``, scales and zeros ``[L, B, K, S]`` of the whole stack
        of layers. Donated where they can be.
      lengths: tokens that each sample has; one with ``S`` of them is left as it is.
      layer: index into the caches. site_layer: index into the following, if it is another one.
      query_transform, key_transform: multiplied to each rotated query and key (FlatQuant's P_k).
      clip: for keys and for values, factors of the largest and of the smallest value.
      bias: of the projection; added to it in float32.
      dtype: to which projection and bias are rounded, before and after rotation and transform; None
        is that of ``qkv``.

    Asymmetric 4-bit per token per head, ``x ~ scale * (code - zero)`` with the scale rounded to its
    stored dtype first; the range always contains 0.
    """
    query_heads("kv4_append", qkv.shape[-1], 2 * cos.shape[-1], key[0].shape[2])
    size = key[0].size
    name = resolve("kv4_append", impl, automatic(size), IMPLEMENTATIONS, refusals(size))
    layer = jnp.asarray(layer, jnp.int32)
    place = layer if site_layer is None else jnp.asarray(site_layer, jnp.int32)
    sites = Sites(query_transform, key_transform, clip, bias)
    arrays = qkv, cos, sin, key, value, lengths, layer, place, sites
    dtype = jnp.dtype(qkv.dtype if dtype is None else dtype)

    def reference(*arrays):
        return kv4_append_reference(*arrays, dtype=dtype)

    def kernel(*arrays):
        from pallas_kernels.kv4_append.pallas_triton import kv4_append_triton

        return kv4_append_triton(*arrays, dtype=dtype)

    if name == "xla":
        return reference(*arrays)
    return kernel(*arrays) if impl != AUTO else on_platform("cuda", kernel, reference)(*arrays)


def automatic(codes: int = 0) -> str:
    """The kernel wherever it can run (``measured/decode_kernels.md``)."""
    return "xla" if refusals(codes) else "pallas_triton"


def refusals(codes: int = 0) -> dict[str, str]:
    """Why the kernel cannot run here; ``codes``: bytes of the whole stack of keys."""
    if find_gpu() is None:
        return {"pallas_triton": "it needs an NVIDIA GPU"}
    reason = triton_refusal(codes)
    return {"pallas_triton": reason} if reason else {}
