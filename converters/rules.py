"""Declarative name rules between Hugging Face tensors and this project's parameters.

A `RuleTable` is data: for each parameter, the Hugging Face tensors whose rows it stacks.
`make_plan` applies a table to a model's blocks and to the names found in a file, and refuses
anything but full coverage: every stored tensor is used exactly once. The same `Plan` drives import
and export, so they cannot disagree.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from converters.hf_reader import some
from quota_jax.errors import QuotaError

_LAYER_BLOCK = re.compile(r".*_layer_(\d+)")


class Shaped(Protocol):
    """Anything with a shape: an array or its abstract description."""

    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """One parameter, and the tensors that make it, joined along the rows in this order.

    `sources` are canonical Hugging Face names with `{layer}` inside repeated layers. With more than
    one source, `rows` names the height of each in the table's `row_sizes`.
    """

    target: str
    sources: tuple[str, ...]
    rows: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.rows) != (len(self.sources) if len(self.sources) > 1 else 0):
            raise ValueError(f"{self.target}: {self.rows} does not match {self.sources}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """How canonical names are spelled on disk: (canonical prefix, stored prefix) pairs.

    The first matching pair counts, so longer prefixes come first; no match keeps the name.
    """

    name: str
    prefixes: tuple[tuple[str, str], ...] = ()

    def stored(self, canonical: str) -> str:
        """The name on disk of a canonical name."""
        for prefix, replacement in self.prefixes:
            if canonical.startswith(prefix):
                return replacement + canonical.removeprefix(prefix)
        return canonical


@dataclass(frozen=True, kw_only=True, slots=True)
class RuleTable:
    """All rules of one model family.

    `row_sizes(config)` gives the heights that rules name. `ignored` are endings of stored names
    that hold no parameter. `tied_copy` is the canonical name of the head, which a file with tied
    embeddings may repeat, and the embedding that it must then equal.
    """

    rules: tuple[Rule, ...]
    layouts: tuple[Layout, ...]
    row_sizes: Callable[[Any], Mapping[str, int]]
    ignored: tuple[str, ...] = ()
    tied_copy: tuple[str, str] | None = None

    def layout(self, name: str) -> Layout:
        """A layout by name; an unknown one is refused."""
        for layout in self.layouts:
            if layout.name == name:
                return layout
        known = ", ".join(layout.name for layout in self.layouts)
        raise QuotaError(f"layout {name!r} is unknown; known: {known}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A stored tensor's name and expected shape."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Assignment:
    """One parameter of a block and the stored tensors that make it, top rows first."""

    param: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    def split(self, array: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """(stored name, its rows) of a parameter, without copies."""
        if array.shape != self.shape:
            raise QuotaError(f"parameter {self.param} has shape {array.shape}, not {self.shape}")
        if len(self.pieces) == 1:
            yield self.pieces[0].name, array
            return
        start = 0
        for piece in self.pieces:
            yield piece.name, array[start : start + piece.shape[0]]
            start += piece.shape[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Which stored tensors fill which block; `tied_copy` is a repeated head and its embedding."""

    layout: str
    blocks: Mapping[str, tuple[Assignment, ...]]
    tied_copy: tuple[str, str] | None = None

    def names(self) -> Iterator[str]:
        """Every stored name that fills a parameter."""
        for assignments in self.blocks.values():
            for assignment in assignments:
                for piece in assignment.pieces:
                    yield piece.name


def assign(
    table: RuleTable,
    config: Any,
    blocks: Mapping[str, Mapping[str, Shaped]],
    layout: Layout,
    *,
    tied_copy: bool = False,
) -> Plan:
    """The plan that a model needs under a layout, whether or not a file offers it."""
    rules = {rule.target: rule for rule in table.rules}
    heights = table.row_sizes(config)
    planned = {}
    for block, params in blocks.items():
        match = _LAYER_BLOCK.fullmatch(block)
        layer = int(match.group(1)) if match else None
        planned[block] = tuple(
            _assignment(rules[param], tuple(abstract.shape), heights, layout, layer)
            for param, abstract in params.items()
        )
    pair = None
    if tied_copy and table.tied_copy:
        head, embedding = table.tied_copy
        pair = layout.stored(head), layout.stored(embedding)
    plan = Plan(layout=layout.name, blocks=planned, tied_copy=pair)
    names = list(plan.names())
    if len(names) != len(set(names)):
        raise ValueError(f"the rules use a tensor twice: {sorted(names)}")
    return plan


def _assignment(
    rule: Rule,
    shape: tuple[int, ...],
    heights: Mapping[str, int],
    layout: Layout,
    layer: int | None,
) -> Assignment:
    names = [layout.stored(source.format(layer=layer)) for source in rule.sources]
    if not rule.rows:
        pieces = (Piece(name=names[0], shape=shape),)
    else:
        pieces = tuple(
            Piece(name=name, shape=(heights[rows], *shape[1:]))
            for name, rows in zip(names, rule.rows, strict=True)
        )
        if sum(piece.shape[0] for piece in pieces) != shape[0]:
            raise ValueError(f"{rule.target}: rows of {pieces} do not add up to {shape}")
    return Assignment(param=rule.target, shape=shape, pieces=pieces)


def make_plan(
    table: RuleTable,
    config: Any,
    blocks: Mapping[str, Mapping[str, Shaped]],
    stored: Mapping[str, Shaped],
    where: str,
) -> Plan:
    """Finds the layout that fits a file best and requires it to fit exactly.

    Raises one line that names missing, unknown and wrongly shaped tensors (a few of each, counted).
    `where` is the file or folder for that line.
    """
    offered = {name: info for name, info in stored.items() if not name.endswith(table.ignored)}
    plans = [assign(table, config, blocks, layout) for layout in table.layouts]
    plan = max(plans, key=lambda p: sum(name in offered for name in p.names()))
    layout = table.layout(plan.layout)

    unused = set(offered) - set(plan.names())
    if table.tied_copy and layout.stored(table.tied_copy[0]) in unused:
        # The model has no head of its own, so this one repeats the embedding.
        plan = assign(table, config, blocks, layout, tied_copy=True)
        unused.discard(layout.stored(table.tied_copy[0]))

    expected = {p.name: p for parts in plan.blocks.values() for a in parts for p in a.pieces}
    missing = [name for name in expected if name not in offered]
    misshapen = [
        f"{name} is {tuple(offered[name].shape)}, expected {piece.shape}"
        for name, piece in expected.items()
        if name in offered and tuple(offered[name].shape) != piece.shape
    ]
    problems = [
        f"{len(names)} {what}: {some(names)}"
        for what, names in (
            ("missing tensors" if len(missing) > 1 else "missing tensor", missing),
            ("unknown tensors" if len(unused) > 1 else "unknown tensor", sorted(unused)),
            ("of wrong shape", misshapen),
        )
        if names
    ]
    if problems:
        raise QuotaError(f"{where} does not fit its config.json: {'; '.join(problems)}")
    return plan
