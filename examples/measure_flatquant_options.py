"""What FlatQuant's options and its calibration cost or bring, on the development split.

    python -m quota_jax.testbed.benchmarks bench-dev --split dev
    python examples/measure_flatquant_options.py --data bench-dev --out runs/options

Calibrates a shipped small model once for each variant, answers the first questions of each drawn
benchmark, and writes retention against full precision to OUT/flatquant_options.md and .json.
What was killed goes on. Once the first process has begun to calibrate, others may join it in OUT.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax

from converters import convert
from quota_jax.errors import QuotaError
from quota_jax.quant.calibrate import calibrate
from quota_jax.quant.calibrate_flatquant import FlatQuantOptions
from quota_jax.quant.calibration_data import read_samples
from quota_jax.reproduce.report import write_table
from quota_jax.reproduce.rows import FULL
from quota_jax.reproduce.study import Row, Study
from quota_jax.reproduce.tables import Table
from quota_jax.reproduce.weights import Weights
from quota_jax.testbed import small_model_path
from quota_jax.testbed.benchmarks.writer import MANIFEST
from quota_jax.testbed.samples import write_samples

POOL = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant(Weights):
    """One calibration by FlatQuant. changes: fields of `FlatQuantOptions`."""

    method: str = "flatquant"
    samples: int = 64
    changes: tuple[tuple[str, Any], ...] = (("steps", 240),)

    @property
    def name(self) -> str:
        changed = [f"{field}-{value}" for field, value in self.changes]
        return "_".join([self.bits, f"{self.samples}-samples", *changed])


class Options(Study):
    """A study whose checkpoints are those of variants."""

    def _make(self, weights: Weights, place: Path, first: Any) -> None:
        assert isinstance(weights, Variant)
        samples, options = self.pool[: weights.samples], FlatQuantOptions(**dict(weights.changes))
        calibrate(self.source, place, weights.quantization, samples=samples, options=options)


def rows() -> Iterator[Row]:
    """Full precision, then at each width variants that change one thing, and their combinations."""
    short, keys, clip = ("steps", 240), ("transform_keys", True), ("clip_cache", True)
    yield FULL
    for bits in ("W4A8KV4", "W4A4KV4"):
        for label, samples, changes in (
            ("", 64, (short,)),
            (" P_k", 64, (short, keys)),
            (" clipped cache", 64, (short, clip)),
            (" P_o by heads", 64, (short, ("output_transform", "heads"))),
            (" fed by quantized blocks", 64, (short, ("feed", "quantized"))),
            (" P_k, clipped cache", 64, (short, keys, clip)),
            (" 128 samples, 480 steps", 128, ()),
            (" 256 samples, 960 steps", 256, (("steps", 960),)),
            (" P_k, clipped cache, 128 samples, 480 steps", 128, (keys, clip)),
        ):
            weights = Variant(bits=bits, samples=samples, changes=changes)
            yield Row(label=bits + label, weights=weights)
    for bits in ("W4A8KV16", "W4A16KV4"):
        yield Row(label=bits, weights=Variant(bits=bits))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the drawn development split")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--family", choices=("llava", "qwen2_5_vl"), default="llava")
    parser.add_argument("--limit", type=int, default=250, help="questions of each task")
    parser.add_argument("--seconds", type=float, help="begin nothing new after this time")
    args = parser.parse_args()
    try:
        measure(args)
    except QuotaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def measure(args: argparse.Namespace) -> None:
    until = None if args.seconds is None else time.monotonic() + args.seconds
    source, pool = args.out / "full", args.out / "samples.json"
    args.out.mkdir(parents=True, exist_ok=True)
    if not source.exists():
        convert(small_model_path(args.family), source)
    if not pool.exists():
        write_samples(pool, POOL, family=args.family)
    study = Options(
        source=source,
        data=args.data,
        pool=read_samples(pool),
        out=args.out,
        limit=args.limit,
        max_new_tokens=32,
        text_bucket=96,
        batch_size=64,
    )
    table = Table(
        name="flatquant_options",
        title=f"FlatQuant's options ({args.family})",
        rows=tuple(rows()),
    )
    study.run(table.rows, until=until)
    told = {
        "command": f"python examples/measure_flatquant_options.py --data DATA --out OUT "
        f"--family {args.family} --limit {args.limit}",
        "split": json.loads((args.data / MANIFEST).read_text())["split"],
        "calibration": "64 samples, 240 steps a block where nothing else is said",
        "device": jax.devices()[0].device_kind,
        "versions": f"jax {jax.__version__}",
    }
    _, page, _ = write_table(study, table, args.out, provenance=told)
    print(page.read_text())


if __name__ == "__main__":
    sys.exit(main())
