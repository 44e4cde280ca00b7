"""Recipes of QUOTA, its peers and the controls at their published settings, at a wanted cost.

A peer is placed where its authors place it (layers in proportion to the depth for which they are
published) and its one free number is solved for: the share of visual tokens that it keeps, or for
VTW the layer. Costs are those of the language model by the papers' count (``flops.paper_flops``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from quota_jax.config import ModelConfig, TextConfig
from quota_jax.errors import QuotaError
from quota_jax.flops import GATED, paper_flops
from quota_jax.prune.allocator import allocate, quota_recipe
from quota_jax.prune.options import MmtokOptions
from quota_jax.prune.vtw import withdrawal_recipe
from quota_jax.recipe import SELECTORS, Recipe, Selector, Stage

TEXT_TOKENS = 25
"""Text after the picture in POPE's prompts (the reading of QUOTA's tables that fits best)."""
CANDIDATES = {"llava": (2, 3, 4, 5, 6), "qwen2_5_vl": (7, 8, 9, 10, 11)}
"""QUOTA's candidate layers, 0-based."""
PYRAMID = 0.5
"""What each of PyramidDrop's three stages keeps of the one before, as published."""
SLACK = 0.02
"""How far above the target a method's least cost may lie."""
AT_EXIT = ("fastv", "sqap")
"""Their stage stands at the end of a layer that is paid in full."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Protocol:
    """How costs are counted; see ``paper_flops``. ``visual_tokens`` None: the model's reference
    picture; ``counted`` None: as each method's authors count."""

    visual_tokens: int | None = None
    text_tokens: int = TEXT_TOKENS
    matrices: int = GATED
    counted: str | None = None


PAPER = Protocol()


def peer_recipe(
    name: str,
    config: ModelConfig,
    *,
    target_flops_ratio: float | None = None,
    keep: float | None = None,
    layers: Sequence[int] | None = None,
    selector: Selector | None = None,
    sensitivities: Sequence[float] | None = None,
    protocol: Protocol = PAPER,
) -> Recipe:
    """The recipe of one of ``PEERS``, by what it keeps in the end or by what it costs.

    Exactly one of ``keep`` (the fraction left after the last stage; not for VTW) and
    ``target_flops_ratio`` (LLM FLOPs over those of the unpruned model, in (0, 1]; the nearest cost
    that the method can have) is given; for VTW neither is the published layer. ``layers`` replaces
    the published ones: the candidates of QUOTA or a control, FastV's one layer K, PyramidDrop's
    three, VTW's one. ``selector`` replaces the options of the method's own. ``sensitivities``: S_l
    of QUOTA's candidates (Eq. 1; None: equal drops).

    Where and by which rule of positions (Qwen2.5-VL keeps positions throughout: rows and columns
    are part of them, and no authors' rule for it is known to us, except that VisionZip refuses):

    - ``quota``, ``text_attention``: the candidate layers (``candidates``), positions kept.
    - ``fastv``: entry of layer K = 2 by the last token's attention in layer 1, positions kept.
    - ``pyramid_drop``: entries of layers 8, 16, 24 of 32, each keeps the same share of the one
      before (published: half), renumbered. A cost below what these layers allow with a quarter kept
      per stage moves the layers towards the input.
    - ``vtw``: entry of layer 15 of 32, nothing kept, positions kept.
    - ``div_prune``, ``mmtok``, ``visionzip``, ``qapruner``: the decoder's input, renumbered.
    - ``sqap``, and ``qapruner`` with the prior ``text_attention``: where FastV stands (their own
      layer is not known to us), positions kept.
    - ``random``, ``stride``: the decoder's input, positions kept; with ``layers`` QUOTA's stages.
    """
    if name not in PEERS:
        raise QuotaError(f"unknown peer {name!r}; known: {', '.join(PEERS)}")
    if keep is not None and target_flops_ratio is not None:
        raise QuotaError("give keep or target_flops_ratio, not both")
    for what, value in (("keep", keep), ("target_flops_ratio", target_flops_ratio)):
        if value is not None and not (math.isfinite(value) and 0 <= value <= 1):
            raise QuotaError(f"{what} must lie in [0, 1], got {value}")
    if sensitivities is not None and name != "quota":
        raise QuotaError(f"sensitivities belong to 'quota', not to {name!r}")
    if name == "visionzip" and config.model_type != "llava":
        raise QuotaError(
            f"selector 'visionzip' needs a vision tower with a class token: {config.model_type} "
            "has none"
        )
    solve = _Solver(name, config, target_flops_ratio, protocol, selector)
    if name == "vtw":
        if selector is not None or keep is not None:
            raise QuotaError("vtw drops every visual token: give target_flops_ratio or layers")
        return _vtw(solve, layers)
    if keep is None and target_flops_ratio is None:
        raise QuotaError(f"peer {name!r} needs keep or target_flops_ratio")
    if selector is None:
        selector = _selector(name, config)
    elif selector.name != name:
        raise QuotaError(f"peer {name!r} got the selector {selector.name!r}")
    if name == "pyramid_drop":
        return _pyramid_drop(solve, keep, layers, selector)
    return solve.kept(keep, _family(name, config, layers, selector, sensitivities))


