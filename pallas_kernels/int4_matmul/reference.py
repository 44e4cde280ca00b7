"""Integer matmul with a fixed epilogue, in plain jnp: what every back end must equal."""

from __future__ import annotations

import os

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.accelerator import find_gpu
from pallas_kernels.packing import unpack_int4

UNTUNED = "--xla_gpu_autotune_level=0"
"""With this flag all products were zero (jax 0.11.2, one H100 80GB and one H200), silently."""


def integer_matmul(
    x: Int[Array, "M K"],
    x_scale: Float[Array, " M"],
    codes: Int[Array, "N K"],
    scale: Float[Array, " N"],
) -> Float[Array, "M N"]:
    """``(x codes^T) * x_scale * scale`` with int32 accumulation, multiplied in that order in
    float32.

    Raises:
      ValueError: there is a GPU, and XLA is told not to tune: it then computes int8 products wrong.
    """
    if find_gpu() is not None and UNTUNED in os.environ.get("XLA_FLAGS", "").split():
        raise ValueError(f"XLA's int8 products are wrong on a GPU with {UNTUNED} in XLA_FLAGS")
    accumulator = jax.lax.dot_general(
        x.astype(jnp.int8),
        codes.astype(jnp.int8),
        (((1,), (1,)), ((), ())),
        preferred_element_type=jnp.int32,
    )
    return accumulator.astype(jnp.float32) * x_scale[:, None] * scale[None, :]


def int4_matmul_reference(
    x: Int[Array, "M K"],
    x_scale: Float[Array, " M"],
    packed: Array,
    scale: Array,
    layer: Array | int | None = None,
) -> Float[Array, "M N"]:
    """See ``pallas_kernels.int4_matmul.int4_matmul``."""
    if layer is not None:
        packed = jax.lax.dynamic_index_in_dim(packed, layer, keepdims=False)
        scale = jax.lax.dynamic_index_in_dim(scale, layer, keepdims=False)
    return integer_matmul(x, x_scale, unpack_int4(packed), scale)
