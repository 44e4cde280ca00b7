"""Hopper tensor-core matmul: int4 weights unpacked in registers, int8 tokens, int32 sums.

The product is computed as ``W x^T``, so that the weights are the operand that wgmma takes from
registers: a warpgroup reads its int4 tile from shared memory, widens it to int8 and multiplies.
Tokens stay in shared memory, read transposed. The epilogue scales in registers and writes tiles of
16-bit values transposed, so the result is ``[M, N]`` without a pass of its own; for float32 there
is no such store, and XLA transposes. One warpgroup loads, two compute.

Few tokens and few outputs would leave most multiprocessors without a block. Then the inputs are
split too: each block writes the int32 sums of its part, and XLA adds the parts, scales and
transposes in one fusion. Integer sums are exact in any order, so the result is the same.

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
ROUND_US = {256: 28.0, 128: 18.0, 64: 13.5}
"""Measured microseconds of one block of so many tokens over 4096 inputs, all multiprocessors
busy."""
SPLIT_ROWS = 64
"""Up to so many tokens a product is bound by reading its weights, and may be split."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiles:
    """Tokens and inputs per step of a block, how many steps are loaded ahead, and into how many
    parts the inputs are split (the last one may stick out: zeros are loaded there)."""

    tokens: int
    inputs: int
    steps: int
    splits: int = 1

    @classmethod
    def of(cls, rows: int, outputs: int, inputs: int, num_sms: int = H100_SMS) -> Tiles:
        """The measured choice.

        Few tokens are bound by memory and want long, deep loads from all multiprocessors. Many are
        bound by tensor cores, which larger tiles feed better, unless fewer of them fill the last
        round of the multiprocessors badly.
        """
        blocks, even = outputs // (2 * WARPGROUP_ROWS), inputs % 256 == 0
        if rows > 128:

            def cost(tokens: int) -> float:
                return -(-blocks * -(-rows // tokens) // num_sms) * ROUND_US[tokens]

            tokens = min(ROUND_US, key=cost)
            wide = 256 if even and tokens < 256 else 128
            return cls(tokens=tokens, inputs=wide, steps=4)
        tokens = max(8, 1 << (rows - 1).bit_length())
        wide = 256 if even and tokens <= 64 else 128
        steps = 6 if wide == 256 and tokens <= 32 else 4
        splits = 1
        if rows <= SPLIT_ROWS:
            # Every part has at least as many steps as are loaded ahead.
            splits = max(1, min(num_sms // blocks, inputs // wide // steps))
        return cls(tokens=tokens, inputs=wide, steps=steps, splits=splits)


def int4_matmul_mosaic(
    x: Int[Array, "M K"],
    x_scale: Float[Array, " M"],
    packed: UInt8[Array, "L N bytes"],
    scale: Float[Array, "L N"],
    layer: Int[Array, ""],
    bias: Float[Array, "L N"] | None = None,
    *,
    out_dtype: Any,
    tiles: Tiles | None = None,
) -> Float[Array, "M N"]:
    """See ``pallas_kernels.int4_matmul.int4_matmul``; ``N`` and ``K`` are multiples of 128."""
    rows, inputs = x.shape
    depth, outputs, _ = packed.shape
    gpu = find_gpu()
    num_sms = gpu.num_sms if gpu else H100_SMS
    tiles = tiles or Tiles.of(rows, outputs, inputs, num_sms)
    written = jnp.dtype(jnp.int32 if tiles.splits > 1 else out_dtype)
    # The copy engine cuts tiles that stick out, but wants whole groups of rows: 8, or the 32
    # columns of a swizzled row of 32-bit values.
    unit = 8 if _transposes(written) or rows <= 8 else 32
    padded = -(-rows // unit) * unit
    whole = -(-rows // tiles.tokens) * tiles.tokens
    # The nibble order is that of jnp.int4: a view, no work (measured: 0 bytes of temporaries).
    weights = lax.bitcast_convert_type(packed, jnp.int4).reshape(depth * outputs, inputs)
    call = _kernel(
        outputs=outputs,
        rows=padded,
        inputs=inputs,
        tiles=tiles,
        out_dtype=written,
        num_sms=num_sms,
        biased=bias is not None and tiles.splits == 1,
    )
    scale, x_scale = scale.astype(jnp.float32), x_scale.astype(jnp.float32)

    def own(stack):
        return lax.dynamic_index_in_dim(stack, layer, keepdims=False).astype(jnp.float32)

    out = call(
        weights,
        jnp.pad(x.astype(jnp.int8), ((0, padded - rows), (0, 0))),
        scale.reshape(-1),
        (scale if bias is None else bias).reshape(-1),
        # Space for whole tiles; what stands beyond the rows is not used.
        jnp.pad(x_scale, (0, max(0, whole - x_scale.shape[0]))),
        layer.reshape(1),
    )
    if tiles.splits == 1:
        return out[:rows] if _transposes(out_dtype) else out[:, :rows].T
    sums = out.reshape(tiles.splits, outputs, padded).sum(0)[:, :rows].T.astype(jnp.float32)
    scaled = sums * x_scale[:rows, None] * own(scale)
    return (scaled if bias is None else scaled + own(bias)).astype(out_dtype)


def _transposes(dtype: Any) -> bool:
    """Registers of 16-bit values can be stored transposed."""
    return jnp.dtype(dtype).itemsize == 2


def _transforms(columns: int, bits: int) -> tuple[Any, ...]:
    """Tiling and swizzle of a shared-memory tile with ``columns`` values in a row."""
    swizzle = plgpu.find_swizzle(columns * bits)
    return plgpu.TilingTransform((8, swizzle * 8 // bits)), plgpu.SwizzleTransform(swizzle)


def _kernel(
    *,
    outputs: int,
    rows: int,
    inputs: int,
    tiles: Tiles,
    out_dtype: Any,
    num_sms: int,
    biased: bool,
) -> Any:
    block = 2 * WARPGROUP_ROWS
    tokens = tiles.tokens
    edge = min(EPILOGUE, tokens)
    steps = pl.cdiv(inputs // tiles.inputs, tiles.splits)
    # The parts of the inputs come as further rows of the output, one below the other.
    grid = tiles.splits * outputs // block, pl.cdiv(rows, tokens)
    chunk = min(tiles.inputs, 256)  # values of a swizzle row of int4
    transposed = _transposes(out_dtype)

    def kernel(
        w_gmem, x_gmem, w_scale_gmem, bias_gmem, x_scale_gmem, layer_gmem, out_gmem, out_smem
    ):
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
                grid=(steps,),
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
                weight_rows, columns = first_row + w_tile * block, slice(None)
                if tiles.splits > 1:
                    part = lax.div(w_tile, outputs // block)
                    weight_rows = first_row + w_tile * block - part * outputs
                    columns = pl.ds(part * (steps * tiles.inputs), steps * tiles.inputs)

                def compute(run):
                    @functools.partial(
                        pl.run_scoped, sums=plgpu.ACC((WARPGROUP_ROWS, tokens), jnp.int32)
                    )
                    def _(sums):
                        run(sums)
                        store(sums[...] if tiles.splits > 1 else scaled(sums[...]))

                def scaled(sums):
                    def along(axis, ref, start, size):
                        vector = plgpu.load(  # pyrefly: ignore (jax 0.10's signature)
                            ref.at[pl.ds(start, size)], optimized=False
                        )
                        wide = vector.astype(jnp.float32)
                        return lax.broadcast_in_dim(wide, (WARPGROUP_ROWS, tokens), (axis,))

                    first = first_row + own_rows
                    out = sums.astype(jnp.float32)
                    out = out * along(1, x_scale_gmem, x_tile * tokens, tokens)
                    out = out * along(0, w_scale_gmem, first, WARPGROUP_ROWS)
                    if biased:
                        out = out + along(0, bias_gmem, first, WARPGROUP_ROWS)
                    return out.astype(out_dtype)

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
                        values = pl.ds(start, chunk)
                        own = pl.ds(group * WARPGROUP_ROWS, WARPGROUP_ROWS)
                        weights = w_smem.at[own, values][...].astype(jnp.int8)
                        plgpu.wgmma(sums, weights, x_smem.at[:, values].transpose((1, 0)))
                    plgpu.wgmma_wait(0)
                    return sums

                pipeline(multiply, compute)(
                    w_gmem.at[pl.ds(weight_rows, block), columns],
                    x_gmem.at[pl.ds(x_tile * tokens, tokens), columns],
                    allocations=allocations,
                )

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    shape, tile = (tiles.splits * outputs, rows), (WARPGROUP_ROWS, edge)
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
