"""Second moments of the inputs of a block's linears, over real rows only (GPTQ, AWQ)."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from quota_jax.batch import Batch
from quota_jax.nn.linear import Linear, observed
from quota_jax.quant.blocks import Block, Params, partial_model
from quota_jax.quant.quantizers import quantize_activation
from quota_jax.quantization import QuantizationConfig


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Moments:
    """Sums over rows x: ``second`` of the products ``x^T x``, ``absolute`` of ``|x|``; float32."""

    second: Float[Array, "K K"]
    absolute: Float[Array, " K"]
    count: Float[Array, ""]


def moments(
    block: Block,
    params: Params,
    inputs: list[np.ndarray],
    batches: list[Batch],
    masks: list[Array],
    linears: tuple[str, ...],
    quantization: QuantizationConfig = QuantizationConfig.none,
) -> dict[str, Moments]:
    """Of the inputs that each linear multiplies by its weight: transformed, and quantized where
    ``quantization`` quantizes activations. The block runs under ``quantization``.

    Args:
      masks: which rows of each batch's block output are real; others count for nothing.
    """
    width = {name: params[f"{name}.weight"].shape[-1] for name in linears}
    sums = {
        name: Moments(
            second=jnp.zeros((k, k), jnp.float32),
            absolute=jnp.zeros((k,), jnp.float32),
            count=jnp.zeros((), jnp.float32),
        )
        for name, k in width.items()
    }
    for x, batch, mask in zip(inputs, batches, masks, strict=True):
        sums = _add(sums, params, x, batch, mask, block=block, quantization=quantization)
    return sums


@functools.partial(jax.jit, static_argnames=("block", "quantization"), donate_argnums=0)
def _add(sums: Mapping[str, Moments], params, x, batch, mask, *, block, quantization):
    model = partial_model(block.config, quantization, params)
    names = {id(functools.reduce(getattr, name.split("."), model)): name for name in sums}
    found = {}

    def record(linear: Linear, rows: Array) -> None:
        if (name := names.get(id(linear))) is None:
            return
        layer = 0 if linear.weight[...].ndim == 3 else None
        rows = linear.transformed(rows, layer).astype(jnp.float32)
        if linear.activation_bits < 16:
            codes, scale = quantize_activation(rows, linear.activation_bits, linear.clipping(layer))
            rows = codes.astype(jnp.float32) * scale[:, None]
        real = mask.reshape(-1, 1)
        rows, before = jnp.where(real, rows, 0), sums[name]
        found[name] = Moments(
            second=before.second + jnp.matmul(rows.T, rows, precision="highest"),
            absolute=before.absolute + jnp.abs(rows).sum(0),
            count=before.count + real.sum(),
        )

    with observed(record):
        block.run(model, x, batch)
    return found
