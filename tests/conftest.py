"""Platform, compilation cache and markers of the test suite.

The environment variables are set here, before any test module imports jax, and reach the processes
that tests start.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache" / "jax"
CACHE_BYTES = 2**30
ORACLE = "torch==2.13.0"


def pytest_configure(config: pytest.Config) -> None:
    on_gpu = re.search(r"(?<!not )\bgpu\b", config.option.markexpr)
    if not on_gpu:
        os.environ["JAX_PLATFORMS"] = "cpu"
    # Even a program of one operation takes 30 ms to compile and 8 ms to read back: all are kept.
    # JAX's own bound on the folder lists it whole for every entry, so it is cut down here, once;
    # the bound that commands set would fail on entries written without it.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", "-1")
    if not hasattr(config, "workerinput"):
        drop_oldest_programs()
    # transformers' advice on missing packages is no test result.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if "network" not in config.option.markexpr.replace("not network", ""):
        os.environ["HF_HUB_OFFLINE"] = "1"


def drop_oldest_programs() -> None:
    """Keeps the suite's own compilation cache below ``CACHE_BYTES``."""
    entries = sorted(CACHE.glob("*-cache"), key=lambda path: path.stat().st_mtime, reverse=True)
    total = 0
    for path in entries:
        total += path.stat().st_size
        if total > CACHE_BYTES:
            path.unlink(missing_ok=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if importlib.util.find_spec("torch") is not None:
        return
    missing = pytest.mark.skip(
        reason=f"needs {ORACLE} (extra 'oracle'): make test ORACLE=1, or Python 3.11"
    )
    for item in items:
        if item.get_closest_marker("torch"):
            item.add_marker(missing)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import jax

        # Asked for by name, so a machine without one fails instead of passing in silence.
        if jax.default_backend() != "gpu":
            pytest.fail(f"jax sees no GPU (backend {jax.default_backend()!r})", pytrace=False)


@pytest.fixture(scope="module", autouse=True)
def release_after_file() -> Iterator[None]:
    """Frees compiled programs after each file."""
    yield
    if "jax" in sys.modules:
        from quota_jax.programs import release_programs

        release_programs()


@pytest.fixture(autouse=True)
def release_after_test() -> Iterator[None]:
    """Frees them between the tests of a file too where they are many."""
    yield
    if "jax" in sys.modules:
        from quota_jax.programs import release_many_programs

        release_many_programs()


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's top folder."""
    return ROOT
