"""Saved training runs: parameters and moments as safetensors, everything else as JSON.

`state.json` names the tensors' file and replaces its predecessor in one rename, after that file is
complete: a kill at any moment leaves the last saved state readable.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from quota_jax.errors import QuotaError
from quota_jax.testbed.learning.step import TrainingConfig, TrainState, init_state
from quota_jax.testbed.optimizer import OptimizerState

INDEX = "state.json"
FORMAT = 1
_PARTS = ("params", "first", "second")


@dataclass(kw_only=True, slots=True)
class Saved:
    """Where a run stands: steps done, seconds used by all its processes and spent in the loop."""

    state: TrainState
    steps: int
    used: float
    trained: float
    curve: list[dict[str, Any]] = field(default_factory=list)


def fingerprint(config: TrainingConfig) -> dict[str, Any]:
    """What must be the same for a run to go on, as JSON."""
    values = dataclasses.asdict(config) | {"model": config.model.to_json()}
    for free in ("attention", "eval_scenes"):  # how fast, and how it is measured
        del values[free]
    return json.loads(json.dumps(values))


def save_state(folder: Path, config: TrainingConfig, saved: Saved) -> None:
    """Writes the state into ``folder`` (made when missing) and removes the one before."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    moments = saved.state.optimizer
    groups = zip(_PARTS, (saved.state.params, moments.first, moments.second), strict=True)
    tensors = {
        f"{part}/{name}": np.asarray(value)
        for part, values in groups
        for name, value in jax.device_get(values).items()
    }
    name = f"state-{saved.steps:08d}.safetensors"
    partial = folder / (name + ".partial")
    save_file(tensors, partial)
    partial.replace(folder / name)
    index = {
        "format": FORMAT,
        "tensors": name,
        "steps": saved.steps,
        "optimizer_steps": int(moments.step),
        "used_seconds": saved.used,
        "trained_seconds": saved.trained,
        "curve": saved.curve,
        "config": fingerprint(config),
    }
    _replace(folder / INDEX, json.dumps(index, indent=1) + "\n")
    for old in (*folder.glob("state-*.safetensors"), *folder.glob("state-*.partial")):
        if old.name != name:
            old.unlink()


def load_state(folder: Path, config: TrainingConfig) -> Saved | None:
    """The saved run of ``folder``; None where there is none.

    Raises:
        QuotaError: it belongs to other settings, or its files cannot be read.
    """
    from safetensors.numpy import load_file

    path = folder / INDEX
    if not path.is_file():
        return None
    try:
        index = json.loads(path.read_text())
        if index["format"] != FORMAT:
            raise QuotaError(f"{path}: format {index['format']!r} is not {FORMAT}")
        name = index["tensors"]
        if not isinstance(name, str) or Path(name).name != name:
            raise QuotaError(f"{path}: tensors {name!r} is not a file's name")
        _check_settings(path, index["config"], fingerprint(config))
        tensors = load_file(folder / name)
        groups: dict[str, dict[str, Any]] = {part: {} for part in _PARTS}
        for key, value in tensors.items():
            part, _, parameter = key.partition("/")
            groups[part][parameter] = value
        saved = Saved(
            state=TrainState(
                groups["params"],
                OptimizerState(
                    groups["first"], groups["second"], np.int32(index["optimizer_steps"])
                ),
            ),
            steps=int(index["steps"]),
            used=float(index["used_seconds"]),
            trained=float(index["trained_seconds"]),
            curve=list(index["curve"]),
        )
    except QuotaError:
        raise
    except Exception as error:  # files that something else wrote: anything may be wrong
        raise QuotaError(f"{path}: cannot be read: {error or type(error).__name__}") from None
    _check_shapes(path, saved.state, config)
    saved.state = jax.tree.map(jnp.asarray, saved.state)
    return saved


def _check_settings(path: Path, stored: Any, wanted: dict[str, Any]) -> None:
    for name, value in wanted.items():
        if not isinstance(stored, dict) or stored.get(name) != value:
            found = stored.get(name) if isinstance(stored, dict) else stored
            if name == "model":
                raise QuotaError(f"{path} is a run of another model")
            raise QuotaError(f"{path} is a run with {name} {found!r}, not {value!r}")


def _check_shapes(path: Path, state: TrainState, config: TrainingConfig) -> None:
    expected = jax.eval_shape(lambda: init_state(config))
    found = jax.tree.map(lambda x: (np.shape(x), str(np.asarray(x).dtype)), state)
    wanted = jax.tree.map(lambda x: (x.shape, str(x.dtype)), expected)
    if found != wanted:
        raise QuotaError(f"{path}: its tensors are not those of this model")


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
