"""AWQ block by block: where each linear's scales go, and folding them.

The inverse of a linear's scale goes into what feeds it: a norm's scale and bias (q/k/v, gate/up,
Qwen's merger, whose norm feeds several tokens side by side and so has one scale for all of them),
the rows of v before the output projection (query heads that share a value head share its scale), or
the rows of up before a gated down. Where an activation function or nothing of the kind stands
before a linear (down of CLIP, LLaVA's projector, the last linear of Qwen's merger) the linear keeps
it as ``input_scale`` and multiplies its input by it. All is folded in float64.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from quota_jax.config import ModelConfig
from quota_jax.models.shapes import parameter_shapes
from quota_jax.quant.awq import AwqOptions, clip_groups, search_scale
from quota_jax.quant.blocks import Block
from quota_jax.quant.calibrate_flatquant import BlockReport
from quota_jax.quant.calibrate_gptq import block_error
from quota_jax.quant.calibration_data import CalibrationData
from quota_jax.quant.folding import Site, find_sites
from quota_jax.quant.groups import Groups
from quota_jax.quant.moments import Moments, moments
from quota_jax.quant.rtn import quantize_params
from quota_jax.quant.streaming import Transform
from quota_jax.quantization import QuantizationConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Destination:
    """What takes the inverse of a linear's scale: a norm, or rows of a linear; "" for neither.

    shape: the linear's channels with those that share a scale on the middle axis; the others, in
    order, are the channels of the norm or the rows from ``first`` on.
    """

    stem: str = ""
    first: int = 0
    shape: tuple[int, int, int]


def destination(site: Site, params: Mapping[str, Any], config: ModelConfig) -> Destination:
    """Where the scale of a site's linear goes."""
    columns = params[f"{site.linear}.weight"].shape[-1]
    alone = (1, 1, columns)
    if site.norm:
        width = params[f"{site.norm}.scale"].shape[-1]
        return Destination(stem=site.norm, shape=(1, columns // width, width))
    if site.gated:
        return Destination(stem=site.gated, first=columns, shape=alone)
    if site.linear.endswith(".attn.o"):
        part = config.text if site.linear.startswith("decoder") else config.vision
        heads, kept = part.num_heads, getattr(part, "num_kv_heads", part.num_heads)
        return Destination(
            stem=f"{site.linear.removesuffix('.o')}.qkv",
            first=(heads + kept) * part.head_dim,
            shape=(kept, heads // kept, part.head_dim),
        )
    return Destination(shape=alone)


def with_input_scales(quantization: QuantizationConfig, config: ModelConfig) -> QuantizationConfig:
    """The configuration that AWQ writes: it names the linears that keep their scale."""
    specs = {
        name: np.broadcast_to(np.float32(0), shape)
        for name, shape in parameter_shapes(config).items()
    }
    kept = tuple(
        site.linear
        for site in find_sites(specs, quantization)
        if not destination(site, specs, config).stem
    )
    return dataclasses.replace(quantization, input_scales=kept)


def scaler(
    data: CalibrationData,
    quantization: QuantizationConfig,
    options: AwqOptions,
    report: Callable[[BlockReport], None] | None = None,
) -> Transform:
    """What ``write_blocks`` does to each block. The report compares with round-to-nearest."""

    def transform(name, block, stored, inputs, outputs):
        sites = find_sites(stored, quantization)
        seen: dict[str, Moments] = {}
        if inputs:
            params = {key: jnp.asarray(value, jnp.float32) for key, value in stored.items()}
            linears = tuple(site.linear for site in sites)
            masks = data.masks(block)
            seen = moments(block, params, inputs, data.batches, masks, linears)
        found = scaled(stored, sites, seen, block, quantization, options)
        if report and inputs:
            plain = dataclasses.replace(quantization, input_scales=())
            report(
                BlockReport(
                    name=name,
                    first_loss=block_error(
                        block, quantize_params(stored, plain), inputs, outputs, data, plain
                    ),
                    last_loss=block_error(
                        block,
                        quantize_params(found, quantization),
                        inputs,
                        outputs,
                        data,
                        quantization,
                    ),
                )
            )
        return found

    return transform


def scaled(
    stored: Mapping[str, np.ndarray],
    sites: tuple[Site, ...],
    seen: Mapping[str, Moments],
    block: Block,
    quantization: QuantizationConfig,
    options: AwqOptions,
) -> dict[str, np.ndarray]:
    """The block's parameters, scaled and clipped; what changed is float32.

    A linear that ``seen`` lacks keeps its weight, with a scale of ones where it stores one.
    """
    grid, config = quantization.grid, block.config
    wide = {name: np.asarray(value, np.float64) for name, value in stored.items()}
    whole = dict(wide)
    scales = {}
    for site in sites:
        key, target = f"{site.linear}.weight", destination(site, stored, config)
        scale = np.ones(stored[key].shape[1])
        if (known := seen.get(site.linear)) is not None:
            found = search_scale(
                jnp.asarray(stored[key], jnp.float32),
                known.second,
                known.absolute / jnp.maximum(known.count, 1),
                grid=grid,
                shape=target.shape,
                options=options,
            )
            scale = np.asarray(found, np.float64)
            whole[key] = whole[key] * scale
            scales[site.linear] = scale
        if not target.stem:
            whole[f"{site.linear}.input_scale"] = 1 / scale
        elif site.linear in seen:
            _divide(whole, target, scale)
    for linear, scale in scales.items():
        whole[f"{linear}.weight"] = _clipped(
            whole[f"{linear}.weight"], linear, seen[linear].second, scale, block, grid, options
        )
    return {
        name: stored[name] if value is wide.get(name) else value.astype(np.float32)
        for name, value in whole.items()
    }


def _divide(params: dict[str, np.ndarray], target: Destination, scale: np.ndarray) -> None:
    """What feeds a linear takes the inverse of its scale."""
    channels = scale.reshape(target.shape)[:, 0].reshape(-1)
    rows = slice(target.first, target.first + len(channels))
    for part in ("weight", "scale", "bias"):
        if (name := f"{target.stem}.{part}") in params:
            value = params[name].copy()
            value[rows] /= channels[:, None] if value.ndim == 2 else channels
            params[name] = value


def _clipped(
    weight: np.ndarray,
    linear: str,
    second: Any,
    scale: np.ndarray,
    block: Block,
    grid: Groups,
    options: AwqOptions,
) -> np.ndarray:
    """A scaled weight with its groups clipped; queries and keys are left alone, as by the authors:
    their product with each other is what matters, not their own error."""
    start = 0
    if linear.endswith(".attn.qkv"):
        part = block.config.text if block.kind == "decoder" else block.config.vision
        heads = part.num_heads + getattr(part, "num_kv_heads", part.num_heads)
        start = heads * part.head_dim
    shrunk = jnp.asarray(1 / scale, jnp.float32)
    rows = clip_groups(
        jnp.asarray(weight[start:], jnp.float32),
        second * shrunk * shrunk[:, None],
        grid=grid,
        options=options,
    )
    return np.concatenate([weight[:start], np.asarray(rows, np.float64)])
