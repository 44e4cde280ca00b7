"""Quantization and token pruning put together in the ways that QUOTA compares (section 4.4).

A variant says on which execution the low-bit operators are calibrated, where the schedule comes
from, and what tokens are scored by. All variants share the source, the samples and the quantizer:

    variant              calibrated on         schedule                  scores
    full-precision       -                     -                         -
    quant-only           all tokens            -                         -
    prune-only           -                     equal drops               full precision
    quantize-then-prune  all tokens            equal drops               without the residual
    prune-then-quantize  the pruned model      equal drops               without the residual
    collaborative        all tokens            sensitivities (Eq. 1-4)   all four metrics (Eq. 8)
    co-calibrated        its own pruned        chosen on that execution, as are the metrics:
                         low-bit execution     see `co_calibration`

The paper does not say which schedule its stage-wise variants have, only that both use the recipe of
"the candidate layer set" and the metrics other than the residual; equal drops is our reading.
Co-calibrated is our extension.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from quota_jax.checkpoint import Checkpoint, open_checkpoint, set_recipe
from quota_jax.co_calibration import FirstRound, co_calibrate, deployed_sensitivities
from quota_jax.config import ModelConfig
from quota_jax.errors import QuotaError
from quota_jax.prune.allocator import Allocation, allocate, quota_recipe
from quota_jax.prune.presets import candidates
from quota_jax.prune.sensitivity import Sensitivities
from quota_jax.quant.calibrate import DATA_METHODS, Options, Report, calibrate
from quota_jax.quant.calibration_data import Sample, digest
from quota_jax.quantization import QuantizationConfig
from quota_jax.recipe import Recipe, Selector
from quota_jax.unfinished import unfinished

Graph = Literal["none", "whole", "pruned", "deployed"]
Schedule = Literal["none", "equal", "sensitivity"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """graph: what the quantizer is calibrated on ("deployed": the pruned low-bit execution itself).
    schedule: of the drops. residual: whether tokens are also scored by their quantization error."""

    graph: Graph = "none"
    schedule: Schedule = "none"
    residual: bool = False

    @property
    def quantized(self) -> bool:
        return self.graph != "none"

    @property
    def pruned(self) -> bool:
        return self.schedule != "none"


VARIANTS: dict[str, Variant] = {
    "full-precision": Variant(),
    "quant-only": Variant(graph="whole"),
    "prune-only": Variant(schedule="equal"),
    "quantize-then-prune": Variant(graph="whole", schedule="equal"),
    "prune-then-quantize": Variant(graph="pruned", schedule="equal"),
    "collaborative": Variant(graph="whole", schedule="sensitivity", residual=True),
    "co-calibrated": Variant(graph="deployed", schedule="sensitivity", residual=True),
}


@dataclass(frozen=True, kw_only=True)
class PipelineOptions:
    """keep: fraction of the visual tokens that is left (rho). quantization, options: as
    ``calibrate`` takes them. layers: candidate layers, None for the model's (``candidates``). tau:
    of Eq. 3. rounds: calibrations of the co-calibrated variant after its first, which sees all
    tokens."""

    keep: float = 0.3
    quantization: QuantizationConfig = field(
        default_factory=lambda: QuantizationConfig.parse("W4A4KV4", method="flatquant")
    )
    options: Options | None = None
    layers: tuple[int, ...] | None = None
    tau: float = 1.0
    rounds: int = 1

    def __post_init__(self):
        if not 0 <= self.keep <= 1:
            raise QuotaError(f"keep must lie in [0, 1], got {self.keep}")
        if self.rounds < 1:
            raise QuotaError(f"rounds must be at least 1, got {self.rounds}")


def selector(quantization: QuantizationConfig, *, residual: bool) -> Selector:
    """The composite score; the weight of the residual goes to the others where it is not used, or
    where the decoder's inputs are not quantized and there is none."""
    measured = quantization.quantizes("decoder") and quantization.activation_bits < 16
    if residual and measured:
        return Selector(name="quota")
    weights = Selector(name="quota").weights.without("residual")
    return Selector(name="quota", weights=weights)


