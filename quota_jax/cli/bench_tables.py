"""The tables of ``quota-jax bench``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from quota_jax.cli.console import size, table

if TYPE_CHECKING:
    from quota_jax.bench import BenchResult
    from quota_jax.bench.first_answer import ColdAndWarm, FirstAnswer
    from quota_jax.bench.peer import PeerResult
    from quota_jax.bench.programs import Compilation
    from quota_jax.bench.roofline import Peaks


def describe(result: BenchResult | PeerResult) -> str:
    """One row in one line."""
    return (
        f"{result.label}, keep {keep_of(result):g}, batch {result.batch_size}: first token "
        f"{milliseconds(result.first_token)}, {result.tokens_per_second:.0f} tokens/s"
    )


def keep_of(result: BenchResult | PeerResult) -> float:
    """A peer keeps all tokens."""
    return getattr(result, "keep", 1.0)


def speed_table(results: Sequence[BenchResult], peers: Sequence[PeerResult] = ()) -> str:
    """Speed, memory, and what it took to start; power where any row knows it.

    Lowering and compilation: the prefill's and the decode program's. "(c)": read from JAX's
    persistent compilation cache instead of compiled.
    """
    rows: list[list[object]] = []
    every = [*results, *peers]
    power = any(each.joules_per_token is not None for each in every)
    for each in every:
        row: list[object] = [
            each.label,
            f"{100 * keep_of(each):g} %",
            each.batch_size,
            milliseconds(each.first_token),
            f"{1e3 * each.decode_step:.2f} ms",
            f"{each.tokens_per_second:.0f}",
        ]
        if power:
            known = each.watts is not None and each.joules_per_token is not None
            row += [f"{each.watts:.0f}", f"{each.joules_per_token:.3f}"] if known else ["-", "-"]
        row += [
            size(each.weight_bytes),
            size(each.cache_bytes),
            size(each.peak_bytes) if each.peak_bytes else "-",
            "-" if each.load is None else f"{each.load:.1f} s",
        ]
        rows.append([*row, *_starting(each)])
    header = ["precision", "tokens kept", "batch", "first token", "step", "tokens/s"]
    header += ["watts", "J/token"] if power else []
    header += ["weights", "cache", "peak so far", "load", "lowering", "compile"]
    text = table(header, rows)
    if any(c.cached for r in results for c in (r.prefill_compilation, r.decode_compilation)):
        text += "\n(c): read from JAX's compilation cache instead of compiled"
    for versions in dict.fromkeys(f"{peer.versions}, {peer.device}" for peer in peers):
        text += f"\ntransformers: {versions}, eager, random weights, all tokens"
    return text


def _starting(result: BenchResult | PeerResult) -> tuple[str, str]:
    from quota_jax.bench import BenchResult

    if not isinstance(result, BenchResult):
        return "-", "-"
    pair = (result.prefill_compilation, result.decode_compilation)
    lowering = " + ".join(f"{each.lowering:.1f}" for each in pair)
    return f"{lowering} s", " + ".join(map(_compiling, pair)) + " s"


def _compiling(each: Compilation) -> str:
    return f"{each.compiling:.1f}{' (c)' if each.cached else ''}"


def floor_table(results: Sequence[BenchResult], peaks: Peaks) -> str:
    """Measured times beside the least that the device's peaks allow."""
    rows = []
    for each in results:
        first, step = peaks.seconds(each.prefill_work), peaks.seconds(each.decode_work)
        rows.append(
            (
                each.label,
                f"{100 * each.keep:g} %",
                each.batch_size,
                milliseconds(first),
                milliseconds(each.first_token),
                f"{each.first_token / first:.1f} x",
                f"{1e3 * step:.3f} ms",
                f"{1e3 * each.decode_step:.3f} ms",
                f"{each.decode_step / step:.1f} x",
            )
        )
    header = (
        *("precision", "tokens kept", "batch"),
        *("first token at least", "measured", "ratio", "step at least", "measured", "ratio"),
    )
    return table(header, rows)


def answer_table(answers: Sequence[ColdAndWarm]) -> str:
    """Seconds from the start of a process to its first answer, part by part."""
    rows: list[Sequence[object]] = []
    for each in answers:
        for cache, answer in (("empty", each.cold), ("filled", each.warm)):
            kept = f"{100 * each.keep:g} %"
            rows.append((each.label, kept, each.batch_size, cache, *_parts(answer)))
    header = (
        *("first answer", "tokens kept", "batch", "program cache"),
        *("start-up", "load", "lowering", "compile", "run", "total"),
    )
    weights = "weights of the checkpoint" if answers[0].checkpoint else "random weights"
    return f"{table(header, rows)}\nload: {weights}; run: {answers[0].new_tokens} tokens"


def _parts(answer: FirstAnswer) -> list[str]:
    names = ("start_up", "load", "lowering", "compiling", "run", "total")
    return [f"{getattr(answer, name):.2f} s" for name in names]


def milliseconds(seconds: float) -> str:
    """``12.3 ms``; small values keep three digits."""
    value = 1e3 * seconds
    return f"{value:.1f} ms" if value >= 10 else f"{value:.3g} ms"
