"""Pruning recipes: which visual tokens leave at which decoder layer, as static data.

A recipe is frozen and hashable, so a forward pass takes it as a static argument and every pruned
shape is a compile-time constant. ``Recipe.canonical`` drops stages that keep everything, hence a
recipe that prunes nothing is the same program as no recipe.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quota_jax.config import build
from quota_jax.errors import QuotaError
from quota_jax.prune.options import OPTIONS, Options
from quota_jax.prune.weights import QuotaWeights

POINTS = ("input", "before_attention", "after_attention")
POSITIONS = ("keep", "renumber")
BUDGETS = ("sample", "reference")
# Which points a selector can stand at; the last one is its own. Scores made of a layer's attention
# exist inside it, PyramidDrop's are computed ahead of it, DivPrune, MMTok and VisionZip work on the
# decoder's input.
SELECTORS: dict[str, tuple[str, ...]] = {
    "quota": ("after_attention",),
    "text_attention": ("after_attention",),
    "fastv": ("after_attention",),
    "pyramid_drop": ("before_attention",),
    "div_prune": ("input",),
    "mmtok": ("input",),
    "visionzip": ("input",),
    "qapruner": ("after_attention", "input"),
    "sqap": ("after_attention",),
    "random": POINTS,
    "stride": POINTS,
}
# They score each token by itself; the others choose a set as a whole.
BY_SCORE = ("quota", "text_attention", "fastv", "pyramid_drop", "qapruner", "random")
# They make new tokens, which have no place of their own among the old ones.
MERGING = ("visionzip",)
GUARD = 1e-9
PAPER_WEIGHTS = QuotaWeights()


@dataclass(frozen=True, kw_only=True, slots=True)
class Selector:
    """Names a scoring rule, with its parameters.

    ``quota``: the weighted score of Eq. 8; ``weights``, ``redistribute`` (the weight of a metric
    that is not there, such as the residual of unquantized inputs, goes to the others) and
    ``causal_intra`` are its own. ``text_attention``: its first metric alone. ``fastv``,
    ``pyramid_drop`` (attention of the prompt's last token), ``div_prune`` (diversity), ``mmtok``
    (coverage of text and picture), ``visionzip`` (class attention, merges the rest), ``qapruner``
    (sensitivity to quantization), ``sqap`` (attention, then spread over the picture): peers, the
    last four with ``options`` of their own (None: the defaults). ``random`` (by ``seed``) and
    ``stride``: controls. VTW is ``stride`` with keep 0. ``prune.presets`` has the published
    settings.
    """

    name: str = "text_attention"
    seed: int = 0
    weights: QuotaWeights = PAPER_WEIGHTS
    redistribute: bool = False
    causal_intra: bool = False
    options: Options | None = None

    def __post_init__(self):
        if self.name not in SELECTORS:
            raise QuotaError(f"unknown selector {self.name!r}; known: {sorted(SELECTORS)}")
        if isinstance(self.weights, Mapping):
            # frozen: the JSON form becomes the class on its way in
            weights = build(QuotaWeights, self.weights, "weights of the score")
            object.__setattr__(self, "weights", weights)
        changed = self.weights != PAPER_WEIGHTS or self.redistribute or self.causal_intra
        if changed and self.name != "quota":
            raise QuotaError(
                "weights, redistribute and causal_intra belong to the selector 'quota', not to "
                f"{self.name!r}"
            )
        object.__setattr__(self, "options", self._own_options())

    def _own_options(self) -> Options | None:
        kind = OPTIONS.get(self.name)
        given: Any = self.options
        if kind is None:
            if given is not None:
                raise QuotaError(f"selector {self.name!r} has no options, got {given!r}")
            return None
        if given is None:
            return kind()
        if isinstance(given, Mapping):
            return build(kind, given, f"options of the selector {self.name!r}")
        if not isinstance(given, kind):
            raise QuotaError(f"selector {self.name!r} takes {kind.__name__}, got {given!r}")
        return given

    @property
    def points(self) -> tuple[str, ...]:
        """Where it can stand; the last one is its own."""
        prior = getattr(self.options, "prior", None)
        if prior is not None:
            return ("input",) if prior == "relevance" else ("after_attention",)
        return SELECTORS[self.name]


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One pruning point.

    ``keep`` is the fraction of a sample's *original* visual tokens that remain. At
    ``after_attention`` the layer's attention runs on all incoming tokens and the MLP on the kept
    ones; with ``trim_own_cache`` the layer's own keys and values are trimmed too.

    ``min_keep_per_image``: each picture of a sample keeps its best m tokens, or all if it has
    fewer, before the rest of the budget goes to the best tokens of any picture. The budget stays:
    where it is too small for m of each, pictures take turns, every one its best token, then every
    one its second best; the better token goes first in the last turn. A frame of a video counts as
    a picture.
    """

    layer: int
    keep: float
    point: str = "after_attention"
    selector: Selector = Selector()
    trim_own_cache: bool = True
    min_keep_per_image: int = 0

    def __post_init__(self):
        if self.point not in POINTS:
            raise QuotaError(f"stage point {self.point!r} is unknown; known: {POINTS}")
        if not (isinstance(self.keep, int | float) and 0 <= self.keep <= 1):
            raise QuotaError(f"stage keep must lie in [0, 1], got {self.keep!r}")
        if isinstance(self.layer, bool) or not isinstance(self.layer, int) or self.layer < 0:
            raise QuotaError(f"stage layer must be a non-negative integer, got {self.layer!r}")
        if self.point == "input" and self.layer != 0:
            raise QuotaError(
                f"point 'input' is the decoder's input: its layer is 0, got {self.layer}"
            )
        if self.point not in self.selector.points:
            raise QuotaError(
                f"selector {self.selector.name!r} cannot stand at {self.point!r} "
                f"(layer {self.layer})"
            )
        least = self.min_keep_per_image
        if isinstance(least, bool) or not isinstance(least, int) or least < 0:
            raise QuotaError(
                f"min_keep_per_image must be a non-negative integer, got {least!r} (layer "
                f"{self.layer})"
            )
        if least and self.selector.name not in BY_SCORE:
            raise QuotaError(
                f"min_keep_per_image is for selectors that score tokens ({', '.join(BY_SCORE)}), "
                f"not for {self.selector.name!r}"
            )

    @property
    def order(self) -> tuple[int, int]:
        return self.layer, POINTS.index(self.point)


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Stages in execution order for a decoder of ``num_layers`` layers.

    ``positions``: ``keep`` lets retained tokens keep their rotary positions, ``renumber`` closes
    the gaps at every stage. ``budget``: a stage of ratio r keeps ``ceil(r n)`` of a sample's n
    visual tokens ("sample"), or ``ceil(r V_0)`` of every sample, all n where it has fewer, with the
    stored V_0 = ``reference_tokens`` ("reference", Eq. 5 to the letter). For one LLaVA picture both
    agree.
    """

    num_layers: int
    stages: tuple[Stage, ...] = ()
    positions: str = "keep"
    budget: str = "sample"
    reference_tokens: int | None = None

    def __post_init__(self):
        if self.positions not in POSITIONS:
            raise QuotaError(f"recipe positions {self.positions!r} are unknown; known: {POSITIONS}")
        self._check_budget()
        last, keep = (-1, -1), 1.0
        for stage in self.stages:
            if stage.layer >= self.num_layers:
                raise QuotaError(
                    f"recipe stage at layer {stage.layer}, but the decoder has "
                    f"{self.num_layers} layers"
                )
            if stage.order <= last:
                raise QuotaError(f"recipe stages are not in order at layer {stage.layer}")
            if stage.keep > keep:
                raise QuotaError(
                    f"recipe grows at layer {stage.layer}: keep {stage.keep} after {keep}"
                )
            if stage.selector.name in MERGING and self.positions != "renumber":
                raise QuotaError(
                    f"selector {stage.selector.name!r} makes new tokens: it needs positions "
                    f"'renumber', got {self.positions!r}"
                )
            last, keep = stage.order, stage.keep

    def _check_budget(self) -> None:
        count = self.reference_tokens
        if self.budget not in BUDGETS:
            raise QuotaError(f"recipe budget {self.budget!r} is unknown; known: {BUDGETS}")
        if self.budget == "sample" and count is not None:
            raise QuotaError("recipe reference_tokens belong to budget 'reference'")
        if self.budget == "reference" and (type(count) is not int or count < 1):
            raise QuotaError(
                f"recipe budget 'reference' needs reference_tokens of at least 1, got {count!r}"
            )

    @classmethod
    def none(cls, num_layers: int) -> Recipe:
        return cls(num_layers=num_layers)

    @classmethod
    def uniform(
        cls,
        *,
        num_layers: int,
        layers: Sequence[int],
        keep: float,
        selector: str | Selector = "text_attention",
        point: str | None = None,
        positions: str = "keep",
        trim_own_cache: bool = True,
        seed: int = 0,
        min_keep_per_image: int = 0,
        budget: str = "sample",
        reference_tokens: int | None = None,
    ) -> Recipe:
        """Equal drops at each candidate layer; the last one ends exactly at ``keep`` (Eq. 4, equal
        pi). ``point`` None takes the selector's own."""
        if not layers:
            raise QuotaError("a uniform recipe needs at least one layer")
        if isinstance(selector, str):
            selector = Selector(name=selector, seed=seed)
        ordered = sorted(layers)
        stages = tuple(
            Stage(
                layer=layer,
                keep=keep if i == len(ordered) else max(keep, 1 - (1 - keep) * i / len(ordered)),
                point=point or selector.points[-1],
                selector=selector,
                trim_own_cache=trim_own_cache,
                min_keep_per_image=min_keep_per_image,
            )
            for i, layer in enumerate(ordered, start=1)
        )
        return cls(
            num_layers=num_layers,
            stages=stages,
            positions=positions,
            budget=budget,
            reference_tokens=reference_tokens,
        )

    @property
    def is_none(self) -> bool:
        return not self.canonical().stages

    def canonical(self) -> Recipe:
        """The same recipe without stages that drop nothing; without any stage positions and budget
        are the defaults."""
        stages, keep = [], 1.0
        for stage in self.stages:
            if stage.keep < keep:
                stages.append(stage)
                keep = stage.keep
        if not stages:
            return Recipe.none(self.num_layers)
        return dataclasses.replace(self, stages=tuple(stages))

    def target(self, visual_tokens: int, keep: float) -> int:
        """K: how many of a sample's ``visual_tokens`` a stage of ratio ``keep`` leaves (Eq. 5)."""
        if self.reference_tokens is None or keep == 1:
            return kept(visual_tokens, keep)
        return min(visual_tokens, kept(self.reference_tokens, keep))

    def tokens_per_layer(self, visual_tokens: int) -> tuple[int, ...]:
        """Visual tokens that each layer's attention sees, for a sample with ``visual_tokens``."""
        counts, keep = [], 1.0
        for layer in range(self.num_layers):
            here = [stage for stage in self.stages if stage.layer == layer]
            keep = min([keep, *(s.keep for s in here if s.point != "after_attention")])
            counts.append(self.target(visual_tokens, keep))
            keep = min([keep, *(s.keep for s in here)])
        return tuple(counts)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Recipe:
        fields = dict(data)
        stages = fields.get("stages", ())
        if not isinstance(stages, list | tuple):
            raise QuotaError(f"recipe: stages must be a list, got {stages!r}")
        fields["stages"] = tuple(_stage(stage) for stage in stages)
        return build(cls, fields, "recipe")


def kept(count: int, keep: float) -> int:
    """K(n) = ceil(keep * n), with a guard of 1e-9 against representation error (Eq. 5)."""
    return max(0, math.ceil(keep * count - GUARD))


def _stage(data: Any) -> Stage:
    if not isinstance(data, Mapping):
        raise QuotaError(f"recipe: a stage must be an object, got {data!r}")
    fields = dict(data)
    selector = fields.get("selector", {})
    if isinstance(selector, str):
        selector = {"name": selector}
    fields["selector"] = build(Selector, selector, "recipe selector")
    return build(Stage, fields, "recipe stage")
