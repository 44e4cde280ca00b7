"""The rows of each table.

Where the paper quotes peers from their papers, the rows here run them in this stack. The paper's
figures stand beside ours in columns of their own (`paper`): they belong to another model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from quota_jax.config import ModelConfig
from quota_jax.errors import QuotaError
from quota_jax.pipeline import PipelineOptions, equal_recipe, selector
from quota_jax.prune.presets import AT_EXIT, Protocol, llm_flops_ratio, peer_recipe
from quota_jax.prune.weights import METRICS, QuotaWeights
from quota_jax.quantization import MODULES, QuantizationConfig
from quota_jax.recipe import MERGING, Recipe
from quota_jax.reproduce.rows import FULL, KEEP, LOW_BIT, equal, flatquant, variant_row
from quota_jax.reproduce.study import Derived, Row
from quota_jax.reproduce.weights import Weights
from quota_jax.testbed.outliers import CHANNELS, FACTOR

RATIOS = (0.5, 0.4, 0.3, 0.2, 0.1, 0.05)
NUMBERED = (KEEP, 0.1)
"""Ratios at which peers that number tokens anew are run with positions kept too."""
PEERS = (
    "fastv", "pyramid_drop", "vtw", "div_prune", "mmtok", "visionzip", "qapruner", "sqap",
    "text_attention", "random", "stride",
)  # fmt: skip
"""Published selectors, QUOTA's text attention alone, and the controls."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What tables are made for: a model, and seeds of the calibration. visual_tokens: of a picture,
    where costs are compared; None is the model's reference picture."""

    config: ModelConfig
    seeds: tuple[int, ...] = (0,)
    visual_tokens: int | None = None

    @property
    def protocol(self) -> Protocol:
        """How costs are counted."""
        return Protocol(visual_tokens=self.visual_tokens)

    def facts(self, recipe: Recipe, name: str = "") -> tuple[tuple[str, str], ...]:
        """LLM FLOPs of a recipe over those of the unpruned model, by the paper's count; FastV and
        SQAP prune at the end of a layer that is paid in full."""
        counted = "exit" if name in AT_EXIT else "entry"
        ratio = llm_flops_ratio(self.config, recipe, counted=counted, protocol=self.protocol)
        return (("LLM FLOPs", f"{100 * ratio:.1f} %"),)


@dataclass(frozen=True, kw_only=True)
class Table:
    """title, rows, and the row that all are compared with. notes: what the rows leave out, and
    why. pairs: rows that are compared with each other too, the second one being the baseline."""

    name: str
    title: str
    rows: tuple[Row, ...]
    baseline: Row = FULL
    notes: tuple[str, ...] = ()
    pairs: tuple[tuple[Row, Row], ...] = ()


def scores(plan: Plan) -> Table:
    """The model itself, and what it answers when all pictures are gray."""
    title = f"Full precision ({plan.config.model_type})"
    return Table(name="scores", title=title, rows=(FULL, Row(label="gray pictures", blind=True)))


def keep_table(plan: Plan) -> Table:
    """How much the benchmarks notice lost tokens: random and evenly spaced ones, at the decoder's
    input, in full precision."""
    rows = [FULL]
    for name in ("random", "stride"):
        for keep in RATIOS:
            recipe = peer_recipe(name, plan.config, keep=keep)
            rows.append(Row(label=f"{name} {100 * keep:g} %", recipe=recipe))
    return Table(
        name="keep",
        title="Random and evenly spaced visual tokens kept at the decoder's input",
        rows=tuple(rows),
    )


def methods(plan: Plan) -> Table:
    """Quantizers side by side, unpruned."""
    rows = [FULL]
    for seed in plan.seeds:
        plain = ("rtn", "smoothquant", "gptq", "flatquant")
        given = [(method, "W8A8KV8") for method in plain]
        given += [
            (method, bits)
            for bits in ("W4A8KV4", "W4A4KV4")
            for method in (*plain, "flatquant+gptq")
        ]
        given += [("grace", "W4A8KV4"), ("grace", "W4A4KV4")]
        given += [(method, "W4A16G128") for method in ("rtn", "awq", "gptq", "luq")]
        for method, bits in given:
            if seed and method == "rtn":
                continue
            modules = ("projector", "decoder") if method in ("awq", "luq") else MODULES
            weights = Weights(method=method, bits=bits, seed=seed, modules=modules)
            rows.append(Row(label=_label(f"{method} {bits}", seed, plan), weights=weights))
    return Table(name="methods", title="Quantizers, all tokens kept", rows=tuple(rows))


