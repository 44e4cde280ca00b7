"""Integer matmul with a fixed epilogue, in plain jnp: what every back end must equal."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.packing import unpack_int4


def integer_matmul(
    x: Int[Array, "M K"],
    x_scale: Float[Array, " M"],
    codes: Int[Array, "N K"],
    scale: Float[Array, " N"],
) -> Float[Array, "M N"]:
    """``(x codes^T) * x_scale * scale`` with int32 accumulation, multiplied in that order in
    float32."""
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
