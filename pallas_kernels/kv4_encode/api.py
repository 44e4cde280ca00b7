"""Public entry of what stands between the q/k/v projection of a prompt and its attention."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.accelerator import find_gpu, on_platform, triton_refusal
from pallas_kernels.dispatch import AUTO, resolve
from pallas_kernels.kv4_encode.reference import (
    Encoded,
    Packed,
    Sites,
    kv4_encode_reference,
    query_heads,
)

IMPLEMENTATIONS = ("pallas_triton", "xla")
WIDEST = 256
"""Values of the largest head that the kernel takes; half of it with a transform, whose matrix is in
shared memory."""


def kv4_encode(
    qkv: Float[Array, "M rows"],
    cos: Float[Array, "M half"],
    sin: Float[Array, "M half"],
    key: Packed,
    value: Packed,
    layer: Array | int,
    *,
    site_layer: Array | int | None = None,
    query_transform: Float[Array, "L H H"] | None = None,
    key_transform: Float[Array, "L H H"] | None = None,
    clip: Float[Array, "L 2 2"] | None = None,
    read_dtype: Any = jnp.float32,
    impl: str = AUTO,
) -> Encoded:
    """Rotates queries and keys of ``M`` tokens, packs keys and values, and reads them back.

    Args:
      qkv: the joined projection, ``N + 2 K`` heads of ``H``: queries, keys, values. Its dtype is
        that of the queries, and what is rounded to after rotation and after the transform.
      cos, sin: rotary angles; pair ``(i, i + H/2)`` of a head is turned in float32.
      key, value: stacks of codes ``[L, M, K, H/2]`` (uint8), scales and zeros ``[L, M, K]``, of
        which ``layer`` is written. Donated where they can be: no layer is copied into its stack.
      layer: index into these stacks. site_layer: index into the following, if it is another one.
      query_transform, key_transform: multiplied to each rotated query and key (FlatQuant's P_k).
      clip: for keys and for values, factors of the largest and of the smallest value.
      read_dtype: of the keys and values that are read back.
      impl: "auto" or the name of an implementation; a named one that cannot run raises ValueError.

    Asymmetric 4-bit per token per head, ``x ~ scale * (code - zero)`` with the scale rounded to its
    stored dtype first; the range always contains 0. With the kernel a code next to a rounding
    boundary may be the one on its other side; what is read back belongs to the codes exactly.

    Raises:
      ValueError: shapes that do not fit together.
    """
    half = cos.shape[-1]
    query_heads("kv4_encode", qkv.shape[-1], 2 * half, key[0].shape[2])
    sites = Sites(query_transform, key_transform, clip)
    _check(qkv, cos, sin, key, value, sites)
    transformed = query_transform is not None or key_transform is not None
    name = resolve(
        "kv4_encode",
        impl,
        automatic(2 * half, transformed, key[0].size),
        IMPLEMENTATIONS,
        refusals(2 * half, transformed, key[0].size),
    )
    layer = jnp.asarray(layer, jnp.int32)
    place = layer if site_layer is None else jnp.asarray(site_layer, jnp.int32)
    arrays = qkv, cos, sin, key, value, layer, place, sites

    def reference(*arrays):
        return kv4_encode_reference(*arrays, read_dtype=read_dtype)

    def kernel(*arrays):
        from pallas_kernels.kv4_encode.pallas_triton import kv4_encode_triton

        return kv4_encode_triton(*arrays, read_dtype=read_dtype)

    if name == "xla":
        return reference(*arrays)
    return kernel(*arrays) if impl != AUTO else on_platform("cuda", kernel, reference)(*arrays)


def automatic(head_dim: int, transformed: bool = False, codes: int = 0) -> str:
    """The kernel, where it can run."""
    return "xla" if refusals(head_dim, transformed, codes) else "pallas_triton"


def refusals(head_dim: int, transformed: bool = False, codes: int = 0) -> dict[str, str]:
    """Why the kernel cannot run here; ``transformed``: queries or keys are; ``codes``: bytes of the
    whole stack of keys."""
    if find_gpu() is None:
        return {"pallas_triton": "it needs an NVIDIA GPU"}
    widest = WIDEST // 2 if transformed else WIDEST
    if head_dim % 4 or head_dim > widest:
        # Two codes share a byte, and a program holds the two halves of a head apart.
        return {"pallas_triton": f"heads of {head_dim}: a multiple of 4 up to {widest} is needed"}
    reason = triton_refusal(codes)
    return {"pallas_triton": reason} if reason else {}


def _check(qkv: Array, cos: Array, sin: Array, key: Packed, value: Packed, sites: Sites) -> None:
    """Raises ValueError for the first array whose shape is not what the others ask for."""
    rows, half = qkv.shape[0], cos.shape[-1]
    layers, _, kv_heads, _ = key[0].shape
    heads = layers, rows, kv_heads
    expected: list[tuple[str, Array, tuple[int, ...]]] = [
        ("cos", cos, (rows, half)),
        ("sin", sin, (rows, half)),
    ]
    for name, stack in {"key": key, "value": value}.items():
        shapes = (*heads, half), heads, heads
        parts = "codes", "scales", "zeros"
        expected += [
            (f"{name} {part}", array, shape)
            for part, array, shape in zip(parts, stack, shapes, strict=True)
        ]
    for name, site in (("query_transform", sites.query), ("key_transform", sites.key)):
        if site is not None:
            expected.append((name, site, (site.shape[0], 2 * half, 2 * half)))
    if sites.clip is not None:
        expected.append(("clip", sites.clip, (sites.clip.shape[0], 2, 2)))
    for name, array, shape in expected:
        if array.shape != shape:
            raise ValueError(f"kv4_encode: {name} of shape {array.shape}, expected {shape}")