def outliers(plan: Plan) -> Table:
    """Quantizers on the same model with planted outlier channels."""
    rows = [FULL]
    for bits in ("W8A8KV8", *LOW_BIT):
        for method in ("rtn", "smoothquant", "flatquant"):
            weights = Weights(method=method, bits=bits, seed=plan.seeds[0], outliers=FACTOR)
            rows.append(Row(label=f"{method} {bits}", weights=weights))
    at = f"{len(CHANNELS)} channels of every norm's output {FACTOR:g} times as large"
    return Table(name="outliers", title=f"Quantizers with {at}", rows=tuple(rows))


def table1(plan: Plan) -> Table:
    """Which modules are quantized (Table 1)."""
    parts = (("decoder",), ("vision", "decoder"), ("vision", "projector", "decoder"))
    rows = [FULL]
    for seed in plan.seeds:
        for bits in LOW_BIT:
            for modules in parts:
                names = " & ".join({"decoder": "LLM"}.get(m, m) for m in modules)
                weights = flatquant(bits, seed, modules=modules)
                rows.append(Row(label=_label(f"{bits} {names}", seed, plan), weights=weights))
    return Table(name="table1", title="Quantized modules (Table 1)", rows=tuple(rows))


def table2(plan: Plan) -> Table:
    """The final keep ratio of QUOTA (Table 2)."""
    rows = [FULL]
    for seed in plan.seeds:
        for bits in LOW_BIT:
            rows += [
                Row(
                    label=_label(f"{bits} {100 * keep:g} %", seed, plan),
                    weights=flatquant(bits, seed),
                    recipe=Derived(keep=keep),
                )
                for keep in RATIOS
            ]
    return Table(name="table2", title="QUOTA's final keep ratio (Table 2)", rows=tuple(rows))


def table3(plan: Plan) -> Table:
    """Stage-wise variants, collaborative and co-calibrated (Table 3)."""
    config = plan.config
    rows = [FULL]
    for keep in (KEEP, 0.1):
        share = f"{100 * keep:g} %"
        rows.append(Row(label=f"prune-only {share}", recipe=equal(config, keep)))
    pairs = []
    for bits in LOW_BIT:
        for seed in plan.seeds:
            plain = flatquant(bits, seed)
            rows.append(Row(label=_label(f"{bits} quant-only", seed, plan), weights=plain))
        for keep in (KEEP, 0.1):
            for seed in plan.seeds:
                joint = _joint(config, bits, seed, keep, plan)
                rows += joint.values()
                collaborative = joint["collaborative"]
                pairs += [
                    (collaborative, joint["quantize-then-prune"]),
                    (collaborative, joint["prune-then-quantize"]),
                    (joint["co-calibrated"], collaborative),
                ]
    return Table(
        name="table3",
        title="Stage-wise and joint variants (Table 3)",
        rows=tuple(rows),
        pairs=tuple(pairs),
    )


def _joint(config: ModelConfig, bits: str, seed: int, keep: float, plan: Plan) -> dict[str, Row]:
    """The variants that prune and quantize, and what separates QUOTA's parts from each other, by
    name."""
    plain, share = flatquant(bits, seed), f"{100 * keep:g} %"
    pruned = flatquant(bits, seed, variant="prune-then-quantize", keep=keep)
    deployed = flatquant(bits, seed, variant="co-calibrated", keep=keep)
    with_residual = equal_recipe(
        config,
        PipelineOptions(keep=keep),
        selector(QuantizationConfig.parse(bits), residual=True),
    )
    without_residual = selector(QuantizationConfig.parse(bits), residual=False).weights

    given: dict[str, tuple[Weights, Recipe | Derived | None]] = {
        "quantize-then-prune": (plain, equal(config, keep, bits)),
        "+ schedule only": (plain, Derived(keep=keep, weights=without_residual)),
        "+ residual only": (plain, with_residual),
        "prune-then-quantize": (pruned, None),
        "collaborative": (plain, Derived(keep=keep)),
        "co-calibrated": (deployed, None),
    }
    return {
        name: Row(
            label=_label(f"{bits} {name} {share}", seed, plan), weights=weights, recipe=recipe
        )
        for name, (weights, recipe) in given.items()
    }


