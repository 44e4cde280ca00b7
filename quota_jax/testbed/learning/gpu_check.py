"""Lowers the programs of a run for an H100 that is not there, on a CPU, in minutes.

Finds wrong shapes, unsupported operations and what cuDNN's attention refuses, but not what its
engines refuse at compile time, nor a lack of memory.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import jax

from quota_jax.testbed.learning.step import TrainingConfig
from quota_jax.testbed.learning.trainer import lowered

_CUDNN_CALL = "__cudnn$fmha"
_CUDNN_VERSION = 91300


@contextmanager
def pretended_h100() -> Iterator[None]:
    """Inside, lowering for "cuda" finds an H100 with a current cuDNN."""
    # jax asks the machine at hand; there is no public way to say what the other one has.
    from jax._src.cudnn import fused_attention_stablehlo as fused

    with (
        mock.patch.object(fused, "check_cudnn_version", return_value=_CUDNN_VERSION),
        mock.patch.object(fused, "check_compute_capability", return_value=True),
        mock.patch.object(fused, "is_cuda_compute_capability_equal", return_value=False),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def check_programs(config: TrainingConfig) -> dict[Any, int]:
    """Lowers every program of a run; returns how many cuDNN calls each one has."""
    found = {}
    with pretended_h100():
        for name, job in lowered(config, lowering_platforms=("cuda",)).items():
            found[name] = job().as_text().count(_CUDNN_CALL)
    jax.clear_caches()  # traced functions remember the pretended machine
    return found
