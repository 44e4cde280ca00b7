"""Command line: `python -m quota_jax.testbed.benchmarks OUT --split dev|test`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from quota_jax.errors import QuotaError


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the benchmarks; exit status 0 done, 2 bad input, 130 interrupted."""
    # Pictures are drawn on the CPU, whatever else is there: the same pixels everywhere.
    os.environ["JAX_PLATFORMS"] = "cpu"
    from quota_jax.testbed.benchmarks.writer import FAMILIES, SPLITS, STYLES, write_benchmarks

    parser = argparse.ArgumentParser(
        prog="python -m quota_jax.testbed.benchmarks",
        description="Write seven benchmarks of drawn scenes in the official file formats.",
        epilog="example: python -m quota_jax.testbed.benchmarks bench-dev --split dev --limit 100",
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="new folder, or one to complete")
    parser.add_argument("--split", required=True, help=f"one of {', '.join(SPLITS)}")
    parser.add_argument("--limit", type=int, help="first questions of each family only")
    parser.add_argument(
        "--families", default=",".join(FAMILIES), help="comma-separated; default: all seven"
    )
    parser.add_argument("--style", default=STYLES[0], help=f"one of {', '.join(STYLES)}")
    arguments = parser.parse_args(argv)
    try:
        manifest = write_benchmarks(
            arguments.out,
            split=arguments.split,
            limit=arguments.limit,
            families=tuple(name for name in arguments.families.split(",") if name),
            style=arguments.style,
        )
    except QuotaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted; the same command goes on", file=sys.stderr)
        return 130
    for name, record in manifest["families"].items():
        print(
            f"{name:<10} {record['questions']:>6} questions, {len(record['pictures']):>5} pictures"
        )
    print(f"written: {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