def table4(plan: Plan) -> Table:
    """Pruners at their published cost, weight-only quantizers, and QUOTA (Tables 4 and 6)."""
    config = plan.config
    published = _published_costs(config)
    rows = [FULL]
    for name, ratio in published.items():
        recipe = peer_recipe(name, config, target_flops_ratio=ratio, protocol=plan.protocol)
        rows.append(Row(label=name, recipe=recipe, facts=plan.facts(recipe, name)))
    for seed in plan.seeds:
        for method in ("gptq", "awq"):
            modules = ("projector", "decoder")
            weights = Weights(method=method, bits="W4A16G128", modules=modules, seed=seed)
            facts = (("LLM FLOPs", "100.0 %"),)
            label = _label(f"{method} W4A16 group 128", seed, plan)
            rows.append(Row(label=label, weights=weights, facts=facts))
        for bits in LOW_BIT:
            shown = equal(config, KEEP, bits)
            rows.append(
                Row(
                    label=_label(f"QUOTA {bits} 30 %", seed, plan),
                    weights=flatquant(bits, seed),
                    recipe=Derived(keep=KEEP),
                    facts=plan.facts(shown),
                )
            )
    return Table(
        name="table6" if config.model_type == "qwen2_5_vl" else "table4",
        title="Pruners, quantizers and QUOTA (Tables 4 and 6)",
        rows=tuple(rows),
    )


def _published_costs(config: ModelConfig) -> dict[str, float]:
    """LLM FLOPs at which the paper quotes the pruners (Tables 4 and 6)."""
    if config.model_type == "llava":
        return {"vtw": 0.4732, "pyramid_drop": 0.3403, "fastv": 0.4320, "div_prune": 0.2173}
    return {"vtw": 0.4343, "pyramid_drop": 0.3303, "fastv": 0.3266, "div_prune": 0.2445}


def table5(plan: Plan) -> Table:
    """Weights of the score: one left out, and perturbed (Table 5)."""
    default = QuotaWeights()
    given = {
        "default": default,
        **{f"without {m}": default.without(m) for m in METRICS},
        "35/35/20/10": QuotaWeights(inter=0.35, magnitude=0.35, intra=0.20, residual=0.10),
        "35/25/10/30": QuotaWeights(inter=0.35, magnitude=0.25, intra=0.10, residual=0.30),
        "55/25/10/10": QuotaWeights(inter=0.55, magnitude=0.25, intra=0.10, residual=0.10),
        "55/15/0/30": QuotaWeights(inter=0.55, magnitude=0.15, intra=0.0, residual=0.30),
    }
    rows = [FULL]
    for bits in LOW_BIT:
        for seed in plan.seeds:
            rows += [
                Row(
                    label=_label(f"{bits} {name}", seed, plan),
                    weights=flatquant(bits, seed),
                    recipe=Derived(keep=KEEP, weights=weights),
                )
                for name, weights in given.items()
            ]
    return Table(
        name="table5",
        title="Weights of the score, inter / magnitude / intra / residual (Table 5)",
        rows=tuple(rows),
    )


