"""Options of ``recipe`` that say how tokens are chosen at each stage."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from quota_jax.errors import QuotaError

if TYPE_CHECKING:
    from quota_jax.prune.weights import QuotaWeights
    from quota_jax.quantization import QuantizationConfig
    from quota_jax.recipe import Selector

SelectorName = Literal[
    "quota",
    "text_attention",
    "fastv",
    "pyramid_drop",
    "div_prune",
    "mmtok",
    "visionzip",
    "qapruner",
    "sqap",
    "random",
    "stride",
]
Metric = Literal["inter", "magnitude", "intra", "residual"]
ROUNDED = 2e-3
"""How far from 1 weights may add up to: the paper prints them with two decimals of a percent."""


@dataclass(frozen=True, kw_only=True)
class SelectionOptions:
    """Where stages stand and what they rank tokens by."""

    layers: tuple[int, ...] = ()
    """Decoder layers that drop tokens, from 0; default 2 to 6 (LLaVA), 7 to 11 (Qwen2.5-VL)."""
    selector: SelectorName | None = None
    """How tokens are chosen: by QUOTA's score (default with --derive), by its attention from the
    text alone (default otherwise), as a peer does, at random, or evenly spaced."""
    weights: str | None = None
    """With the selector quota: weights of the score's metrics, for example
    inter=.35,residual=.3; those not named keep .45 inter, .25 magnitude, .10 intra, .20
    residual."""
    redistribute: tuple[Metric, ...] | None = None
    """With the selector quota: leave these metrics out and share their weight out evenly among the
    others. Without names: whatever is not there (the residual, where inputs are not quantized)."""
    point: Literal["input", "before_attention", "after_attention"] | None = None
    """Where in the layer they leave; default: where the selector stands."""
    positions: Literal["keep", "renumber"] = "keep"
    """Whether kept tokens keep their rotary positions."""
    seed: int = 0
    """For the selector random."""
    min_keep_per_image: int = 0
    """Keep at least so many tokens of each picture of a prompt, as far as the budget goes."""
    reference_tokens: int | None = None
    """Budgets are fractions of this number of visual tokens instead of each sample's own (Eq. 5 to
    the letter)."""

    def chosen_selector(self, quantization: QuantizationConfig, default: str) -> Selector:
        """The selector; a score that has no residual to read is refused."""
        from quota_jax.recipe import Selector

        name = self.selector or default
        if self.weights is not None and name != "quota":
            raise QuotaError(f"--weights belong to the selector 'quota', not to {name!r}")
        selector = Selector(
            name=name,
            seed=self.seed,
            weights=self._weights(),
            redistribute=self.redistribute == (),
        )
        quantized = quantization.quantizes("decoder") and quantization.activation_bits < 16
        needs = name == "quota" and "residual" in selector.weights.used
        if needs and not (quantized or selector.redistribute):
            raise QuotaError(
                "the decoder's inputs are not quantized, so the score of selector quota has no "
                "residual: add --redistribute"
            )
        return selector

    def _weights(self) -> QuotaWeights:
        from quota_jax.prune.weights import QuotaWeights

        weights = QuotaWeights()
        if self.weights is not None:
            named: dict[str, float] = {}
            for part in self.weights.split(","):
                metric, _, number = part.partition("=")
                metric = metric.strip()
                if metric not in dataclasses.asdict(weights):
                    known = ", ".join(dataclasses.asdict(weights))
                    raise QuotaError(f"--weights: no metric {metric!r}; known: {known}")
                if metric in named:
                    raise QuotaError(f"--weights names {metric} twice")
                named[metric] = parse_number(number, f"--weights: {metric}")
            weights = dataclasses.replace(weights, **named)
            total = sum(dataclasses.astuple(weights))
            if abs(total - 1) > ROUNDED:
                shown = ", ".join(f"{k} {v:g}" for k, v in dataclasses.asdict(weights).items())
                raise QuotaError(f"--weights add up to {total:g}, not to 1: {shown}")
        return weights.without(*self.redistribute) if self.redistribute else weights


def parse_number(text: str, where: str) -> float:
    """A finite number out of an option's text."""
    try:
        number = float(text)
    except ValueError:
        raise QuotaError(f"{where}: {text!r} is no number") from None
    if not abs(number) < float("inf"):
        raise QuotaError(f"{where}: must be finite, got {text!r}")
    return number
