"""Seven benchmarks of drawn scenes in the official file formats.

`python -m quota_jax.testbed.benchmarks OUT --split dev|test` writes them; the questions of both
splits, and which pictures are drawn in the held-out style (three of ten), are fixed by the hashes
in `frozen.json`.
"""

from __future__ import annotations

from typing import Any

__all__ = ["FAMILIES", "SPLITS", "build_family", "write_benchmarks"]


def __getattr__(name: str) -> Any:
    # Drawing needs jax and Pillow; the package itself does not.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.writer"), name)