def peers(plan: Plan) -> Table:
    """Selectors at equal LLM FLOPs, in full precision and in 4 bits; those that number what they
    keep anew also without it (`NUMBERED`), which tells their choice from their numbering."""
    config, rows = plan.config, [FULL]
    notes: list[str] = []
    seed = plan.seeds[0]
    low = flatquant("W4A8KV4", seed)
    rows.append(Row(label="W4A8KV4", weights=low))
    for keep in RATIOS:
        whole = equal(config, keep)
        ratio = llm_flops_ratio(config, whole, protocol=plan.protocol)
        facts = plan.facts(whole)
        share = f"{100 * keep:g} %"
        rows += [
            Row(label=f"quota {share}", recipe=whole, facts=facts),
            Row(
                label=f"W4A8KV4 quota {share}",
                weights=low,
                recipe=Derived(keep=keep),
                facts=facts,
            ),
        ]
        for name in PEERS:
            try:
                recipe = peer_recipe(name, config, target_flops_ratio=ratio, protocol=plan.protocol)
            except QuotaError as error:  # not to be had at this cost, or on this model
                notes.append(f"{name} {share}: {error}")
                continue
            facts = plan.facts(recipe, name)
            rows += [
                Row(label=f"{name} {share}", recipe=recipe, facts=facts),
                Row(label=f"W4A8KV4 {name} {share}", weights=low, recipe=recipe, facts=facts),
            ]
            if keep in NUMBERED and recipe.positions == "renumber" and name not in MERGING:
                kept = dataclasses.replace(recipe, positions="keep")
                label = f"{name}, positions kept, {share}"
                rows.append(Row(label=label, recipe=kept, facts=facts))
    return Table(
        name="peers",
        title="Selectors at the LLM FLOPs of QUOTA's recipe",
        rows=tuple(rows),
        notes=tuple(notes),
    )


def table7(plan: Plan) -> Table:
    """Scores, memory and power while each task is answered (Table 7)."""
    seed = plan.seeds[0]
    variants = [("full-precision", LOW_BIT[0]), ("prune-only", LOW_BIT[0])]
    variants += [(name, bits) for bits in LOW_BIT for name in ("quant-only", "collaborative")]
    rows = [
        dataclasses.replace(variant_row(name, plan.config, bits, seed=seed), measured=True)
        for name, bits in variants
    ]
    notes = (f"calibration seeds other than {seed}",) if len(plan.seeds) > 1 else ()
    return Table(
        name="table7",
        title="Scores, memory and power while answering (Table 7)",
        rows=tuple(rows),
        baseline=rows[0],
        notes=notes,
    )


def pareto(plan: Plan) -> Table:
    """Precisions, pruned and not: what `reproduce pareto` sets beside speeds."""
    rows = [FULL]
    rows += [variant_row("prune-only", plan.config, "", keep=keep) for keep in (KEEP, 0.1)]
    for bits in LOW_BIT:
        for seed in plan.seeds:
            found = [variant_row("quant-only", plan.config, bits, seed=seed)]
            found += [
                variant_row("collaborative", plan.config, bits, keep=keep, seed=seed)
                for keep in (KEEP, 0.1)
            ]
            rows += [dataclasses.replace(row, label=_label(row.label, seed, plan)) for row in found]
    return Table(name="pareto", title="Precision and pruning together", rows=tuple(rows))


TABLES: dict[str, Callable[[Plan], Table]] = {
    "scores": scores,
    "keep": keep_table,
    "methods": methods,
    "outliers": outliers,
    "peers": peers,
    "table1": table1,
    "table2": table2,
    "table3": table3,
    "table4": table4,
    "table5": table5,
    "table7": table7,
    "pareto": pareto,
}


def make_table(name: str, plan: Plan) -> Table:
    """A table by name; "table6" is Table 4 for Qwen2.5-VL.

    Raises:
      QuotaError: unknown name, or a table of the other model family.
    """
    if name in ("table4", "table6"):
        table = table4(plan)
        if table.name != name:
            raise QuotaError(
                f"{name} belongs to the other model family: for {plan.config.model_type} it is "
                f"{table.name}"
            )
        return table
    if name not in TABLES:
        raise QuotaError(f"no table {name!r}; known: {', '.join((*TABLES, 'table6'))}")
    return TABLES[name](plan)


def all_tables(plan: Plan) -> Sequence[Table]:
    """Every table of the model."""
    return [make(plan) for make in TABLES.values()]


def _label(text: str, seed: int, plan: Plan) -> str:
    return text if len(plan.seeds) == 1 else f"{text} (seed {seed})"
