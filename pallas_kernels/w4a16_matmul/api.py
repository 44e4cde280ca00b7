"""Public entry of the weight-only 4-bit matmul."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.accelerator import find_gpu, on_platform
from pallas_kernels.dispatch import AUTO, resolve
from pallas_kernels.stable import rounded
from pallas_kernels.w4a16_matmul.reference import w4a16_matmul_reference

IMPLEMENTATIONS = ("pallas_triton", "xla")
MOST_ROWS = 16
"""Tokens of a decode step; with more it is cheaper to dequantize a layer's weight once."""


def w4a16_matmul(
    x: Float[Array, "M K"],
    packed: Array,
    scale: Array,
    zeros: Array | None = None,
    layer: Array | int | None = None,
    *,
    group_size: int = 0,
    group_index: Array | None = None,
    parts: Sequence[int] = (),
    bias: Array | None = None,
    out_dtype: Any = jnp.float32,
    impl: str = AUTO,
) -> Float[Array, "M N"]:
    """``y = x W^T + bias`` with ``W = scale (code - zero)`` rounded to the dtype of ``x``.

    Args:
      x: float32, bfloat16 or float16.
      packed: uint8 ``[N, K/2]``, or the whole stack ``[L, N, K/2]`` together with ``layer``; every
        array below then begins with ``L`` too.
      scale: ``[N, G]``, of groups of ``group_size`` input channels (the last one may be shorter);
        or ``[N]``, of whole rows: those multiply the sum of ``x`` times codes, in float32.
      zeros: uint8 ``[N, G]``, at most 16: codes are unsigned. None: signed, and zero is 0.
      layer: index into the stack; taken inside the kernel, which copies no slice.
      group_size: 0 for whole rows (``G`` is 1).
      group_index: int32 ``[P, K]``, the group of each input channel where it is not its place, one
        row for each of the ``parts``: heights of the matrices that are joined along ``N``.
      bias: ``[N]``, added in float32.
      out_dtype: of the result; sums are float32.
      impl: "auto" or the name of an implementation; a named one that cannot run raises ValueError.

    Implementations multiply the same numbers and differ by the order of summation. "xla"
    dequantizes the whole weight of the layer first.

    Raises:
      ValueError: shapes that do not belong together.
    """
    _check(x, packed, scale, zeros, layer, group_size, group_index)
    shape = {
        "group_size": group_size if scale.ndim == packed.ndim else 0,
        "dtype": x.dtype,
        "indexed": group_index is not None,
    }
    name = resolve(
        "w4a16_matmul",
        impl,
        automatic(*x.shape, **shape),
        IMPLEMENTATIONS,
        refusals(*x.shape, **shape),
    )

    def reference(x, packed, scale, zeros, layer, bias, index):
        options = {"group_size": group_size, "group_index": index, "parts": parts}
        return w4a16_matmul_reference(x, packed, scale, zeros, layer, **options)

    def kernel(x, packed, scale, zeros, layer, bias, index):
        from pallas_kernels.w4a16_matmul import pallas_triton

        if layer is None:
            packed, scale, layer = packed[None], scale[None], jnp.int32(0)
            zeros = None if zeros is None else zeros[None]
        run = functools.partial(pallas_triton.w4a16_matmul_triton, x, packed)
        if scale.ndim == 3:
            return run(scale, zeros, layer, group_size=group_size)
        sums = run(None, None, layer, group_size=0)
        return sums * jax.lax.dynamic_index_in_dim(scale, layer).astype(jnp.float32)

    def then_bias(product):
        def run(*arrays):
            *_, layer, bias, _ = arrays
            out = rounded(product(*arrays))
            if bias is not None:
                if layer is not None:
                    bias = jax.lax.dynamic_index_in_dim(bias, layer, keepdims=False)
                out = out + bias.astype(jnp.float32)
            return out.astype(out_dtype)

        return run

    if layer is not None:
        layer = jnp.asarray(layer, jnp.int32)
    arrays = (x, packed, scale, zeros, layer, bias, group_index)
    if name == "xla":
        return then_bias(reference)(*arrays)
    if impl != AUTO:
        return then_bias(kernel)(*arrays)
    return on_platform("cuda", then_bias(kernel), then_bias(reference))(*arrays)


def automatic(
    rows: int,
    inputs: int,
    *,
    group_size: int = 128,
    dtype: Any = jnp.bfloat16,
    indexed: bool = False,
) -> str:
    """The kernel wherever it can run."""
    refused = refusals(rows, inputs, group_size=group_size, dtype=dtype, indexed=indexed)
    return "xla" if "pallas_triton" in refused else "pallas_triton"


def refusals(
    rows: int,
    inputs: int,
    *,
    group_size: int = 128,
    dtype: Any = jnp.bfloat16,
    indexed: bool = False,
) -> dict[str, str]:
    """Why the kernel cannot run here: the machine or the shape."""
    reason = None
    if find_gpu() is None:
        reason = "it needs an NVIDIA GPU"
    elif rows > MOST_ROWS:
        reason = f"{rows} tokens: at most {MOST_ROWS}"
    elif inputs % 8:
        reason = f"{inputs} inputs: must be a multiple of 8"
    elif 0 < group_size < inputs and (group_size % 8 or group_size & (group_size - 1)):
        reason = f"groups of {group_size}: must be a power of two from 8 on"
    elif indexed:
        reason = "groups are not neighboring input channels (activation order)"
    elif jnp.dtype(dtype) not in (jnp.float32, jnp.bfloat16, jnp.float16):
        reason = f"inputs are {jnp.dtype(dtype)}: float32, bfloat16 or float16 are needed"
    return {} if reason is None else {"pallas_triton": reason}


def _check(x, packed, scale, zeros, layer, group_size: int, group_index) -> None:
    """Raises ValueError for shapes that do not belong together."""
    inputs, stack = x.shape[1], packed.shape[:-2]
    if packed.ndim != (2 if layer is None else 3):
        raise ValueError(f"w4a16_matmul: packed {packed.shape} with layer {layer}")
    if 2 * packed.shape[-1] != inputs:
        raise ValueError(f"w4a16_matmul: {inputs} inputs, packed {packed.shape}")
    rows = (*stack, packed.shape[-2])
    groups = -(-inputs // group_size) if group_size else 1
    if scale.shape not in (rows, (*rows, groups)):
        raise ValueError(f"w4a16_matmul: scale {scale.shape}, not {rows} or {(*rows, groups)}")
    if zeros is not None and (scale.shape == rows or zeros.shape != scale.shape):
        raise ValueError(f"w4a16_matmul: zeros {zeros.shape}, scale {scale.shape}")
    if group_index is not None and scale.shape == rows:
        raise ValueError("w4a16_matmul: a group index, but one scale for each output channel")
