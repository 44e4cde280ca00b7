"""Accuracy against speed and memory, over precisions, pruned and not."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quota_jax.figures.canvas import BLUE, GREEN, ORANGE, PINK, RED, SKY, figure

COLORS = (BLUE, ORANGE, GREEN, PINK, SKY, RED)
MARKERS = ("o", "s", "^", "D", "v", "P")


@dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    """One cost on the horizontal axis. better: "lower" or "higher"."""

    title: str
    unit: str
    better: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Mark:
    """One model. costs: one for each panel. score, low, high: on the vertical axis. precision: has
    a color; kept: has a marker. front: for each panel, whether no other mark is at least as good
    in both and better in one."""

    precision: str
    kept: str
    costs: tuple[float, ...]
    score: float
    low: float
    high: float
    front: tuple[bool, ...]


def draw_pareto(
    rows: Sequence[tuple[str, Sequence[Mark]]],
    panels: Sequence[Panel],
    path: Path,
    *,
    score: str,
    title: str = "",
) -> None:
    """A row of panels for each of ``rows``, its name and marks; marks of one precision are joined
    by a thin line, those on the front are filled, the others hollow."""
    marks = [mark for _, part in rows for mark in part]
    colors = _looks([mark.precision for mark in marks], COLORS)
    shapes = _looks([mark.kept for mark in marks], MARKERS)
    lines = textwrap.wrap(title, 130)
    with figure(path, 3.3 * len(panels), 2.9 * len(rows) + 0.6 + 0.2 * len(lines)) as made:
        grid = made.subplots(len(rows), len(panels), squeeze=False, sharey=True)
        for (name, part), axes in zip(rows, grid, strict=True):
            for place, (axis, panel) in enumerate(zip(axes, panels, strict=True)):
                _panel(axis, part, place, colors, shapes)
                axis.set_title(f"{panel.title}, {name}" if name else panel.title)
                arrow = "← better" if panel.better == "lower" else "better →"
                axis.set_xlabel(f"{panel.unit}   ({arrow})")
            axes[0].set_ylabel(score)
        _legend(made, colors, shapes)
        if lines:
            made.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=9)


def _panel(
    axis: Any,
    marks: Sequence[Mark],
    place: int,
    colors: dict[str, str],
    shapes: dict[str, str],
) -> None:
    axis.grid(True, axis="both")
    for precision, color in colors.items():
        own = sorted((m for m in marks if m.precision == precision), key=lambda m: m.costs[place])
        axis.plot(
            [m.costs[place] for m in own], [m.score for m in own], color=color, lw=0.8, alpha=0.6
        )
        for mark in own:
            axis.errorbar(
                mark.costs[place],
                mark.score,
                yerr=[[max(0.0, mark.score - mark.low)], [max(0.0, mark.high - mark.score)]],
                color=color,
                marker=shapes[mark.kept],
                markersize=6.5,
                markerfacecolor=color if mark.front[place] else "white",
                elinewidth=0.8,
                capsize=2,
            )
    axis.set_xlim(left=0)
    axis.margins(x=0.12)


def _legend(made: Any, colors: dict[str, str], shapes: dict[str, str]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=color, lw=3, label=name) for name, color in colors.items()]
    grey = {"color": "#555555", "lw": 0, "markersize": 6.5}
    handles += [Line2D([], [], marker=shape, label=n, **grey) for n, shape in shapes.items()]
    handles.append(
        Line2D(
            [], [], marker="o", markerfacecolor="white", label="hollow: not on the front", **grey
        )
    )
    made.legend(handles=handles, loc="outside lower center", ncols=len(handles))


def _looks(names: Sequence[str], choices: Sequence[str]) -> dict[str, str]:
    different = list(dict.fromkeys(names))
    return {name: choices[place % len(choices)] for place, name in enumerate(different)}
