"""The same work in transformers on torch, by a script of the source checkout in its own process.

This package never imports torch; the process also gives its device memory back when it ends.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quota_jax.config import ModelConfig
from quota_jax.config.fields import build
from quota_jax.errors import QuotaError

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "bench_peer.py"


@dataclass(frozen=True, kw_only=True, slots=True)
class PeerResult:
    """One batch size; fields as in ``measurement.BenchResult``. Weights are random, all visual
    tokens are kept, decoding is eager with a growing cache. label: library and precision. device:
    as torch names it. cache_bytes: of keys and values after the new tokens."""

    label: str
    device: str
    versions: str
    batch_size: int
    visual_tokens: int
    text_tokens: int
    new_tokens: int
    first_token: float
    decode_step: float
    weight_bytes: int
    cache_bytes: int
    peak_bytes: int | None
    load: float
    watts: float | None
    joules_per_token: float | None

    @property
    def tokens_per_second(self) -> float:
        return self.batch_size / self.decode_step


def check_peer() -> None:
    """Refuses what is not there before any long work.

    Raises:
      QuotaError: no source checkout around this package, or no torch.
    """
    if not SCRIPT.is_file():
        raise QuotaError(
            f"--peer needs the source checkout: the installed package has no {SCRIPT.name}"
        )
    if importlib.util.find_spec("torch") is None:
        raise QuotaError("--peer needs torch beside this package: pip install torch")


def measure_peer(
    config: ModelConfig,
    *,
    platform: str,
    dtype: str = "bfloat16",
    batch_sizes: Sequence[int] = (1,),
    text_tokens: int = 64,
    new_tokens: int = 32,
) -> list[PeerResult]:
    """Runs the script, which uses a "gpu" or the "cpu" (``platform``) as JAX does.

    Raises:
      QuotaError: the script failed; its last line of errors is told.
    """
    check_peer()
    _, visual_tokens = config.reference_picture
    with tempfile.TemporaryDirectory(prefix="quota_jax_peer_") as folder:
        file = Path(folder) / "config.json"
        file.write_text(json.dumps(config.to_hf()))
        done = subprocess.run(
            [
                *(sys.executable, str(SCRIPT), "--config", str(file)),
                *("--device", "cuda" if platform == "gpu" else "cpu", "--dtype", dtype),
                *("--batch", *map(str, batch_sizes), "--visual", str(visual_tokens)),
                *("--text", str(text_tokens), "--new", str(new_tokens)),
            ],
            capture_output=True,
            text=True,
        )
    if done.returncode:
        errors = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise QuotaError(f"the peer's process failed: {errors[-1]}")
    rows = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return [build(PeerResult, json.loads(line), "a row of the peer") for line in rows]
