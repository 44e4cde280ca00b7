"""Measured prefills and decode steps under the roofs of their device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from quota_jax.bench.roofline import Peaks
from quota_jax.figures.canvas import BLUE, GREEN, ORANGE, PINK, RED, SKY, figure

COLORS = (BLUE, ORANGE, GREEN, PINK, SKY, RED)
MARKS = {"prefill": ("o", "first token"), "decode": ("s", "decode")}
SIZE = (8.4, 5.6)
AXES = (7.6, 4.6)
"""Inches of the figure, and about those of its axes."""
LINE = 0.14
"""Inches from one line of a label to the next."""
NEAR = 0.12
"""Inches: points that are nearer to each other share a label."""
ROOF = 0.62
"""Part of the height below the upper roof; labels of prefills stand above it."""
GREY = "#555555"


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One measured stage. series: its precision, which has a color. kept: fraction of the visual
    tokens that is left. x: operations per byte that must be moved; y: operations per second."""

    series: str
    kept: float
    batch_size: int
    stage: Literal["prefill", "decode"]
    x: float
    y: float


def draw_roofline(points: Sequence[Point], peaks: Peaks, path: Path, *, title: str) -> None:
    """The roofs of bfloat16 and int8 over the points; those of pruned rows are hollow."""
    names = list(dict.fromkeys(point.series for point in points))
    colors = {name: COLORS[place % len(COLORS)] for place, name in enumerate(names)}
    with figure(path, *SIZE) as made:
        axis = made.subplots()
        axis.set_title(title)
        axis.grid(True, axis="both")
        axis.set(xscale="log", yscale="log", xlabel="operations per byte")
        axis.set_ylabel("10$^{12}$ operations per second")
        _limits(axis, points, peaks)
        _roofs(axis, peaks)
        for point in points:
            axis.plot(
                point.x,
                point.y / 1e12,
                marker=MARKS[point.stage][0],
                color=colors[point.series],
                markerfacecolor=colors[point.series] if point.kept == 1 else "white",
                markersize=6,
                linestyle="none",
            )
        # Prefills lie side by side and are labelled upwards, decode steps lie on a slope and are
        # labelled to its free side.
        _label(axis, [p for p in points if p.stage == "prefill"], upwards=True)
        _label(axis, [p for p in points if p.stage == "decode"], upwards=False)
        _legend(made, colors, any(point.kept < 1 for point in points))


def label_of(points: Sequence[Point]) -> list[str]:
    """Lines that name points: precision, batch size, and what is kept of the tokens."""
    kept: dict[tuple[str, int], list[str]] = {}
    for point in points:
        kept.setdefault((point.series, point.batch_size), []).append(f"{100 * point.kept:g}")
    return [f"{name}, batch {size}: {', '.join(v)} %" for (name, size), v in kept.items()]


def spread_out(wanted: Sequence[float], sizes: Sequence[float], low: float, high: float):
    """Middles near the ``wanted`` ones, in their order, of pieces of these ``sizes`` that do not
    overlap and lie in [low, high] as far as they fit."""
    order = sorted(range(len(wanted)), key=wanted.__getitem__)
    found, end = [0.0] * len(wanted), low
    for place in order:
        found[place] = max(wanted[place], end + sizes[place] / 2)
        end = found[place] + sizes[place] / 2
    end = high
    for place in reversed(order):
        found[place] = min(found[place], end - sizes[place] / 2)
        end = found[place] - sizes[place] / 2
    return found


def _limits(axis: Any, points: Sequence[Point], peaks: Peaks) -> None:
    top = max(peaks.float_ops, peaks.integer_ops)
    left = min(p.x for p in points) / 3
    axis.set_xlim(left, 4 * max(max(p.x for p in points), top / peaks.bandwidth))
    low = min(min(p.y for p in points) / 8, peaks.bandwidth * left / 2) / 1e12
    axis.set_ylim(low, low * (1.3 * top / 1e12 / low) ** (1 / ROOF))
    # Nothing is as fast as the part where the labels stand.
    exponents = range(math.ceil(math.log10(low)), math.floor(math.log10(2 * top / 1e12)) + 1)
    axis.set_yticks([10.0**exponent for exponent in exponents])
    axis.minorticks_off()


