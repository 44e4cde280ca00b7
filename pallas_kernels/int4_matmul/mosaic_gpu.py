"""Hopper tensor-core matmul: int4 weights unpacked in registers, int8 tokens, int32 sums.

The product is computed as ``W x^T``, so that the weights are the operand that wgmma takes from
registers: a warpgroup reads its int4 tile from shared memory, widens it to int8 and multiplies.
Tokens stay in shared memory, read transposed. The epilogue scales in registers and writes tiles of
16-bit values transposed, so the result is ``[M, N]`` without a pass of its own; for float32 there
is no such store, and XLA transposes. One warpgroup loads, two compute.

Not in the interpreter: jax 0.11.2's cannot run wgmma with a register operand.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, UInt8

from pallas_kernels.accelerator import find_gpu

EPILOGUE = 64
"""Rows and columns of an output tile on its way through shared memory."""
WARPGROUP_ROWS = 64
"""Weight rows of one compute warpgroup; two of them share a block."""
H100_SMS = 132


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiles:
    """Tokens and inputs per step of a block, and how many steps are loaded ahead."""

    tokens: int
    inputs: int
    steps: int

    @classmethod
    def of(cls, rows: int, inputs: int) -> Tiles:
        """The measured choice: few tokens are bound by memory and want long, deep loads."""
        if rows > 128:
            return cls(tokens=256, inputs=128, steps=4)
        tokens = max(8, 1 << (rows - 1).bit_length())
        wide = 256 if inputs % 256 == 0 and tokens <= 64 else 128
        return cls(tokens=tokens, inputs=wide, steps=6 if wide == 256 and tokens <= 32 else 4)


def int4_matmul_mosaic(
    x: Int[Array, "M K"],
    x_scale: Float[Array, " M"],
    packed: UInt8[Array, "L N bytes"],
    scale: Float[Array, "L N"],
    layer: Int[Array, ""],
    *,
    out_dtype: Any,
    tiles: Tiles | None = None,
) -> Float[Array, "M N"]:
    """See ``pallas_kernels.int4_matmul.int4_matmul``; ``N`` and ``K`` are multiples of 128."""
    rows, inputs = x.shape
    depth, outputs, _ = packed.shape
    tiles = tiles or Tiles.of(rows, inputs)
    # The copy engine cuts tiles that stick out, but wants whole groups of rows: 8, or the 32
    # columns of a swizzled row of float32.
    unit = 8 if _transposes(out_dtype) or rows <= 8 else 32
    padded = -(-rows // unit) * unit
    whole = -(-rows // tiles.tokens) * tiles.tokens
    # The nibble order is that of jnp.int4: a view, no work (measured: 0 bytes of temporaries).
    weights = lax.bitcast_convert_type(packed, jnp.int4).reshape(depth * outputs, inputs)
    gpu = find_gpu()
    call = _kernel(
        outputs=outputs,
        rows=padded,
        inputs=inputs,
        tiles=tiles,
        out_dtype=jnp.dtype(out_dtype),
        num_sms=gpu.num_sms if gpu else H100_SMS,
    )
    out = call(
        weights,
        jnp.pad(x.astype(jnp.int8), ((0, padded - rows), (0, 0))),
        scale.astype(jnp.float32).reshape(-1),
        jnp.pad(x_scale.astype(jnp.float32), (0, whole - rows)),
        layer.reshape(1),
    )
    return out[:rows] if _transposes(out_dtype) else out[:, :rows].T


def _transposes(dtype: Any) -> bool:
    """Registers of 16-bit values can be stored transposed."""
    return jnp.dtype(dtype).itemsize == 2


def _transforms(columns: int, bits: int) -> tuple[Any, ...]:
    """Tiling and swizzle of a shared-memory tile with ``columns`` values in a row."""
    swizzle = plgpu.find_swizzle(columns * bits)
    return plgpu.TilingTransform((8, swizzle * 8 // bits)), plgpu.SwizzleTransform(swizzle)


def _kernel(
    *, outputs: int, rows: int, inputs: int, tiles: Tiles, out_dtype: Any, num_sms: int
) -> Any:
    block = 2 * WARPGROUP_ROWS
    tokens = tiles.tokens
    edge = min(EPILOGUE, tokens)
    grid = outputs // block, pl.cdiv(rows, tokens)
    chunk = min(tiles.inputs, 256)  # values of a swizzle row of int4
    transposed = _transposes(out_dtype)

    def kernel(w_gmem, x_gmem, w_scale_gmem, x_scale_gmem, layer_gmem, out_gmem, out_smem):
        first_row = layer_gmem[0] * outputs

        def pipeline(body, context):
            def spec(height: int, bits: int):
                return plgpu.BlockSpec(
                    (height, tiles.inputs),
                    lambda step: (0, step),
                    transforms=_transforms(tiles.inputs, bits),
                    memory_space=plgpu.SMEM,
                )

            return plgpu.emit_pipeline_warp_specialized(
                body,
                grid=(inputs // tiles.inputs,),
                memory_registers=40,
                in_specs=[spec(block, 4), spec(tokens, 8)],
                wg_axis="wg",
                num_compute_wgs=2,
                max_concurrent_steps=tiles.steps,
                compute_context=context,
            )

        def nothing(*args, **kwargs):
            """Allocations do not depend on what the pipeline computes."""

        @functools.partial(
            pl.run_scoped,
            allocations=pipeline(nothing, nothing).get_allocations(w_gmem, x_gmem),
            collective_axes="wg",
        )
        def _(allocations):
            group = lax.axis_index("wg")

            @plgpu.nd_loop((grid[0] * grid[1],), collective_axes="block")
            def _(loop):
                # Neighbouring blocks share weights or tokens in the L2 cache.
                w_tile, x_tile = plgpu.planar_snake(loop.index[0], grid, 0, 8)
                own_rows = w_tile * block + group * WARPGROUP_ROWS

                def compute(run):
                    @functools.partial(
                        pl.run_scoped, sums=plgpu.ACC((WARPGROUP_ROWS, tokens), jnp.int32)
                    )
                    def _(sums):
                        run(sums)
                        shape = (WARPGROUP_ROWS, tokens)
                        x_scale = plgpu.load(  # pyrefly: ignore (jax 0.10's signature)
                            x_scale_gmem.at[pl.ds(x_tile * tokens, tokens)], optimized=False
                        )
                        w_scale = plgpu.load(  # pyrefly: ignore
                            w_scale_gmem.at[pl.ds(first_row + own_rows, WARPGROUP_ROWS)],
                            optimized=False,
                        )
                        out = sums[...].astype(jnp.float32)
                        out = out * lax.broadcast_in_dim(x_scale, shape, (1,))
                        out = out * lax.broadcast_in_dim(w_scale, shape, (0,))
                        store(out.astype(out_dtype))

                def store(out):
                    for part in range(tokens // edge):
                        target = out_smem.at[group, part % 2]
                        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                        piece = out[:, part * edge : (part + 1) * edge]
                        places = (
                            pl.ds(own_rows, WARPGROUP_ROWS),
                            pl.ds(x_tile * tokens + part * edge, edge),
                        )
                        if transposed:
                            target.transpose((1, 0))[...] = piece
                            places = places[::-1]
                        else:
                            target[...] = piece
                        plgpu.commit_smem()
                        plgpu.copy_smem_to_gmem(target, out_gmem.at[places])

                def multiply(_, w_smem, x_smem, sums):
                    for start in range(0, tiles.inputs, chunk):
                        columns = pl.ds(start, chunk)
                        own = pl.ds(group * WARPGROUP_ROWS, WARPGROUP_ROWS)
                        weights = w_smem.at[own, columns][...].astype(jnp.int8)
                        plgpu.wgmma(sums, weights, x_smem.at[:, columns].transpose((1, 0)))
                    plgpu.wgmma_wait(0)
                    return sums

                pipeline(multiply, compute)(
                    w_gmem.at[pl.ds(first_row + w_tile * block, block), :],
                    x_gmem.at[pl.ds(x_tile * tokens, tokens), :],
                    allocations=allocations,
                )

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    shape, tile = (outputs, rows), (WARPGROUP_ROWS, edge)
    if transposed:
        shape, tile = shape[::-1], tile[::-1]
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(shape, out_dtype),
        grid=(num_sms,),
        grid_names=("block",),
        num_threads=3,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        scratch_types={
            "out_smem": plgpu.SMEM(
                (2, 2, *tile),
                out_dtype,
                transforms=_transforms(tile[1], 8 * out_dtype.itemsize),
            )
        },
    )
