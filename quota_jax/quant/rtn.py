"""Round-to-nearest: the linears of the quantized modules to integers and scales."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels.packing import pack_int4
from quota_jax.errors import QuotaError
from quota_jax.models.params import LINEARS
from quota_jax.nn.vocabulary import quantize_table
from quota_jax.quant.quantizers import quantize_weight
from quota_jax.quantization import QuantizationConfig


def quantize_params(
    params: Mapping[str, np.ndarray], quantization: QuantizationConfig
) -> dict[str, np.ndarray]:
    """Rounds the linears of the quantized modules to nearest, and token embeddings and head where
    they have 8 bits; everything else passes through.

    Works on stacked parameters and on single blocks alike: scales belong to output channels.
    """
    out: dict[str, np.ndarray] = {}
    for name, value in params.items():
        parts = name.split(".")
        stem = name.removesuffix(".weight")
        if stem != name and quantization.table_bits.get(stem) == 8:
            out[f"{stem}.codes"], out[f"{stem}.scale"] = quantize_table(np.asarray(value))
            continue
        if (
            parts[-1] != "weight"
            or parts[-2] not in LINEARS
            or not quantization.quantizes(parts[0])
        ):
            out[name] = value
            continue
        if quantization.packs and value.shape[-1] % 2:
            raise QuotaError(f"{name}: cannot pack an odd number of inputs ({value.shape[-1]})")
        zeros = None
        if quantization.groups is None:
            codes, scale = quantize_weight(jnp.asarray(value), quantization.weight_bits)
        else:
            codes, scale, zeros = quantization.groups.quantize(jnp.asarray(value))
        bits = quantization.weight_bits
        out |= stored_codes(stem, bits, codes, scale, zeros)
    return out


def stored_codes(
    name: str, bits: int, codes: Any, scale: Any, zeros: Any = None
) -> dict[str, np.ndarray]:
    """The parameters of the quantized linear ``name``, as a checkpoint holds them."""
    found = {"packed": pack_int4(codes)} if bits <= 4 else {"codes": codes}
    found["scale"] = scale
    if zeros is not None:
        found["zeros"] = zeros
    return {f"{name}.{part}": np.asarray(value) for part, value in found.items()}
