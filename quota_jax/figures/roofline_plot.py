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
LINE, LETTER = 0.14, 0.062
"""Inches from one line of a label to the next, and from letter to letter."""
NEAR = 0.12
"""Inches: points that are nearer to each other share a label."""
ROOF = 0.62
"""Part of the height below the upper roof; labels of prefills stand above it."""
GREY = "#555555"
Spot = tuple[float, float]


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
        obstacles = [_inches(axis, p.x, p.y) for p in points] + _along_roof(axis, peaks)
        _label(axis, [p for p in points if p.stage == "prefill"], obstacles, upwards=True)
        _label(axis, [p for p in points if p.stage == "decode"], obstacles, upwards=False)
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


def _along_roof(axis: Any, peaks: Peaks) -> list[Spot]:
    """Places on the lower roof, close to each other."""
    left, right = map(math.log, axis.get_xlim())
    xs = [math.exp(left + (right - left) * step / 100) for step in range(101)]
    return [_inches(axis, x, min(peaks.float_ops, peaks.bandwidth * x)) for x in xs]


def _roofs(axis: Any, peaks: Peaks) -> None:
    left, right = axis.get_xlim()
    # White behind the words: lines to labels may pass there.
    words: dict[str, Any] = {"fontsize": 8, "color": GREY, "va": "bottom"}
    words |= {"textcoords": "offset points"}
    words["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
    for name, peak, dash in (
        ("bf16", peaks.float_ops, "-"),
        ("int8", peaks.integer_ops, "--"),
    ):
        xs = [left, peak / peaks.bandwidth, right]
        ys = [min(peak, peaks.bandwidth * x) / 1e12 for x in xs]
        axis.plot(xs, ys, color=GREY, lw=1.2, linestyle=dash)
        end = (right, peak / 1e12)
        axis.annotate(f"{name}: {peak / 1e12:.4g}", end, xytext=(-2, 2.5), ha="right", **words)
    middle = math.sqrt(left * peaks.float_ops / peaks.bandwidth)
    slope = (middle, peaks.bandwidth * middle / 1e12)
    text = f"memory: {peaks.bandwidth / 1e12:.4g} TB/s"
    axis.annotate(text, slope, xytext=(-8, 4), ha="right", **words)


def _label(axis: Any, points: Sequence[Point], obstacles: Sequence[Spot], *, upwards: bool) -> None:
    """Names groups of near points: above the roofs, read upwards, or where there is room around
    them. ``obstacles`` in inches."""
    place = {p: _inches(axis, p.x, p.y) for p in points}
    groups = _near(points, place)
    texts = [label_of(group) for group in groups]
    spots = [place[group[0]] for group in groups]
    if upwards:
        sizes = [LINE * len(lines) + 0.06 for lines in texts]
        middles = spread_out([x for x, _ in spots], sizes, 0, AXES[0])
        targets = [(middle, ROOF * AXES[1] + 0.3) for middle in middles]
        look = {"rotation": 90, "ha": "center", "va": "bottom"}
    else:
        boxes = [(LETTER * max(map(len, lines)), LINE * len(lines)) for lines in texts]
        targets = find_room(spots, boxes, obstacles)
        look = {"ha": "left", "va": "center"}
    for lines, spot, target in zip(texts, spots, targets, strict=True):
        (x, y), (end_x, end_y) = ((at[0] / AXES[0], at[1] / AXES[1]) for at in (spot, target))
        text = "\n".join(lines)
        axis.text(end_x, end_y, text, transform=axis.transAxes, fontsize=7.5, **look)
        axis.plot([x, end_x], [y, end_y], color="#AAAAAA", lw=0.6, transform=axis.transAxes)


def find_room(
    spots: Sequence[Spot], boxes: Sequence[Spot], obstacles: Sequence[Spot]
) -> list[Spot]:
    """Middles of the left edges of boxes (width, height) right of their spots, as near as they can
    be without covering an obstacle or each other; where there is no room, the nearest place."""
    steps = [(0.3 + 0.2 * right, 0.12 * up) for right in range(8) for up in range(-15, 10)]
    steps.sort(key=lambda step: math.hypot(step[0], step[1] + 0.2))
    taken: list[tuple[float, float, float, float]] = []
    found: list[Spot] = [(0.0, 0.0)] * len(spots)
    # From the top down: lines to labels then cross less often.
    for place in sorted(range(len(spots)), key=lambda place: -spots[place][1]):
        (x, y), (width, height) = spots[place], boxes[place]
        for right, up in steps:
            left, low = x + right, y + up - height / 2
            box = (left, low, left + width, low + height)
            inside = box[1] > 0.05 and box[2] < AXES[0]
            hidden = any(_covers(box, spot) for spot in obstacles)
            if inside and not hidden and not any(_overlap(box, other) for other in taken):
                break
        else:
            right, up = steps[0]
            box = (x + right, y + up - height / 2, x + right + width, y + up + height / 2)
        taken.append(box)
        found[place] = (x + right, y + up)
    return found


def _covers(box: tuple[float, float, float, float], spot: Spot) -> bool:
    """Whether a marker at ``spot`` touches the box."""
    return box[0] - 0.08 < spot[0] < box[2] + 0.08 and box[1] - 0.08 < spot[1] < box[3] + 0.08


def _overlap(
    one: tuple[float, float, float, float], two: tuple[float, float, float, float]
) -> bool:
    return one[0] < two[2] and two[0] < one[2] and one[1] < two[3] and two[1] < one[3]


def _inches(axis: Any, x: float, y: float) -> Spot:
    """Where operations per byte and per second lie, in inches from the axes' lower left corner."""
    to_axes = axis.transData + axis.transAxes.inverted()
    across, up = to_axes.transform((x, y / 1e12))
    return float(across) * AXES[0], float(up) * AXES[1]


def _near(points: Sequence[Point], place: dict[Point, Spot]) -> list[list[Point]]:
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
