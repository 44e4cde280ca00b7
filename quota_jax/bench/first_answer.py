"""Seconds from the start of a process to its first answer, with and without compiled programs.

``time_first_answer`` starts ``python -m quota_jax.bench.first_answer`` twice with the same folder
for JAX's persistent compilation cache: empty (cold), then as the first run left it (warm). Files of
a checkpoint may lie in the operating system's page cache both times.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quota_jax.config import ModelConfig
from quota_jax.errors import QuotaError
from quota_jax.quantization import QuantizationConfig
from quota_jax.recipe import Recipe


@dataclass(frozen=True, kw_only=True, slots=True)
class FirstAnswer:
    """Seconds. start_up: from the start of the process until the library is imported and the device
    is found. load: weights to the device, read from the checkpoint or made there. lowering,
    compiling: of prefill and decoding. run: one batch to the last of its new tokens. total: all of
    it. cached: executables came from the compilation cache."""

    start_up: float
    load: float
    lowering: float
    compiling: float
    run: float
    total: float
    cached: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class ColdAndWarm:
    """Of one precision and recipe at one batch size. checkpoint: its folder, None where the weights
    were random."""

    label: str
    keep: float
    batch_size: int
    new_tokens: int
    checkpoint: str | None
    cold: FirstAnswer
    warm: FirstAnswer


def time_first_answer(
    recipe: Recipe,
    *,
    checkpoint: Path | None = None,
    config: ModelConfig | None = None,
    quantization: QuantizationConfig | None = None,
    batch_size: int = 1,
    text_tokens: int = 64,
    new_tokens: int = 32,
) -> ColdAndWarm:
    """Of a checkpoint, or of random weights of this shape and precision in bfloat16.

    The caller must leave room on the device.

    Raises:
      QuotaError: a process failed; its last line of errors is told.
    """
    task = {
        "checkpoint": None if checkpoint is None else str(checkpoint),
        "config": None if config is None else config.to_json(),
        "quantization": None if quantization is None else quantization.to_json(),
        "recipe": recipe.to_json(),
        "batch_size": batch_size,
        "text_tokens": text_tokens,
        "new_tokens": new_tokens,
    }
    with tempfile.TemporaryDirectory(prefix="quota_jax_programs_") as programs:
        environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": programs}
        (label, cold), (_, warm) = (_timed(task, environment) for _ in range(2))
    return ColdAndWarm(
        label=label,
        keep=recipe.stages[-1].keep if recipe.stages else 1.0,
        batch_size=batch_size,
        new_tokens=new_tokens,
        checkpoint=task["checkpoint"],
        cold=cold,
        warm=warm,
    )


def find_device(*, apart: bool) -> tuple[str, str]:
    """Platform ("gpu", "cpu", ...) and kind of JAX's first device; ``apart``: found by a process of
    its own, so that this one takes no device memory.

    Raises:
      QuotaError: that process failed.
    """
    if not apart:
        import jax

        return jax.devices()[0].platform, jax.devices()[0].device_kind
    code = "import jax; d = jax.devices()[0]; print(d.platform); print(d.device_kind)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    platform, kind = _output(done, "that looks for the device").splitlines()[-2:]
    return platform, kind


def _output(done: subprocess.CompletedProcess[str], what: str) -> str:
    """Standard output of a process; one that failed is a QuotaError with its last words."""
    if done.returncode:
        errors = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise QuotaError(f"the process {what} failed: {errors[-1]}")
    return done.stdout


def _timed(task: Mapping[str, Any], environment: Mapping[str, str]) -> tuple[str, FirstAnswer]:
    command = [sys.executable, "-m", "quota_jax.bench.first_answer"]
    begun = time.time()
    done = subprocess.run(
        command, input=json.dumps(task), capture_output=True, text=True, env=dict(environment)
    )
    told = json.loads(_output(done, "that times the first answer").splitlines()[-1])
    answer = FirstAnswer(
        start_up=told["ready"] - begun,
        total=told["answered"] - begun,
        **{name: told[name] for name in ("load", "lowering", "compiling", "run", "cached")},
    )
    return told["label"], answer


def _answer(task: Mapping[str, Any]) -> dict[str, Any]:
    """What the process does: one answer, and what its parts took."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from quota_jax.bench.measurement import precision
    from quota_jax.bench.programs import compile_programs, host_copy
    from quota_jax.bench.shapes import example_batch, random_model
    from quota_jax.checkpoint import open_checkpoint
    from quota_jax.config import config_from_json

    jax.devices()
    ready, begun = time.time(), time.perf_counter()
    if task["checkpoint"] is not None:
        model = open_checkpoint(task["checkpoint"]).load_model()
    else:
        config = config_from_json(task["config"])
        quantization = QuantizationConfig.from_json(task["quantization"])
        model = random_model(config, quantization, jnp.bfloat16)
    jax.block_until_ready(model)
    load = time.perf_counter() - begun
    batch = host_copy(example_batch(model.config, task["batch_size"], task["text_tokens"]))
    recipe, new = Recipe.from_json(task["recipe"]), task["new_tokens"]
    programs = compile_programs(model, batch, recipe, new_tokens=new)
    begun = time.perf_counter()
    # The first token comes with the prefill.
    state = programs.decode(model, programs.first(model, batch), jnp.int32(new - 1))
    np.asarray(state.tokens)
    parts = (programs.to_first, programs.to_decode)
    return {
        "label": precision(model),
        "ready": ready,
        "load": load,
        "lowering": sum(part.lowering for part in parts),
        "compiling": sum(part.compiling for part in parts),
        "cached": any(part.cached for part in parts),
        "run": time.perf_counter() - begun,
        "answered": time.time(),
    }


if __name__ == "__main__":
    print(json.dumps(_answer(json.load(sys.stdin))))
