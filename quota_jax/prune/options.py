"""Parameters of the peers' selectors; the defaults are the published ones unless said otherwise."""

from __future__ import annotations

import math
from dataclasses import dataclass

from quota_jax.errors import QuotaError

PRIORS = ("relevance", "text_attention")


@dataclass(frozen=True, kw_only=True, slots=True)
class MmtokOptions:
    """MMTok (arXiv 2508.18264). ``alpha`` weighs the coverage of the vision tokens against that of
    the text; the temperatures are those of the two softmaxes (Qwen2.5-VL: .01 for the text)."""

    alpha: float = 0.5
    text_temperature: float = 0.02
    vision_temperature: float = 0.2

    def __post_init__(self):
        if not (_number(self.alpha) and self.alpha >= 0):
            raise QuotaError(f"mmtok: alpha must be finite and not negative, got {self.alpha!r}")
        for name in ("text_temperature", "vision_temperature"):
            value = getattr(self, name)
            if not (_number(value) and value > 0):
                raise QuotaError(f"mmtok: {name} must be positive, got {value!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class QaprunerOptions:
    """QAPruner (arXiv 2604.02816): ``alpha S^P + (1 - alpha) S^Q``.

    The paper publishes no alpha: .5 is our choice. ``group_size``: values that share a scale of the
    simulated 4-bit quantizer. ``prior`` is S^P; the paper's, CDPruner, needs CLIP's text encoder,
    which these models lack. ``relevance`` (at the decoder's input): mean cosine to the prompt's
    text embeddings. ``text_attention`` (inside a layer): mean attention from the text.
    """

    alpha: float = 0.5
    group_size: int = 128
    prior: str = "relevance"

    def __post_init__(self):
        if not (_number(self.alpha) and 0 <= self.alpha <= 1):
            raise QuotaError(f"qapruner: alpha must lie in [0, 1], got {self.alpha!r}")
        if isinstance(self.group_size, bool) or not isinstance(self.group_size, int):
            raise QuotaError(f"qapruner: group_size must be an integer, got {self.group_size!r}")
        if self.group_size < 1:
            raise QuotaError(f"qapruner: group_size must be positive, got {self.group_size}")
        if self.prior not in PRIORS:
            raise QuotaError(f"qapruner: prior {self.prior!r} is unknown; known: {PRIORS}")


@dataclass(frozen=True, kw_only=True, slots=True)
class SqapOptions:
    """SQAP-VLA (arXiv 2509.09090). ``preserved``: share of the budget that goes to the tokens of
    most attention, the rest is sampled over the picture. .5 is our choice."""

    preserved: float = 0.5

    def __post_init__(self):
        if not (_number(self.preserved) and 0 <= self.preserved <= 1):
            raise QuotaError(f"sqap: preserved must lie in [0, 1], got {self.preserved!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionZipOptions:
    """VisionZip. ``contextual``: share of the budget that goes to merged tokens (10 of 64, 20 of
    128, 30 of 192 in the paper), rounded to the nearest count."""

    contextual: float = 10 / 64

    def __post_init__(self):
        if not (_number(self.contextual) and 0 <= self.contextual < 1):
            raise QuotaError(f"visionzip: contextual must lie in [0, 1), got {self.contextual!r}")


OPTIONS = {
    "mmtok": MmtokOptions,
    "qapruner": QaprunerOptions,
    "sqap": SqapOptions,
    "visionzip": VisionZipOptions,
}
Options = MmtokOptions | QaprunerOptions | SqapOptions | VisionZipOptions


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