def _roofs(axis: Any, peaks: Peaks) -> None:
    left, right = axis.get_xlim()
    # White behind the words: lines to labels may pass there.
    words = {"fontsize": 8, "color": GREY, "textcoords": "offset points", "va": "bottom"}
    words["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
    for name, peak, dash in (
        ("bf16", peaks.float_ops, "-"),
        ("int8", peaks.integer_ops, "--"),
    ):
        xs = [left, peak / peaks.bandwidth, right]
        ys = [min(peak, peaks.bandwidth * x) / 1e12 for x in xs]
        axis.plot(xs, ys, color=GREY, lw=1.2, linestyle=dash)
        end = (right, peak / 1e12)
        axis.annotate(f"{name}: {peak / 1e12:.4g}", end, xytext=(-2, 1), ha="right", **words)
    middle = math.sqrt(left * peaks.float_ops / peaks.bandwidth)
    slope = (middle, peaks.bandwidth * middle / 1e12)
    text = f"memory: {peaks.bandwidth / 1e12:.4g} TB/s"
    axis.annotate(text, slope, xytext=(-8, 4), ha="right", **words)


def _label(axis: Any, points: Sequence[Point], *, upwards: bool) -> None:
    """Names groups of near points: above the roofs, read upwards, or to the right of them."""
    to_axes = axis.transData + axis.transAxes.inverted()
    place = {p: to_axes.transform((p.x, p.y / 1e12)) * AXES for p in points}
    groups = _near(points, place)
    texts = ["\n".join(label_of(group)) for group in groups]
    sizes = [LINE * (text.count("\n") + 1) + 0.06 for text in texts]
    spots = [place[group[0]] for group in groups]
    if upwards:
        middles = spread_out([x for x, _ in spots], sizes, 0, AXES[0])
        targets = [(middle, ROOF * AXES[1] + 0.3) for middle in middles]
        look = {"rotation": 90, "ha": "center", "va": "bottom"}
    else:
        middles = spread_out([y - 0.25 for _, y in spots], sizes, 0.05, AXES[1])
        targets = [(x + 0.35, middle) for (x, _), middle in zip(spots, middles, strict=True)]
        look = {"ha": "left", "va": "center"}
    for text, spot, target in zip(texts, spots, targets, strict=True):
        axis.annotate(
            text,
            spot / AXES,
            xycoords="axes fraction",
            xytext=(target[0] / AXES[0], target[1] / AXES[1]),
            textcoords="axes fraction",
            fontsize=7.5,
            **look,
        )
        # Its own line: an arrow would point to the middle of a text, through it.
        ends = [(spot / AXES), (target[0] / AXES[0], target[1] / AXES[1])]
        axis.plot(*zip(*ends, strict=True), color="#AAAAAA", lw=0.6, transform=axis.transAxes)


def _near(points: Sequence[Point], place: dict[Point, Any]) -> list[list[Point]]:
    """Groups such that every point is near the first one of its group."""
    groups: list[list[Point]] = []
    for point in points:
        for group in groups:
            if math.dist(place[group[0]], place[point]) < NEAR:
                group.append(point)
                break
        else:
            groups.append([point])
    return groups


def _legend(made: Any, colors: dict[str, str], pruned: bool) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=color, lw=3, label=name) for name, color in colors.items()]
    grey = {"color": GREY, "lw": 0, "markersize": 6}
    handles += [Line2D([], [], marker=mark, label=text, **grey) for mark, text in MARKS.values()]
    if pruned:
        hollow = {"markerfacecolor": "white", "label": "hollow: pruned"}
        handles.append(Line2D([], [], marker="o", **hollow, **grey))
    made.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 6))
