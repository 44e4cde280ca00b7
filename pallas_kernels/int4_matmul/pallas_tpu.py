"""The int4 matmul on a TPU: nibbles widened in VMEM, int8 products on the matrix unit.

A byte holds the codes of an even and an odd column. Instead of interleaving them again, the tokens
are split into their even and odd columns, and the two products are added:

    sum_k x_k q_k = sum_j x_2j low_j + sum_j x_2j+1 high_j
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, UInt8

BLOCK = (256, 256, 512)
"""Tokens, weight rows and packed bytes of a step: some 0.5 MB of VMEM, doubled by the pipeline."""
_SUBLANES = 32  # rows of an int8 tile


def int4_matmul_tpu(
    x: Int[Array, "M K"],
    x_scale: Float[Array, " M"],
    packed: UInt8[Array, "L N bytes"],
    scale: Float[Array, "L N"],
    layer: Int[Array, ""],
    *,
    out_dtype: Any,
    interpret: Any = False,
) -> Float[Array, "M N"]:
    """See ``pallas_kernels.int4_matmul.int4_matmul``; any shape with even ``K``.

    interpret: ``pltpu.InterpretParams()`` runs the kernel on the host.
    """
    rows, _ = x.shape
    _, outputs, width = packed.shape
    rows_block = min(BLOCK[0], -(-rows // _SUBLANES) * _SUBLANES)
    outputs_block, width_block = min(BLOCK[1], outputs), min(BLOCK[2], width)
    steps = pl.cdiv(width, width_block)
    # The last step reads past the weights; those bytes meet zeros.
    pad = ((0, 0), (0, steps * width_block - width))
    even, odd = (jnp.pad(x[:, part::2].astype(jnp.int8), pad) for part in (0, 1))

    def tokens():
        return pl.BlockSpec((rows_block, width_block), lambda m, n, k, layer: (m, k))

    call = pl.pallas_call(
        functools.partial(_kernel, steps=steps),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(pl.cdiv(rows, rows_block), pl.cdiv(outputs, outputs_block), steps),
            in_specs=[
                tokens(),
                tokens(),
                pl.BlockSpec((rows_block, 1), lambda m, n, k, layer: (m, 0)),
                pl.BlockSpec(
                    (None, outputs_block, width_block), lambda m, n, k, layer: (layer[0], n, k)
                ),
                pl.BlockSpec((None, 1, outputs_block), lambda m, n, k, layer: (layer[0], 0, n)),
            ],
            out_specs=pl.BlockSpec((rows_block, outputs_block), lambda m, n, k, layer: (m, n)),
            scratch_shapes=[pltpu.VMEM((rows_block, outputs_block), jnp.int32)],
        ),
        out_shape=jax.ShapeDtypeStruct((rows, outputs), out_dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=interpret,
    )
    return call(
        layer.reshape(1),
        even,
        odd,
        x_scale[:rows].astype(jnp.float32)[:, None],
        packed,
        scale.astype(jnp.float32)[:, None],
    )


def _kernel(layer_ref, even_ref, odd_ref, x_scale_ref, w_ref, scale_ref, out_ref, sums, *, steps):
    """One block of packed bytes of one tile; the last step scales and writes it."""
    del layer_ref  # read by the block specs

    @pl.when(pl.program_id(2) == 0)
    def _():
        sums[...] = jnp.zeros_like(sums)

    # Shifting in 32 bits: the high nibble's sign fills up from the top.
    word = w_ref[...].astype(jnp.int32) << 24
    low, high = (word << 4) >> 28, word >> 28
    for tokens, codes in ((even_ref, low), (odd_ref, high)):
        sums[...] += jax.lax.dot_general(
            tokens[...],
            codes.astype(jnp.int8),
            (((1,), (1,)), ((), ())),
            preferred_element_type=jnp.int32,
        )

    @pl.when(pl.program_id(2) == steps - 1)
    def _():
        out = sums[...].astype(jnp.float32) * x_scale_ref[...] * scale_ref[...]
        out_ref[...] = out.astype(out_ref.dtype)
