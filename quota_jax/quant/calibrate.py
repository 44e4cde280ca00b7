"""Turns a full-precision checkpoint into a quantized one, block by block.

Each block is read, quantized and written before the next one, so peak host memory is a few blocks
(and, where a method learns from data, their activations), and a killed run resumes.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from quota_jax.checkpoint import Checkpoint, CheckpointWriter, open_checkpoint
from quota_jax.errors import QuotaError
from quota_jax.models.params import check_quantization
from quota_jax.processing import Processor
from quota_jax.quant.awq import AwqOptions
from quota_jax.quant.calibrate_awq import scaler, with_input_scales
from quota_jax.quant.calibrate_flatquant import BlockReport, FlatQuantOptions, learner
from quota_jax.quant.calibrate_gptq import after, rounder
from quota_jax.quant.calibrate_luq import layer_entropies, layer_rounder, with_layer_bits
from quota_jax.quant.calibration_data import CalibrationData, Sample, digest, make_batches
from quota_jax.quant.gptq import GptqOptions
from quota_jax.quant.key_ranges import key_ranger
from quota_jax.quant.luq import LuqOptions
from quota_jax.quant.rtn import quantize_params
from quota_jax.quant.smoothquant import SmoothQuantOptions, smoother
from quota_jax.quant.streaming import Transform, write_blocks
from quota_jax.quantization import QuantizationConfig
from quota_jax.recipe import Recipe

__all__ = ["calibrate", "quantize_params"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FlatQuantGptqOptions:
    """FlatQuant, then GPTQ on the transformed weights."""

    flatquant: FlatQuantOptions = dataclasses.field(default_factory=FlatQuantOptions)
    gptq: GptqOptions = dataclasses.field(default_factory=GptqOptions)

    @property
    def batch_size(self) -> int:
        return self.flatquant.batch_size

    @property
    def feed(self) -> str:
        return self.flatquant.feed


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RtnOptions:
    """Round-to-nearest with keys by channel, whose ranges are measured on ``batch_size`` samples at
    a time."""

    batch_size: int = 4


Options = (
    FlatQuantOptions
    | SmoothQuantOptions
    | GptqOptions
    | FlatQuantGptqOptions
    | AwqOptions
    | LuqOptions
    | RtnOptions
)
Report = Callable[[BlockReport], None]
DATA_METHODS: dict[str, Any] = {
    "flatquant": FlatQuantOptions,
    "smoothquant": SmoothQuantOptions,
    "gptq": GptqOptions,
    "flatquant+gptq": FlatQuantGptqOptions,
    "awq": AwqOptions,
    "luq": LuqOptions,
}
"""Methods that need samples, and their options."""


def calibrate(
    source: str | Path,
    out: str | Path,
    quantization: QuantizationConfig,
    *,
    samples: Sequence[Sample] = (),
    options: Options | None = None,
    recipe: Recipe | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    report: Report | None = None,
) -> Path:
    """Writes the quantized twin of checkpoint ``source`` to ``out``; resumes a killed run.

    Args:
      samples: what all methods but round-to-nearest look at, and keys by channel.
      options: of the method, where it has some; None takes the defaults.
      recipe: tokens that it drops no later block is calibrated on; it is stored with the result.
        None calibrates on all tokens and stores the source's recipe.
      progress: called with (block name, blocks done, blocks in all) after each block.
      report: called with the losses of each block: before and after FlatQuant's training; of
        round-to-nearest and of GPTQ or AWQ.

    Raises:
      QuotaError: ``source`` is already quantized, the configuration changes nothing, or the
        samples do not suit the model.
    """
    checkpoint = open_checkpoint(source)
    if not checkpoint.quantization.is_none:
        raise QuotaError(
            f"{source} is already quantized ({checkpoint.quantization.label}): calibrate the "
            "full-precision checkpoint"
        )
    if quantization.is_none:
        raise QuotaError(f"{quantization.label} quantizes nothing")
    if quantization.method != "rtn" and quantization.method not in DATA_METHODS:
        raise QuotaError(f"method {quantization.method!r} is not one that calibrates")
    if quantization.groups is not None and quantization.scale_dtype is None:
        # Half of the bytes for a 16-bit model, and the dtype in which other programs read them.
        quantization = dataclasses.replace(quantization, scale_dtype=checkpoint.dtype.name)
    if quantization.method == "awq":
        quantization = with_input_scales(quantization, checkpoint.config)
    by_channel = quantization.key_quantization == "channel"
    if quantization.has_transforms:
        options = _options(quantization.method, options)
        learning = getattr(options, "flatquant", options)
        assert isinstance(learning, FlatQuantOptions)
        quantization = learning.configure(quantization)
    check_quantization(checkpoint.config, quantization)
    told: dict[str, object] = {"method": quantization.method}
    found: dict[str, object] = {}
    learn = None
    if quantization.method in DATA_METHODS or by_channel:
        if not samples:
            known = quantization.method in DATA_METHODS
            needs = f"method {quantization.method!r} needs" if known else "keys by channel need"
            raise QuotaError(f"{needs} calibration samples")
        options = _options(quantization.method, options)
        processor = Processor.from_folder(checkpoint.assets_dir, checkpoint.config)
        data = make_batches(processor, samples, options.batch_size)
        if quantization.method in DATA_METHODS:
            data.check(quantization)
        told |= {"options": dataclasses.asdict(options), "samples": len(samples)}
        told["data"] = digest(samples)
        if recipe is not None:
            told["recipe"] = recipe.to_json()
        if isinstance(options, LuqOptions) and not quantization.layer_bits:
            entropies = layer_entropies(checkpoint, data, options, progress)
            quantization = with_layer_bits(quantization, entropies, options)
            found["entropies"] = entropies
        transform = _transform(data, quantization, options, report)
        if by_channel:
            transform = after(key_ranger(data), transform)
        learn = functools.partial(
            write_blocks,
            batches=data.batches,
            quantization=quantization,
            transform=transform,
            feed=getattr(options, "feed", "full"),
            recipe=recipe,
        )
    with CheckpointWriter(
        out,
        config=checkpoint.config,
        quantization=quantization,
        recipe=recipe or checkpoint.recipe,
        provenance={**checkpoint.provenance, "calibration": told | found},
        assets=_assets(checkpoint),
        fingerprint=_fingerprint(checkpoint, quantization, told),
        hf_config=checkpoint.hf_config,
        hf_layout=checkpoint.hf_layout,
    ) as writer:
        if learn is not None:
            learn(checkpoint, writer, progress=progress)
        else:
            _round(checkpoint, writer, quantization, progress)
        writer.finish()
    return Path(out)


def _transform(
    data: CalibrationData,
    quantization: QuantizationConfig,
    options: Options,
    report: Report | None,
) -> Transform:
    """What a method does to each block."""

    def report_gptq(found: BlockReport) -> None:
        if report:
            report(dataclasses.replace(found, name=f"{found.name} gptq"))

    match options:
        case FlatQuantOptions():
            return learner(data, quantization, options, report)
        case FlatQuantGptqOptions(flatquant=learning, gptq=rounding):
            return after(
                learner(data, quantization, learning, report),
                rounder(data, quantization, rounding, report_gptq if report else None),
            )
        case GptqOptions():
            return rounder(data, quantization, options, report)
        case AwqOptions():
            return scaler(data, quantization, options, report)
        case LuqOptions():
            return layer_rounder(data, quantization, options, report)
        case SmoothQuantOptions():
            return smoother(data, quantization, options)
        case RtnOptions():
            return lambda name, block, stored, inputs, outputs: stored


def _options(method: str, options: Options | None) -> Options:
    kind = DATA_METHODS.get(method, RtnOptions)
    if options is not None and not isinstance(options, kind):
        raise QuotaError(f"method {method!r} takes {kind.__name__}, not {type(options).__name__}")
    return options or kind()


def _round(
    checkpoint: Checkpoint,
    writer: CheckpointWriter,
    quantization: QuantizationConfig,
    progress: Callable[[str, int, int], None] | None,
) -> None:
    names = list(checkpoint.block_names)
    for done, name in enumerate(names, start=1):
        if name not in writer.finished:
            writer.write_block(name, quantize_params(checkpoint.read_block(name), quantization))
        if progress:
            progress(name, done, len(names))


def _assets(checkpoint: Checkpoint) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in sorted(Path(checkpoint.assets_dir).iterdir())
        if path.is_file()
    }


def _fingerprint(
    checkpoint: Checkpoint, quantization: QuantizationConfig, told: dict[str, object]
) -> str:
    identity = [checkpoint.fingerprint, quantization.to_json()]
    if quantization.method != "rtn" or quantization.key_quantization == "channel":
        identity.append(told)
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