def equal_recipe(config: ModelConfig, options: PipelineOptions, chosen: Selector) -> Recipe:
    """Equal drops at the candidate layers."""
    layers = options.layers or candidates(config)
    return quota_recipe(
        config.text.num_layers,
        layers,
        allocate([0.0] * len(layers), layers, options.keep).ratios,
        selector=chosen,
    )


def derived_recipe(
    config: ModelConfig, options: PipelineOptions, chosen: Selector, measured: Sensitivities
) -> tuple[Recipe, Allocation]:
    """QUOTA's schedule from sensitivities (Eq. 2-5)."""
    layers = options.layers or candidates(config)
    found = allocate(measured.at(layers), layers, options.keep, options.tau)
    recipe = quota_recipe(config.text.num_layers, layers, found.ratios, selector=chosen)
    return recipe, found


def build_variant(
    name: str,
    source: str | Path,
    out: str | Path,
    options: PipelineOptions,
    *,
    samples: Sequence[Sample] = (),
    first: FirstRound | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    report: Report | None = None,
) -> Path:
    """Makes the checkpoint of a variant, with its recipe and how that was derived.

    ``source`` is the full-precision checkpoint; its own recipe does not matter. Variants that
    change no weight are copies of it. ``out`` appears when all is done: a killed call leaves
    ``OUT.unfinished``, and the same call goes on there. ``first``: for the co-calibrated variant;
    the caller answers for its being what round 0 would make.

    Raises:
      QuotaError: unknown variant; a variant that the method cannot make, or that needs samples;
        ``out`` exists; anything that ``calibrate`` refuses.
    """
    if name not in VARIANTS:
        raise QuotaError(f"no variant {name!r}; known: {', '.join(VARIANTS)}")
    out, reference = Path(out), open_checkpoint(source)
    if not reference.quantization.is_none:
        raise QuotaError(
            f"{source} is already quantized ({reference.quantization.label}): a variant is made of "
            "the full-precision checkpoint"
        )
    check_variant(name, reference.config, options, samples)
    settings = {"source": reference.fingerprint, **variant_settings(name, options, samples)}
    with unfinished(out, settings) as place:
        _build(name, reference, place, options, samples, first, progress, report)
    return out


def variant_settings(
    name: str, options: PipelineOptions, samples: Sequence[Sample]
) -> dict[str, Any]:
    """JSON values that say what is asked for: work goes on only where they are the same."""
    learning = options.options
    return {
        "variant": name,
        "keep": options.keep,
        "layers": options.layers,
        "tau": options.tau,
        "rounds": options.rounds,
        "quantization": options.quantization.to_json(),
        "options": None if learning is None else dataclasses.asdict(learning),
        "samples": digest(samples),
    }


def check_variant(
    name: str, config: ModelConfig, options: PipelineOptions, samples: Sequence[Sample]
) -> None:
    """Refuses what would fail, or be another variant, before anything is made."""
    variant, quantization = VARIANTS[name], options.quantization
    if variant.quantized and quantization.is_none:
        raise QuotaError(f"variant {name!r}: {quantization.label} quantizes nothing")
    if variant.pruned:
        recipe = equal_recipe(config, options, selector(quantization, residual=False))
        if not recipe.canonical().stages:
            raise QuotaError(f"variant {name!r} with keep {options.keep:g} prunes nothing")
    if variant.schedule == "sensitivity" and not samples:
        raise QuotaError(f"variant {name!r} measures sensitivities: it needs calibration samples")
    if variant.graph == "pruned" and not _looks_at_data(quantization):
        raise QuotaError(
            f"variant {name!r} is quantize-then-prune with method {quantization.method!r}, which "
            "looks at no data"
        )
    if variant.graph == "deployed" and not hasattr(_defaults(quantization.method), "feed"):
        raise QuotaError(
            f"variant {name!r} needs a method whose blocks can be fed by quantized ones, not "
            f"{quantization.method!r}"
        )


