"""What FlatQuant's options and its calibration cost or bring, on the development split.

    python -m quota_jax.testbed.benchmarks bench-dev --split dev
    python examples/measure_flatquant_options.py --data bench-dev --out runs/options

Calibrates a shipped small model once for each variant, answers the first questions of each drawn
benchmark, and writes retention against full precision: OUT/options.json and OUT/options.md. What
is in OUT already is not made again, so after `--only 'full precision'` several processes may take
some of the variants each; the last one writes the tables of all.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax

from converters import convert
from quota_jax.checkpoint.format import encode_json, write_file
from quota_jax.errors import QuotaError
from quota_jax.evaluate.folder import PREDICTIONS, read_answers
from quota_jax.evaluate.runner import Evaluation
from quota_jax.evaluate.summary import Summary, summarize
from quota_jax.evaluate.tasks import TASKS
from quota_jax.quant.calibrate import calibrate
from quota_jax.quant.calibrate_flatquant import FlatQuantOptions
from quota_jax.quant.calibration_data import read_samples
from quota_jax.quantization import QuantizationConfig
from quota_jax.reproduce.report import percent
from quota_jax.testbed import small_model_path
from quota_jax.testbed.benchmarks.writer import MANIFEST
from quota_jax.testbed.samples import write_samples

FULL = "full precision"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """One calibration. changes: fields of `FlatQuantOptions`."""

    bits: str
    samples: int = 64
    changes: tuple[tuple[str, Any], ...] = (("steps", 240),)


def variants() -> dict[str, Variant]:
    """By name; all but the last ones of each width change one thing."""
    short = ("steps", 240)
    keys, clip = ("transform_keys", True), ("clip_cache", True)
    found = {}
    for bits in ("W4A8KV4", "W4A4KV4"):
        found |= {
            f"{bits}": Variant(bits=bits),
            f"{bits} P_k": Variant(bits=bits, changes=(short, keys)),
            f"{bits} clipped cache": Variant(bits=bits, changes=(short, clip)),
            f"{bits} P_o by heads": Variant(
                bits=bits, changes=(short, ("output_transform", "heads"))
            ),
            f"{bits} fed by quantized blocks": Variant(
                bits=bits, changes=(short, ("feed", "quantized"))
            ),
            f"{bits} P_k, clipped cache": Variant(bits=bits, changes=(short, keys, clip)),
            f"{bits} 128 samples, 480 steps": Variant(bits=bits, samples=128, changes=()),
            f"{bits} 256 samples, 960 steps": Variant(
                bits=bits, samples=256, changes=(("steps", 960),)
            ),
            f"{bits} P_k, clipped cache, 128 samples, 480 steps": Variant(
                bits=bits, samples=128, changes=(keys, clip)
            ),
        }
    found["W4A8KV16"] = Variant(bits="W4A8KV16")
    found["W4A16KV4"] = Variant(bits="W4A16KV4")
    return found


def place_of(out: Path, name: str) -> Path:
    return out / "runs" / name.replace(" ", "_").replace(",", "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the drawn development split")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--family", choices=("llava", "qwen2_5_vl"), default="llava")
    parser.add_argument("--limit", type=int, default=250, help="questions of each task")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="variants that this process runs")
    args = parser.parse_args()
    known = variants()
    try:
        for name in args.only or ():
            if name not in (FULL, *known):
                raise QuotaError(f"no variant {name!r}; known: {', '.join((FULL, *known))}")
        run(args, known)
    except QuotaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run(args: argparse.Namespace, known: dict[str, Variant]) -> None:
    source, pool = args.out / "full", args.out / "samples.json"
    args.out.mkdir(parents=True, exist_ok=True)
    if not source.exists():
        convert(small_model_path(args.family), source)
    if not pool.exists():
        write_samples(pool, 256, family=args.family)
    samples = read_samples(pool)
    questions = {name: task.read(args.data, limit=args.limit) for name, task in TASKS.items()}
    for name in args.only or (FULL, *known):
        folder = place_of(args.out, name)
        if (folder / PREDICTIONS).exists():
            continue
        begun, checkpoint = time.monotonic(), source
        if name != FULL:
            checkpoint = args.out / "checkpoints" / folder.name
            if not checkpoint.exists():
                checkpoint.parent.mkdir(exist_ok=True)
                one = known[name]
                calibrate(
                    source,
                    checkpoint,
                    QuantizationConfig.parse(one.bits, method="flatquant"),
                    samples=samples[: one.samples],
                    options=FlatQuantOptions(**dict(one.changes)),
                )
        calibrated = time.monotonic() - begun
        Evaluation(
            checkpoint=checkpoint,
            tasks=list(TASKS.values()),
            data=args.data,
            out=folder,
            limit=args.limit,
            batch_size=64,
            max_new_tokens=32,
            text_buckets=(96,),
            questions=questions,
        ).run()
        print(f"{name}: {calibrated:.0f} s + {time.monotonic() - begun - calibrated:.0f} s")
    report(args, known, questions)


def report(args: argparse.Namespace, known: dict[str, Variant], questions: dict) -> None:
    """Writes the tables of all variants that were run."""

    def scores(name: str) -> dict[str, Any]:
        answers = read_answers(place_of(args.out, name), questions)
        return {each.name: each.score(questions[each.name], answers[each.name]) for each in tasks}

    tasks = list(TASKS.values())
    done = [n for n in (FULL, *known) if (place_of(args.out, n) / PREDICTIONS).exists()]
    if FULL not in done:
        return
    counts = {name: len(part) for name, part in questions.items()}
    baseline = scores(FULL)
    rows: list[dict[str, Any]] = []
    header = ["", *TASKS, "retention", "above chance"]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for name in done:
        found: Summary = (
            summarize(name, baseline, counts)
            if name == FULL
            else summarize(name, scores(name), counts, baseline, FULL)
        )
        values = {task: part.score.value for task, part in found.tasks.items()}
        means = [
            None if each is None else dataclasses.asdict(each)
            for each in (found.retention, found.corrected)
        ]
        rows.append({"name": name, "scores": values, "retention": means[0], "corrected": means[1]})
        cells = [name, *(f"{value:.1f}" for value in values.values()), *map(percent, means)]
        lines.append(f"| {' | '.join(cells)} |")
    told = {
        "command": f"python examples/measure_flatquant_options.py --data bench-dev --out OUT "
        f"--family {args.family} --limit {args.limit}",
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "split": json.loads((args.data / MANIFEST).read_text())["split"],
        "questions": counts,
    }
    file = args.out / "options.json"
    write_file(file, encode_json({**told, "rows": rows}, str(file)))
    page = "\n".join([*lines, "", *(f"- {key}: {value}" for key, value in told.items()), ""])
    write_file(args.out / "options.md", page.encode())
    print(page)


if __name__ == "__main__":
    sys.exit(main())