def llm_flops_ratio(
    config: ModelConfig, recipe: Recipe, *, counted: str = "entry", protocol: Protocol = PAPER
) -> float:
    """LLM FLOPs of a recipe over those of the unpruned model (Eq. 12), as a fraction."""
    count = protocol.visual_tokens
    count = config.reference_picture[1] if count is None else count
    whole, pruned = (
        paper_flops(
            config.text,
            each,
            visual_tokens=count,
            text_tokens=protocol.text_tokens,
            matrices=protocol.matrices,
            counted=protocol.counted or counted,
        ).total
        for each in (Recipe.none(config.text.num_layers), recipe)
    )
    return pruned / whole


class _Solver:
    """Finds the recipe of a family whose cost is nearest to the target."""

    def __init__(
        self,
        name: str,
        config: ModelConfig,
        target: float | None,
        protocol: Protocol,
        selector: Selector | None,
    ):
        self.name, self.config, self.target, self.protocol = name, config, target, protocol
        self.counted = "exit" if _at_exit(name, selector) else "entry"
        tokens = protocol.visual_tokens
        self.tokens = config.reference_picture[1] if tokens is None else tokens
        if self.tokens < 1:
            raise QuotaError(f"visual_tokens must be positive, got {self.tokens}")

    def cost(self, recipe: Recipe) -> float:
        return llm_flops_ratio(self.config, recipe, counted=self.counted, protocol=self.protocol)

    def kept(self, keep: float | None, family: Callable[[float], Recipe]) -> Recipe:
        """The family's member that keeps ``keep``, or the one of the wanted cost."""
        if keep is not None:
            return family(keep)
        # Costs rise with what is kept: bisect over whole tokens, then take the nearer neighbor. A
        # token less in the last of several stages is more in the first: finer steps.
        stages = len(family(0.5).stages)
        tokens = self.tokens if stages == 1 else self.tokens * 64
        low, high = 0, tokens
        while high - low > 1:
            middle = (low + high) // 2
            below = self.cost(family(middle / tokens)) <= self._wanted
            low, high = (middle, high) if below else (low, middle)
        return self.nearest(family(count / tokens) for count in (low, high))

    def nearest(self, recipes: Iterable[Recipe]) -> Recipe:
        costs = {recipe: self.cost(recipe) for recipe in recipes}
        best = min(costs, key=lambda recipe: abs(costs[recipe] - self._wanted))
        if (least := min(costs.values())) > self._wanted + SLACK:
            raise QuotaError(
                f"{self.name} cannot cost {self._wanted:.4g} of the unpruned model: the least is "
                f"{least:.4g} for {self.tokens} visual and {self.protocol.text_tokens} text tokens"
            )
        return best

    @property
    def _wanted(self) -> float:
        assert self.target is not None
        return self.target


def _selector(name: str, config: ModelConfig) -> Selector:
    if name == "mmtok" and config.model_type == "qwen2_5_vl":
        return Selector(name=name, options=MmtokOptions(text_temperature=0.01))
    return Selector(name=name)


def _positions(text: TextConfig, published: str) -> str:
    return published if text.mrope_section is None else "keep"


