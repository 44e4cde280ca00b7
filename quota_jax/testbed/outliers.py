"""Outliers planted in a checkpoint: the same function, with activations that rounding cannot bear.

Large models have a few channels that are far larger than the others in every layer; the shipped
small models do not. Here a norm's output grows by a factor in some channels, and the weights that
read these channels shrink by it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from quota_jax.checkpoint import CheckpointWriter, open_checkpoint
from quota_jax.errors import QuotaError

CHANNELS = (3, 17)
FACTOR = 30.0
_READERS = {
    "norm1": ("attn.qkv",),
    "norm2": ("mlp.up", "mlp.gate_up"),
    "norm": ("linear_1",),
}
"""Which matrices read the output of a norm, by their names in a block."""


def plant_outliers(
    source: str | Path,
    out: str | Path,
    *,
    factor: float = FACTOR,
    channels: tuple[int, ...] = CHANNELS,
) -> Path:
    """Writes ``out``: ``source`` with ``channels`` of every norm's output ``factor`` times larger.

    The decoder's and the tower's blocks, and the norm of Qwen2.5-VL's merger. In exact arithmetic
    the model's outputs do not change.

    Raises:
      QuotaError: the source is quantized, or narrower than a channel asked for.
    """
    checkpoint = open_checkpoint(source)
    if not checkpoint.quantization.is_none:
        raise QuotaError(f"{source} is quantized: outliers are planted in full precision")
    with CheckpointWriter(
        out,
        config=checkpoint.config,
        quantization=checkpoint.quantization,
        recipe=checkpoint.recipe,
        provenance={**checkpoint.provenance, "outliers": {"factor": factor, "at": list(channels)}},
        assets={
            path.name: path.read_bytes()
            for path in sorted(Path(checkpoint.assets_dir).iterdir())
            if path.is_file()
        },
        fingerprint=f"{checkpoint.fingerprint} outliers {factor:g} {channels}",
        hf_config=checkpoint.hf_config,
        hf_layout=checkpoint.hf_layout,
    ) as writer:
        for name in checkpoint.block_names:
            if name in writer.finished:
                continue
            block = checkpoint.read_block(name)
            params = {key: np.array(value, np.float32) for key, value in block.items()}
            for key in params:
                path, _, norm = key.removesuffix(".scale").rpartition(".")
                planted = norm in ("norm1", "norm2") or path == "projector"
                if key.endswith(".scale") and norm in _READERS and planted:
                    _plant(params, path, norm, factor, channels)
            writer.write_block(name, {k: v.astype(block[k].dtype) for k, v in params.items()})
        writer.finish()
    return Path(out)


def _plant(
    params: dict[str, np.ndarray], path: str, norm: str, factor: float, channels: tuple[int, ...]
) -> None:
    """Scales one norm and what reads it, in place."""
    width = len(params[f"{path}.{norm}.scale"])
    for channel in channels:
        if not 0 <= channel < width:
            raise QuotaError(f"{path}.{norm} has {width} channels, no channel {channel}")
        for part in ("scale", "bias"):
            if (key := f"{path}.{norm}.{part}") in params:
                params[key][channel] *= factor
        for linear in _READERS[norm]:
            if (key := f"{path}.{linear}.weight") in params:
                # the merger reads several tokens side by side, each with all channels
                params[key][:, channel::width] /= factor
