"""The figures of the paper (QUOTA, arXiv 2604.17320), for the columns beside ours.

They belong to LLaVA-1.5-7B and Qwen2.5-VL-7B on the official benchmarks. Scores are the paper's;
"average" is its average retention in percent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

SIX = ("MMB", "MME", "GQA", "POPE", "SEED", "SQAI")


@dataclass(frozen=True, kw_only=True)
class PaperTable:
    """columns: names of the numbers; rows: label -> numbers (None: not reported)."""

    title: str
    columns: Sequence[str]
    rows: Mapping[str, Sequence[float | None]]

    def markdown(self) -> list[str]:
        """Lines of a Markdown table."""
        lines = [
            f"The paper's own figures, {self.title} (another model and other benchmarks):",
            "",
            f"| | {' | '.join(self.columns)} |",
            f"|---|{'---:|' * len(self.columns)}",
        ]
        for label, values in self.rows.items():
            cells = ("–" if value is None else f"{value:g}" for value in values)
            lines.append(f"| {label} | {' | '.join(cells)} |")
        return lines


_SCORES = (*SIX, "average %")
_RETAINED = ("LLM FLOPs %", "MMB %", "MME %", "GQA %", "POPE %", "SQAI %", "average %")
_DEPLOYED = tuple(
    f"{model} {what} {bits}"
    for model in ("LLaVA", "Qwen")
    for what in ("score", "memory", "power")
    for bits in ("FP16", "INT4")
)

PAPER: dict[str, PaperTable] = {
    "table1": PaperTable(
        title="Table 1, LLaVA-1.5-7B, W4A4KV4",
        columns=_SCORES,
        rows={
            "none": (62.37, 1781.12, 60.45, 85.89, 64.01, 66.09, 100.0),
            "LLM": (56.70, 1700.75, 59.10, 85.37, 61.72, 64.50, 96.26),
            "vision & LLM": (56.19, 1702.59, 59.25, 84.61, 62.50, 62.57, 95.75),
            "vision & projector & LLM": (56.10, 1749.30, 59.25, 84.98, 62.73, 63.16, 96.45),
        },
    ),
    "table2": PaperTable(
        title="Table 2, LLaVA-1.5-7B, W4A4KV4",
        columns=_SCORES,
        rows={
            "50 %": (57.59, 1667.80, 58.13, 85.12, 62.53, 63.86, 95.93),
            "40 %": (57.54, 1689.33, 58.14, 84.54, 62.31, 63.31, 95.81),
            "30 %": (57.47, 1688.72, 57.97, 84.83, 62.10, 62.96, 95.65),
            "20 %": (53.87, 1617.66, 56.54, 83.79, 60.87, 63.61, 93.27),
            "10 %": (53.01, 1608.78, 54.62, 82.46, 59.54, 62.52, 91.55),
            "5 %": (47.51, 1481.74, 52.07, 80.34, 56.64, 61.87, 86.86),
        },
    ),
    "table3": PaperTable(
        title="Table 3, LLaVA-1.5-7B, W4A4KV4, 30 % kept",
        columns=_SCORES,
        rows={
            "full precision": (62.37, 1781.12, 60.45, 85.89, 64.01, 66.09, 100.0),
            "quant-only": (56.10, 1749.30, 59.25, 84.98, 62.73, 63.16, 96.45),
            "prune-only": (60.82, 1752.15, 58.46, 85.10, 62.13, 64.85, 97.81),
            "quantize-then-prune": (56.70, 1652.74, 56.82, 84.28, 61.35, 62.22, 94.30),
            "prune-then-quantize": (56.44, 1654.98, 56.86, 84.54, 60.50, 63.21, 94.34),
            "collaborative": (57.47, 1688.72, 57.97, 84.83, 62.10, 62.96, 95.65),
        },
    ),
    "table4": PaperTable(
        title="Table 4, LLaVA-1.5-7B, retention",
        columns=_RETAINED,
        rows={
            "VTW, FP16": (47.32, 98.60, 97.64, 82.74, 95.69, 99.14, 93.80),
            "PDrop, FP16": (34.03, 95.80, 92.60, 92.10, 97.44, 98.56, 95.30),
            "FastV, FP16": (43.20, 95.80, 96.97, 92.90, 94.41, 99.28, 95.87),
            "DivPrune, FP16": (21.73, 96.58, 93.03, 94.84, 99.18, 98.56, 96.44),
            "GPTQ, W4A16": (100.0, 91.80, 96.61, 99.03, 91.35, None, 94.59),
            "AWQ, W4A16": (100.0, 94.32, 97.04, 99.19, 92.19, None, 95.69),
            "GRACE, W4A16": (100.0, 101.09, None, 98.71, 99.19, 97.91, 99.23),
            "LUQ, W2.54A16": (100.0, 73.66, 87.20, 93.87, 89.54, None, 86.07),
            "QUOTA, W4A4KV4": (40.89, 92.14, 94.81, 95.90, 98.77, 95.26, 95.38),
        },
    ),
    "table5": PaperTable(
        title="Table 5, LLaVA-1.5-7B, W4A4KV4",
        columns=("MMB", "MME", "SQAI", "average %"),
        rows={
            "default": (57.47, 1688.72, 62.96, 94.07),
            "without inter": (55.84, 1642.79, 63.41, 92.57),
            "without magnitude": (57.04, 1654.61, 62.94, 93.20),
            "without intra": (55.84, 1641.96, 63.21, 92.45),
            "without residual": (57.21, 1622.62, 63.76, 93.10),
            "35/35/20/10": (57.39, 1671.27, 63.11, 93.78),
            "35/25/10/30": (56.87, 1682.47, 63.66, 93.99),
            "55/25/10/10": (56.19, 1656.24, 62.57, 92.58),
            "55/15/0/30": (56.44, 1688.99, 62.72, 93.41),
        },
    ),
    "table6": PaperTable(
        title="Table 6, Qwen2.5-VL-7B, retention",
        columns=_RETAINED,
        rows={
            "pruning, FP16": (55.80, 92.20, 97.68, 81.29, 100.16, 95.33, 93.85),
            "VTW, FP16": (43.43, 71.15, 66.82, 66.56, 70.37, 90.87, 73.15),
            "PDrop, FP16": (33.03, 85.58, 86.50, 82.62, 87.87, 94.65, 87.44),
            "FastV, FP16": (32.66, 88.97, 94.36, 87.09, 96.00, 96.48, 92.58),
            "DivPrune, FP16": (24.45, 93.21, 96.95, 82.95, 97.71, 95.18, 93.20),
            "W4A4": (100.0, 95.38, 95.90, 91.76, 99.60, 97.53, 96.35),
            "GPTQ, W4A16": (100.0, 97.09, 96.27, 99.34, 98.49, None, 97.80),
            "AWQ, W4A16": (100.0, 97.94, 97.00, 100.0, 99.42, None, 98.59),
            "LUQ, W2.75A16": (100.0, 77.12, 95.93, 87.44, 98.37, None, 89.72),
            "QUOTA, W4A4": (55.80, 93.22, 94.52, 78.76, 99.93, 96.85, 93.38),
        },
    ),
    "table7": PaperTable(
        title="Table 7, FP16 / INT4; on disk LLaVA-1.5-7B 14.13 / 3.97 GB, Qwen2.5-VL-7B 16.6 / "
        "5.86 GB; peak memory in GB, average power in W",
        columns=_DEPLOYED,
        rows={
            "MMBench": (
                *(62.37, 57.90, 15.59, 6.12, 384.77, 195.39),
                *(83.68, 81.87, 17.36, 7.06, 329.46, 209.60),
            ),
            "SEED-I": (
                *(63.94, 62.21, 15.48, 6.17, 314.77, 95.76),
                *(77.53, 77.46, 17.78, 7.39, 347.64, 293.21),
            ),
            "SQA-I": (
                *(66.24, 63.16, 15.74, 6.27, 315.45, 221.89),
                *(88.25, 86.56, 17.48, 7.43, 322.56, 180.72),
            ),
            "MME": (
                *(1767.46, 1714.72, 14.75, 5.45, 324.37, 196.80),
                *(2332.35, 2265.62, 17.73, 7.33, 316.69, 251.21),
            ),
            "POPE": (
                *(85.59, 85.42, 14.75, 5.45, 385.00, 221.08),
                *(87.76, 86.84, 17.47, 7.25, 331.91, 218.30),
            ),
            "GQA": (
                *(60.65, 59.81, 15.52, 6.22, 345.10, 194.31),
                *(60.65, 59.41, 17.44, 7.25, 325.62, 213.43),
            ),
        },
    ),
}
