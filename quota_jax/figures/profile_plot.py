"""Fig. 3 and 5: attention concentration and redundancy of visual tokens per layer."""

from __future__ import annotations

from pathlib import Path

from quota_jax.figures.canvas import BLUE, ORANGE, SHADE, figure, whole_layers
from quota_jax.prune.profile import SERIES, TOP, Profile, Spread

LOOKS = {
    SERIES[0]: (BLUE, "o", "full precision"),
    SERIES[1]: (ORANGE, "s", "quantized"),
}


def draw_profile(profile: Profile, path: Path, label: str = "quantized") -> None:
    """Medians over samples with their quartiles, the proposed candidate layers shaded.

    ``label`` names the quantized model, for example "W4A4KV4".
    """
    panels = (
        (
            "concentration",
            f"Concentration of attention on the top {TOP} visual tokens",
            "part of attention",
        ),
        ("redundancy", "Redundancy of visual tokens", "median pairwise cosine"),
    )
    layers = profile.candidates.layers
    with figure(path, 8.4, 3.2) as made:
        for axis, (metric, title, unit) in zip(made.subplots(1, 2), panels, strict=True):
            axis.axvspan(layers[0] - 0.5, layers[-1] + 0.5, color=SHADE, lw=0, zorder=0)
            depth = 0
            for name, series in profile.series.items():
                spread: Spread = getattr(series, metric)
                color, marker, text = LOOKS[name]
                text = label if name == SERIES[1] else text
                depth = len(spread.median)
                axis.fill_between(
                    range(depth), spread.lower, spread.upper, color=color, alpha=0.22, lw=0
                )
                axis.plot(range(depth), spread.median, color=color, marker=marker, label=text)
            axis.set_title(title)
            axis.set_ylabel(unit)
            if metric == "concentration":
                axis.set_ylim(bottom=0)
            whole_layers(axis, depth)
            axis.text(
                (layers[0] + layers[-1]) / 2,
                0.985,
                "candidates",
                transform=axis.get_xaxis_transform(),
                ha="center",
                va="top",
                fontsize=8,
                color="#555555",
            )
        handles, names = made.axes[0].get_legend_handles_labels()
        made.legend(
            handles,
            [f"{name}, median and quartiles" for name in names],
            loc="outside lower center",
            ncols=2,
        )
