"""Options of ``calibrate`` that make a variant of quantization and pruning in one call."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from quota_jax.cli.console import converters
from quota_jax.errors import QuotaError

if TYPE_CHECKING:
    from quota_jax.pipeline import PipelineOptions, Variant
    from quota_jax.quant.calibrate import Options, Report
    from quota_jax.quant.calibration_data import Sample
    from quota_jax.quantization import QuantizationConfig


@dataclass(frozen=True, kw_only=True)
class VariantOptions:
    """Which variant, and how much it prunes."""

    variant: (
        Literal[
            "full-precision",
            "quant-only",
            "prune-only",
            "quantize-then-prune",
            "prune-then-quantize",
            "collaborative",
            "co-calibrated",
        ]
        | None
    ) = None
    """quant-only, prune-only; quantize-then-prune: calibrated on all tokens, equal drops;
    prune-then-quantize: calibrated on the pruned model; collaborative (QUOTA): drops by measured
    sensitivities, tokens also scored by their quantization error; co-calibrated (ours):
    calibrated on the tokens that the quantized model keeps, by the drops and metrics that bring its
    answers to the samples nearest to full precision. full-precision is a copy."""
    keep: float | None = None
    """With --variant: fraction of the visual tokens that is left; default 0.3."""
    layers: tuple[int, ...] = ()
    """With --variant: decoder layers that drop tokens, from 0; default the paper's, or their like
    in a less deep decoder."""
    tau: float | None = None
    """With --variant: temperature of the allocation; the higher, the more alike the drops. Default
    1."""
    rounds: int | None = None
    """With --variant co-calibrated: calibrations on the pruned model, after one on all tokens; the
    best is kept. Default 1."""

    @property
    def chosen(self) -> Variant | None:
        """What the variant does."""
        from quota_jax.pipeline import VARIANTS

        return None if self.variant is None else VARIANTS[self.variant]

    @property
    def measures(self) -> bool:
        """Whether sensitivities are measured, so that samples are needed whatever the method."""
        return self.chosen is not None and self.chosen.schedule == "sensitivity"

    def check(self) -> None:
        """Refuses options that nothing would read."""
        own = {field.name for field in dataclasses.fields(VariantOptions)} - {"variant"}
        given = [
            field.name
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
            and field.default is not dataclasses.MISSING
        ]
        if self.variant is None:
            useless = [name for name in given if name in own]
            if useless:
                raise QuotaError(f"{_option(useless[0])} belongs to --variant")
            return
        variant = self.chosen
        assert variant is not None
        read = {
            "keep": variant.pruned,
            "layers": variant.pruned,
            "tau": variant.schedule == "sensitivity",
            "rounds": variant.graph == "deployed",
        }
        for name in given:
            if name != "variant" and not read.get(name, variant.quantized):
                raise QuotaError(f"{_option(name)} is of no use to --variant {self.variant}")

    def pipeline(
        self, quantization: QuantizationConfig, options: Options | None
    ) -> PipelineOptions:
        """The options as ``build_variant`` takes them."""
        from quota_jax.pipeline import PipelineOptions

        given = {
            name: value
            for name in ("keep", "tau", "rounds")
            if (value := getattr(self, name)) is not None
        }
        return PipelineOptions(
            quantization=quantization, options=options, layers=self.layers or None, **given
        )

    def build(
        self,
        source: Path,
        out: Path,
        options: PipelineOptions,
        samples: Sequence[Sample],
        step: Callable[[int, int, str], None],
        report: Report,
    ) -> None:
        """Makes the variant of a checkpoint, or of a Hugging Face folder, which is converted into
        OUT.unfinished and goes with it."""
        from quota_jax.pipeline import build_variant, check_variant, variant_settings
        from quota_jax.unfinished import unfinished

        name = self.variant
        assert name is not None

        def make(source: Path, out: Path) -> None:
            build_variant(
                name,
                source,
                out,
                options,
                samples=samples,
                progress=lambda block, done, total: step(done, total, block),
                report=report,
            )

        if not is_hugging_face(source):
            make(source, out)
            return
        from quota_jax.config import config_from_hf
        from quota_jax.processing.hugging_face import read_json

        told = read_json(source / "config.json") or {}
        if "quantization_config" in told:
            raise QuotaError(
                f"{source} is already quantized: a variant is made of a full-precision model"
            )
        check_variant(name, config_from_hf(told), options, samples)
        files = [(path, path.stat()) for path in sorted(source.iterdir()) if path.is_file()]
        settings = {
            "source": str(source.resolve()),
            "files": {path.name: [stat.st_size, stat.st_mtime_ns] for path, stat in files},
            **variant_settings(name, options, samples),
        }
        with unfinished(out, settings) as place:
            full = place.with_name("source")
            if not full.exists():
                converters().convert(source, full, progress=step)
            if not place.exists():
                make(full, place)


def is_hugging_face(folder: Path) -> bool:
    """Whether a folder holds a Hugging Face model, and no checkpoint of ours."""
    ours = (folder / "manifest.json").exists()
    return not ours and (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