def _build(
    name: str,
    reference: Checkpoint,
    place: Path,
    options: PipelineOptions,
    samples: Sequence[Sample],
    first: FirstRound | None,
    progress: Callable[[str, int, int], None] | None,
    report: Report | None,
) -> None:
    """Makes ``place``, of which an earlier call may have done a part."""
    variant, config, quantization = VARIANTS[name], reference.config, options.quantization
    chosen = selector(
        quantization if variant.quantized else QuantizationConfig.none, residual=variant.residual
    )
    recipe = Recipe.none(config.text.num_layers)
    if variant.pruned:
        recipe = equal_recipe(config, options, chosen)

    def made(place: Path, recipe: Recipe | None = None, feed: str | None = None) -> Path:
        if not place.exists():
            learning = options.options or _defaults(quantization.method)
            if feed is not None:
                learning = _with_feed(learning, feed)
            calibrate(
                reference.path,
                place,
                quantization,
                samples=samples if _looks_at_data(quantization) else (),
                options=learning,
                recipe=recipe,
                progress=progress,
                report=report,
            )
        return place

    if variant.graph == "deployed":
        if not place.exists():
            co_calibrate(
                reference,
                place,
                samples,
                options.rounds,
                equal=recipe,
                make=made,
                derive=lambda found: _schedule(config, options, chosen, found),
                first=first,
                progress=progress,
            )
        set_recipe(place, open_checkpoint(place).recipe, {"variant": name})
        return
    if variant.graph == "none":
        if not place.exists():
            copied = place.with_name("copy")
            shutil.rmtree(copied, ignore_errors=True)
            shutil.copytree(reference.path, copied)
            copied.rename(place)
    elif variant.graph == "whole":
        made(place)
    else:
        made(place, recipe)
    if variant.schedule == "sensitivity":
        _derive(name, reference, place, options, chosen, samples)
    else:
        set_recipe(place, recipe, {"variant": name})


def _derive(
    name: str,
    reference: Checkpoint,
    place: Path,
    options: PipelineOptions,
    chosen: Selector,
    samples: Sequence[Sample],
) -> None:
    """Measures sensitivities and stores the schedule that follows, unless that was done before."""
    quantized = open_checkpoint(place)
    if quantized.provenance.get("variant") == name:
        return
    measured = deployed_sensitivities(quantized, reference, samples)
    recipe, told = _schedule(quantized.config, options, chosen, measured)
    set_recipe(place, recipe, {"variant": name, "derivation": told})


def _schedule(
    config: ModelConfig, options: PipelineOptions, chosen: Selector, measured: Sensitivities
) -> tuple[Recipe, dict[str, Any]]:
    """The derived recipe, and what the checkpoint tells of it."""
    recipe, found = derived_recipe(config, options, chosen, measured)
    return recipe, {
        "rho": options.keep,
        "tau": options.tau,
        "allocation": dataclasses.asdict(found),
        "sensitivities": dataclasses.asdict(measured),
    }


def _looks_at_data(quantization: QuantizationConfig) -> bool:
    return quantization.method in DATA_METHODS or quantization.key_quantization == "channel"


def _defaults(method: str) -> Any:
    return DATA_METHODS[method]() if method in DATA_METHODS else None


def _with_feed(options: Any, feed: str) -> Any:
    """Options whose blocks read what ``feed`` says."""
    if hasattr(options, "flatquant"):
        return dataclasses.replace(
            options,
            flatquant=dataclasses.replace(options.flatquant, feed=feed),
            gptq=dataclasses.replace(options.gptq, feed=feed),
        )
    return dataclasses.replace(options, feed=feed)
