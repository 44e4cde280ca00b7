"""Turns a full-precision checkpoint into a quantized one, block by block.

Round-to-nearest needs no data: each block is read, quantized and written before the next one, so
peak host memory is a few blocks, and a killed run resumes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from pallas_kernels.packing import pack_int4
from quota_jax.checkpoint import Checkpoint, CheckpointWriter, open_checkpoint
from quota_jax.errors import QuotaError
from quota_jax.models.params import LINEARS
from quota_jax.quant.quantizers import quantize_weight
from quota_jax.quantization import QuantizationConfig


def quantize_params(
    params: Mapping[str, np.ndarray], quantization: QuantizationConfig
) -> dict[str, np.ndarray]:
    """Rounds the linears of the quantized modules to nearest; everything else passes through.

    Works on stacked parameters and on single blocks alike: scales are per output channel.
    """
    out: dict[str, np.ndarray] = {}
    for name, value in params.items():
        parts = name.split(".")
        if (
            parts[-1] != "weight"
            or parts[-2] not in LINEARS
            or not quantization.quantizes(parts[0])
        ):
            out[name] = value
            continue
        stem = name.removesuffix("weight")
        if quantization.weight_bits == 4 and value.shape[-1] % 2:
            raise QuotaError(f"{name}: cannot pack an odd number of inputs ({value.shape[-1]})")
        codes, scale = quantize_weight(jnp.asarray(value), quantization.weight_bits)
        if quantization.weight_bits == 4:
            out[stem + "packed"] = np.asarray(pack_int4(codes))
        else:
            out[stem + "codes"] = np.asarray(codes)
        out[stem + "scale"] = np.asarray(scale)
    return out


def calibrate(
    source: str | Path,
    out: str | Path,
    quantization: QuantizationConfig,
    *,
    progress: Callable[[str, int, int], None] | None = None,
) -> Path:
    """Writes the quantized twin of checkpoint ``source`` to ``out``; resumes a killed run.

    Args:
      progress: called with (block name, blocks done, blocks in all) after each block.

    Raises:
      QuotaError: ``source`` is already quantized, or the configuration changes nothing.
    """
    checkpoint = open_checkpoint(source)
    if not checkpoint.quantization.is_none:
        raise QuotaError(
            f"{source} is already quantized ({checkpoint.quantization.label}): calibrate the "
            "full-precision checkpoint"
        )
    if quantization.is_none:
        raise QuotaError(f"{quantization.label} quantizes nothing")
    with CheckpointWriter(
        out,
        config=checkpoint.config,
        quantization=quantization,
        recipe=checkpoint.recipe,
        provenance={**checkpoint.provenance, "calibration": {"method": quantization.method}},
        assets=_assets(checkpoint),
        fingerprint=_fingerprint(checkpoint, quantization),
        hf_config=checkpoint.hf_config,
        hf_layout=checkpoint.hf_layout,
    ) as writer:
        names = list(checkpoint.block_names)
        for done, name in enumerate(names, start=1):
            if name not in writer.finished:
                writer.write_block(name, quantize_params(checkpoint.read_block(name), quantization))
            if progress:
                progress(name, done, len(names))
        writer.finish()
    return Path(out)


def _assets(checkpoint: Checkpoint) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in sorted(Path(checkpoint.assets_dir).iterdir())
        if path.is_file()
    }


def _fingerprint(checkpoint: Checkpoint, quantization: QuantizationConfig) -> str:
    text = json.dumps([checkpoint.fingerprint, quantization.to_json()], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