def _family(
    name: str,
    config: ModelConfig,
    layers: Sequence[int] | None,
    selector: Selector,
    sensitivities: Sequence[float] | None,
) -> Callable[[float], Recipe]:
    """Recipes by the fraction left in the end."""
    text = config.text
    control = name in ("random", "stride")
    if name in ("quota", "text_attention") or (control and layers is not None):
        chosen = candidates(config) if layers is None else tuple(layers)
        values = [0.0] * len(chosen) if sensitivities is None else sensitivities

        def staged(keep: float) -> Recipe:
            ratios = allocate(values, chosen, keep).ratios
            return quota_recipe(text.num_layers, chosen, ratios, selector=selector)

        return staged
    if _at_exit(name, selector):
        last = _one_layer(name, layers, text, default=min(2, text.num_layers)) - 1
        return lambda keep: Recipe(
            num_layers=text.num_layers,
            stages=(Stage(layer=last, keep=keep, selector=selector, trim_own_cache=False),),
        )
    if layers is not None:
        raise QuotaError(f"peer {name!r} stands at the decoder's input: it takes no layers")
    return lambda keep: Recipe(
        num_layers=text.num_layers,
        stages=(Stage(layer=0, keep=keep, point="input", selector=selector),),
        positions="keep" if control else _positions(text, "renumber"),
    )


def _at_exit(name: str, selector: Selector | None) -> bool:
    inside = selector is not None and selector.points[-1] == "after_attention"
    return name in AT_EXIT or (name == "qapruner" and inside)


def candidates(config: ModelConfig) -> tuple[int, ...]:
    """QUOTA's candidate layers, 0-based: the paper's five where the decoder is as deep as the
    paper's, else five neighbors that begin at the same part of its depth (not at layer 0).

    Raises:
      QuotaError: the decoder has no layer there.
    """
    depth, published = config.text.num_layers, CANDIDATES[config.model_type]
    full = {"llava": 32, "qwen2_5_vl": 28}[config.model_type]
    first = published[0] if depth >= full else max(1, round(published[0] * depth / full))
    layers = tuple(layer for layer in range(first, first + len(published)) if layer < depth)
    if not layers:
        raise QuotaError(f"the decoder has only {depth} layers: name the candidate layers")
    return layers


def _one_layer(name: str, layers: Sequence[int] | None, text: TextConfig, *, default: int) -> int:
    """The layer K at whose entry a method drops tokens."""
    if layers is None:
        return default
    if len(layers) != 1 or not 1 <= layers[0] <= text.num_layers:
        raise QuotaError(
            f"peer {name!r} takes one layer from 1 to {text.num_layers}, got {list(layers)}"
        )
    return layers[0]


def _vtw(solve: _Solver, layers: Sequence[int] | None) -> Recipe:
    text = solve.config.text
    if layers is not None and solve.target is not None:
        raise QuotaError("vtw: give layers or target_flops_ratio, not both")
    if solve.target is None:
        layer = max(1, round(text.num_layers * 15 / 32))
        layer = _one_layer("vtw", layers, text, default=min(layer, text.num_layers - 1))
        return withdrawal_recipe(text.num_layers, layer)
    return solve.nearest(withdrawal_recipe(text.num_layers, k) for k in range(text.num_layers))


def _pyramid_drop(
    solve: _Solver, keep: float | None, layers: Sequence[int] | None, selector: Selector
) -> Recipe:
    text = solve.config.text
    published = tuple(round(text.num_layers * part / 4) for part in (1, 2, 3))

    def family(stages: tuple[int, ...]) -> Callable[[float], Recipe]:
        def recipe(final: float) -> Recipe:
            share = final ** (1 / len(stages))
            ratios = [share ** (i + 1) for i in range(len(stages) - 1)] + [final]
            return quota_recipe(
                text.num_layers,
                stages,
                ratios,
                selector=selector,
                point="before_attention",
                positions=_positions(text, "renumber"),
            )

        return recipe

    if layers is not None:
        return solve.kept(keep, family(tuple(layers)))
    schedules = [tuple(round(layer * part / 4) for layer in published) for part in (4, 3, 2, 1)]
    schedules = [each for each in schedules if len({*each}) == 3 and each[0] >= 1]
    if not schedules:
        raise QuotaError(
            f"the decoder has only {text.num_layers} layers: name those of pyramid_drop in layers"
        )
    if keep is not None:
        return solve.kept(keep, family(published))
    floor = (PYRAMID / 2) ** 3
    reachable = [
        each for each in schedules if solve.cost(family(each)(floor)) <= (solve.target or 0)
    ]
    return solve.kept(None, family(reachable[0] if reachable else schedules[-1]))


PEERS = (*SELECTORS, "vtw")
