"""Public entry of the packed int4 matmul."""

from __future__ import annotations

from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import choose
from pallas_kernels.int4_matmul.reference import int4_matmul_reference

IMPLEMENTATIONS = {"xla": int4_matmul_reference}


def int4_matmul(
    x: Int[Array, "M K"],
    x_scale: Float[Array, " M"],
    packed: Array,
    scale: Array,
    layer: Array | int | None = None,
    *,
    impl: str = "auto",
) -> Float[Array, "M N"]:
    """``y = (x W^T) * x_scale * scale`` for int8-stored activations and packed int4 weights.

    Args:
      x: int8, values of 4- or 8-bit activations.
      x_scale: float32 scale of each row of ``x``.
      packed: uint8 ``[N, K/2]``, or the whole stack ``[L, N, K/2]`` together with ``layer``.
      scale: float32 ``[N]`` or ``[L, N]``.
      layer: index into the stack; taken inside the kernel so that no slice is copied where
      avoidable.
      impl: "auto" or the name of an implementation; a named one that cannot run raises ValueError.

    Accumulates in int32 (exact), multiplies by ``x_scale`` then ``scale`` in float32.
    """
    return IMPLEMENTATIONS[choose("int4_matmul", IMPLEMENTATIONS, impl)](
        x, x_scale, packed, scale, layer
    )
