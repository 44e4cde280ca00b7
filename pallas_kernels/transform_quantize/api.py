"""Public entry of what stands between two matmuls."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.accelerator import find_gpu, on_platform
from pallas_kernels.dispatch import AUTO, resolve
from pallas_kernels.stable import ACTIVATIONS
from pallas_kernels.transform_quantize.reference import (
    Quantized,
    Sites,
    transform_quantize_reference,
)

IMPLEMENTATIONS = ("pallas_triton", "xla")
LARGEST = 128
"""Side of a factor: padded to 128 x 256, products would ask one program for 320 KB of shared
memory; 227 are there."""
SPLIT_INPUTS, SPLIT_ROWS = 8192, 64
"""See ``is_split``."""


def transform_quantize(
    x: Float[Array, "M width"],
    layer: Array | int | None = None,
    *,
    bits: int,
    added: Float[Array, "M K"] | None = None,
    norm: Array | None = None,
    norm_bias: Array | None = None,
    eps: float = 0.0,
    gated: bool = False,
    activation: str | None = None,
    left: Array | None = None,
    right: Array | None = None,
    clip: Array | None = None,
    padding: int = 0,
    impl: str = AUTO,
) -> Quantized:
    """``Q(T(norm(x + added)))``, ``Q(T(silu(gate) * up))`` or ``Q(T(activation(x)))``: integers for
    the next matmul.

    Args:
      x: rows of the residual stream ``[M, K]``, or with ``gated`` gate and up ``[M, 2K]``.
      layer: index into parameters that are stacks ``[L, ...]``; None: they have no such axis.
      bits: 4 or 8; ``codes`` are int8 in any case.
      added: a sublayer's output; the sum is returned as ``states`` in the dtype of ``x``.
      norm: weight ``[K]`` of an RMSNorm, with ``eps``.
      norm_bias: ``[K]``; given, the norm is a LayerNorm: centred, with this bias.
      activation: one of ``stable.ACTIVATIONS``, of what comes without a gate.
      left, right: factors ``[a, a]``, ``[b, b]`` of the transform, ``K = a b + padding``
        (FlatQuant, Sun et al. 2025, section 3.1): a row as a matrix ``a x b`` becomes
        ``left^T X right``. ``left`` alone mixes ``a`` heads of ``K / a``.
      clip: factors ``[2]`` of a row's largest and smallest value.
      padding: so many of the ``K`` channels, the last ones, are no part of the transform: their
        codes are 0 (a next matmul that is wider than its input: ``models.alignment``).
      impl: "auto" or the name of an implementation; a named one that cannot run raises ValueError.

    ``scale`` is the largest absolute value over ``2^(bits - 1) - 1``; codes are rounded to nearest,
    ties to even. Sum, gate, activation and norm are rounded to the dtype of ``x``, as separate
    layers would.
    """
    if bits not in (4, 8):
        raise ValueError(f"transform_quantize: bits must be 4 or 8, got {bits}")
    if left is None and right is not None:
        raise ValueError("transform_quantize: right needs left")
    if padding and (right is None or norm is not None):
        raise ValueError("transform_quantize: padding needs right, and no norm before it")
    if gated and (added is not None or norm is not None):
        raise ValueError("transform_quantize: a gated input has neither a norm nor a sum before it")
    if norm_bias is not None and norm is None:
        raise ValueError("transform_quantize: norm_bias needs norm")
    if activation is not None:
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"transform_quantize: no activation {activation!r}; known: {sorted(ACTIVATIONS)}"
            )
        if gated:
            raise ValueError("transform_quantize: a gated input has an activation already, SiLU")
        if added is not None or norm is not None:
            raise ValueError(
                "transform_quantize: neither a norm nor a sum stands before activation"
            )
    inputs = (x.shape[-1] // 2 if gated else x.shape[-1]) - padding
    if left is not None:
        a = left.shape[-1]
        b = inputs // a if right is None else right.shape[-1]
        if a * b != inputs:
            raise ValueError(
                f"transform_quantize: factors of {a} and {b} do not make {inputs} inputs"
            )
    heads = 1 if left is None else left.shape[-1]
    splits = right is not None and norm is None and added is None
    name = resolve(
        "transform_quantize",
        impl,
        automatic(inputs, heads, activation, splits=splits),
        IMPLEMENTATIONS,
        refusals(inputs, heads, activation, splits=splits),
    )
    stacks = [norm, norm_bias, left, right, clip]
    if layer is None:
        stacks, layer = [None if a is None else a[None] for a in stacks], 0
    options: dict[str, Any] = {
        "bits": bits,
        "gated": gated,
        "activation": activation,
        "padding": padding,
    }

    def reference(x, added, sites, layer):
        def own(array):
            return jax.lax.dynamic_index_in_dim(array, layer, keepdims=False)

        return transform_quantize_reference(x, added, jax.tree.map(own, sites), eps=eps, **options)

    def kernel(x, added, sites, layer):
        from pallas_kernels.transform_quantize.pallas_triton import transform_quantize_triton
        from pallas_kernels.transform_quantize.pallas_triton_split import transform_quantize_split

        if splits and is_split(x.shape[0], inputs, heads):
            return transform_quantize_split(x, sites, layer, **options)
        return transform_quantize_triton(x, added, sites, layer, eps=eps, **options)

    arrays = x, added, Sites(*stacks), jnp.asarray(layer, jnp.int32)
    if name == "xla":
        return reference(*arrays)
    return kernel(*arrays) if impl != AUTO else on_platform("cuda", kernel, reference)(*arrays)


def automatic(
    inputs: int, left: int = 1, activation: str | None = None, *, splits: bool = False
) -> str:
    """The kernel, where it can run; see ``refusals``."""
    return "xla" if refusals(inputs, left, activation, splits=splits) else "pallas_triton"


def refusals(
    inputs: int, left: int = 1, activation: str | None = None, *, splits: bool = False
) -> dict[str, str]:
    """Why the kernel cannot run here; ``left``: the first factor. splits: there is a second one,
    and neither norm nor sum before."""
    if find_gpu() is None:
        return {"pallas_triton": "it needs an NVIDIA GPU"}
    if activation == "gelu":
        return {"pallas_triton": "an exact gelu: Pallas' Triton back end has no error function"}
    if left == 1 and inputs > 32768:
        return {"pallas_triton": f"{inputs} inputs: a program holds at most 32768"}
    sides = left, inputs // left
    most = (LARGEST, LARGEST * 2) if splits else (LARGEST, LARGEST)
    if left > 1 and any(side > limit for side, limit in zip(sides, most, strict=True)):
        limits = " x ".join(map(str, most))
        return {"pallas_triton": f"a transform of {sides[0]} x {sides[1]}: at most {limits}"}
    return {}


def is_split(rows: int, inputs: int, left: int) -> bool:
    """Whether the transform of a row is shared by several programs: it must be where a factor is
    large, and it pays for few long rows."""
    return inputs // left > LARGEST or (inputs > SPLIT_INPUTS and rows <= SPLIT_ROWS)
