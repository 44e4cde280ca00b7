"""Public entry of the packed int4 matmul."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import jax_triton_calls
from pallas_kernels.accelerator import find_gpu, has_tpu, on_platform
from pallas_kernels.dispatch import AUTO, resolve
from pallas_kernels.int4_matmul.reference import int4_matmul_reference
from pallas_kernels.stable import as_stored, rounded

IMPLEMENTATIONS = ("mosaic_gpu", "pallas_triton", jax_triton_calls.NAME, "pallas_tpu", "xla")
GEMV_ROWS = 4
"""Up to so many tokens the dot-product kernel is faster than the tensor-core one."""


def int4_matmul(
    x: Int[Array, "M K"],
    x_scale: Float[Array, " P"],
    packed: Array,
    scale: Array,
    layer: Array | int | None = None,
    *,
    bias: Array | None = None,
    out_dtype: Any = jnp.float32,
    impl: str = AUTO,
) -> Float[Array, "M N"]:
    """``y = (x W^T) * x_scale * scale + bias``: int8-stored activations, packed int4 weights.

    Args:
      x: int8, values of 4- or 8-bit activations.
      x_scale: float32 scale of each row of ``x``; what stands beyond the rows is not used.
      packed: uint8 ``[N, K/2]``, or the whole stack ``[L, N, K/2]`` together with ``layer``.
      scale: float32 ``[N]`` or ``[L, N]``.
      layer: index into the stack; taken inside the kernels, which copy no slice.
      bias: ``[N]`` or ``[L, N]``, added in float32; the tensor-core kernel adds it itself.
      out_dtype: of the result; the epilogue itself is float32.
      impl: "auto" or the name of an implementation; a named one that cannot run raises ValueError.

    Accumulates in int32 (exact), multiplies by ``x_scale`` then ``scale`` in float32, adds the
    bias.
    """
    rows, inputs = x.shape
    outputs = packed.shape[-2]
    name = resolve(
        "int4_matmul",
        impl,
        automatic(rows, outputs, inputs),
        IMPLEMENTATIONS,
        refusals(rows, outputs, inputs),
    )

    if layer is None:
        packed, scale, layer = packed[None], scale[None], 0
        bias = None if bias is None else bias[None]
    arrays = (x, x_scale, packed, scale, jnp.asarray(layer, jnp.int32), bias)

    def then_bias(product):
        """For what multiplies only."""

        def run(x, x_scale, packed, scale, layer, bias):
            if bias is None:
                return product(x, x_scale, packed, scale, layer, out_dtype=out_dtype)
            own = jax.lax.dynamic_index_in_dim(bias, layer, keepdims=False).astype(jnp.float32)
            out = product(x, x_scale, packed, scale, layer, out_dtype=jnp.float32)
            return as_stored(out + own, out_dtype).astype(out_dtype)

        return run

    reference = then_bias(_reference)
    if name == "xla":
        return reference(*arrays)
    if name == "mosaic_gpu":
        from pallas_kernels.int4_matmul.mosaic_gpu import int4_matmul_mosaic

        kernel = functools.partial(int4_matmul_mosaic, out_dtype=out_dtype)
    elif name == "pallas_tpu":
        from pallas_kernels.int4_matmul.pallas_tpu import int4_matmul_tpu

        kernel = then_bias(int4_matmul_tpu)
    elif name == jax_triton_calls.NAME:
        jax_triton_calls.load()
        from pallas_kernels.int4_matmul.jax_triton import int4_matmul_jax_triton

        kernel = then_bias(int4_matmul_jax_triton)
    else:
        from pallas_kernels.int4_matmul.pallas_triton import int4_matmul_dot

        kernel = then_bias(int4_matmul_dot)
    if impl != AUTO:
        return kernel(*arrays)
    platform = "tpu" if name == "pallas_tpu" else "cuda"
    return on_platform(platform, kernel, reference)(*arrays)


def _reference(x, x_scale, packed, scale, layer, *, out_dtype):
    product = rounded(int4_matmul_reference(x, x_scale[: x.shape[0]], packed, scale, layer))
    return as_stored(product, out_dtype).astype(out_dtype)


def automatic(rows: int, outputs: int, inputs: int) -> str:
    """The fastest implementation that can run here, for ``rows`` tokens.

    "triton" is for GPUs other than Hopper, where it was not measured against XLA.
    """
    refused = refusals(rows, outputs, inputs)
    gpu, other = find_gpu(), jax_triton_calls.NAME
    if gpu is not None and other not in refused:
        reason = "not on Hopper" if gpu.is_hopper else jax_triton_calls.broken()
        refused |= {other: reason} if reason else {}
    few = ("pallas_triton",) if rows <= GEMV_ROWS else ()
    order = (*few, "mosaic_gpu", other, "pallas_tpu")
    return next((name for name in order if name not in refused), "xla")


def refusals(rows: int, outputs: int, inputs: int) -> dict[str, str]:
    """Why an implementation cannot run here: the machine or the shape."""
    gpu = find_gpu()
    found = {}
    if gpu is None or not gpu.is_hopper:
        found["mosaic_gpu"] = "it needs a Hopper GPU (compute capability 9.0)"
    elif outputs % 128 or inputs % 128:
        found["mosaic_gpu"] = f"{outputs} x {inputs} weights: both must be multiples of 128"
    if gpu is None:
        found["pallas_triton"] = "it needs an NVIDIA GPU"
    elif inputs % 8 or inputs >= 1 << 17:
        # The sums are 16 times too large inside: 2^17 products of 8 x 128 would leave int32.
        found["pallas_triton"] = f"{inputs} inputs: must be a multiple of 8 below 131072"
    elif rows > 16:
        found["pallas_triton"] = f"{rows} tokens: at most 16"
    if (reason := jax_triton_calls.refusal()) is not None:
        found[jax_triton_calls.NAME] = reason
    elif inputs % 8:
        found[jax_triton_calls.NAME] = f"{inputs} inputs: must be a multiple of 8"
    elif rows == 1 and inputs >= 1 << 17:
        found[jax_triton_calls.NAME] = f"{inputs} inputs: must be below 131072 for one token"
    if not has_tpu():
        found["pallas_tpu"] = "it needs a TPU"
    return found
