"""What all figures share: matplotlib on use, one look, files written in one piece."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from quota_jax.checkpoint.format import write_file
from quota_jax.errors import QuotaError

# Okabe and Ito's colours, told apart with every kind of colour vision.
BLUE, ORANGE, GREEN, PINK, SKY, RED = (
    *("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"),
)
SHADE = "#ECECEC"
# Dates and versions in a file would make equal figures differ.
METADATA: dict[str, dict[str, Any]] = {
    ".png": {"Software": None},
    ".pdf": {"CreationDate": None, "Creator": None, "Producer": None},
    ".svg": {"Date": None, "Creator": None},
}
STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.grid.axis": "y",
    "grid.color": "#D9D9D9",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "legend.frameon": False,
    "svg.hashsalt": "quota_jax",
}


def check_plots(path: Path | None = None) -> None:
    """Refuses what cannot be drawn before any long work: no matplotlib, an unknown file name."""
    if path is not None:
        if path.suffix.lower() not in METADATA:
            raise QuotaError(f"{path}: figures are written as {', '.join(METADATA)}")
        if not path.parent.is_dir():
            raise QuotaError(f"{path.parent}: no such folder")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise QuotaError("figures need matplotlib: pip install 'quota-jax[plots]'") from None


@contextmanager
def figure(path: Path, width: float, height: float) -> Iterator[Any]:
    """An empty figure of this size in inches; written to ``path`` at the end, by one rename."""
    check_plots(path)
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        made = Figure(figsize=(width, height), dpi=160, layout="constrained")
        FigureCanvasAgg(made)  # no window, whatever the user's settings
        yield made
        buffer, suffix = io.BytesIO(), path.suffix.lower()
        made.savefig(buffer, format=suffix[1:], metadata=METADATA[suffix])
    write_file(path, buffer.getvalue())


def whole_layers(axis: Any, depth: int) -> None:
    """Layers on the horizontal axis: whole numbers, all of them within sight."""
    from matplotlib.ticker import MaxNLocator

    axis.set_xlabel("decoder layer (from 0)")
    axis.set_xlim(-0.5, depth - 0.5)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=9, integer=True, min_n_ticks=1))
