"""Work on a study: `python -m quota_jax.reproduce.work FOLDER TABLE ...`, in as many processes as
there is room for. They share what is to be done, and end when all of it is there."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quota_jax.checkpoint.format import encode_json, write_file
from quota_jax.errors import QuotaError
from quota_jax.quant.calibration_data import read_samples
from quota_jax.reproduce.earlier import read_earlier, rows_to_run
from quota_jax.reproduce.study import Study
from quota_jax.reproduce.tables import Plan, make_table

STUDY = "study.json"
SETTINGS = (
    "source", "data", "samples", "num_samples", "steps", "limit", "batch_size", "visual_tokens",
    "max_new_tokens", "text_bucket",
)  # fmt: skip


def begin_study(out: Path, settings: dict[str, Any]) -> Study:
    """Makes the folder of a study, or opens it if it has the same settings (`SETTINGS`).

    Paths are stored absolute. Values of None take the defaults of `Study`.

    Raises:
      QuotaError: the folder holds a study with other settings.
    """
    settings = {
        name: str(Path(value).absolute()) if name in SETTINGS[:3] else value
        for name, value in settings.items()
        if value is not None
    }
    if unknown := set(settings) - set(SETTINGS):
        raise QuotaError(f"a study has no setting {unknown.pop()!r}")
    file = out / STUDY
    if file.exists():
        found = json.loads(file.read_text())
        for name in SETTINGS:
            if found.get(name) != settings.get(name):
                raise QuotaError(
                    f"{out} holds a study with {name} {found.get(name)!r}, not "
                    f"{settings.get(name)!r}; choose another folder"
                )
    else:
        out.mkdir(parents=True, exist_ok=True)
        write_file(file, encode_json(settings, str(file)))
    return open_study(out)


def open_study(out: Path) -> Study:
    """The study in a folder."""
    file = out / STUDY
    if not file.is_file():
        raise QuotaError(f"{out} is no study: it has no {STUDY}")
    found = json.loads(file.read_text())
    own = {name: found[name] for name in SETTINGS[3:] if name in found}
    return Study(
        source=Path(found["source"]),
        data=Path(found["data"]),
        pool=read_samples(found["samples"]),
        out=out,
        **own,
    )


def plan_of(study: Study, seeds: Sequence[int]) -> Plan:
    """What tables of this study are made for."""
    return Plan(
        config=study.reference.config, seeds=tuple(seeds), visual_tokens=study.visual_tokens
    )


def main(argv: Sequence[str] | None = None) -> int:
    """0 all there, 3 time was up, 2 bad input."""
    parser = argparse.ArgumentParser(prog="python -m quota_jax.reproduce.work", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("tables", nargs="+", metavar="TABLE")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--seconds", type=float, help="begin nothing new after this time")
    parser.add_argument("--threads", type=int, default=1, help="rows at a time in this process")
    parser.add_argument("--only", choices=("weights", "runs"), help="what this process does")
    parser.add_argument(
        "--extend", type=Path, help="folder of earlier tables, whose rows are not run again"
    )
    for name in SETTINGS:
        kind = Path if name in SETTINGS[:3] else int
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help="of a new study")
    args = parser.parse_args(argv)
    begun = time.monotonic()
    until = None if args.seconds is None else begun + args.seconds

    def log(line: str) -> None:
        print(f"[{time.monotonic() - begun:6.1f}] {line}", flush=True)

    try:
        if args.source is None:
            study = open_study(args.folder)
        else:
            study = begin_study(args.folder, {name: getattr(args, name) for name in SETTINGS})
        plan = plan_of(study, args.seeds)
        rows = []
        for table in (make_table(name, plan) for name in args.tables):
            file = args.extend and args.extend / f"{table.name}.json"
            rows += rows_to_run(table, read_earlier(file, study, table) if file else None)
        done = study.run(rows, log, until=until, threads=args.threads, only=args.only)
    except QuotaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0 if done else 3


if __name__ == "__main__":
    sys.exit(main())
