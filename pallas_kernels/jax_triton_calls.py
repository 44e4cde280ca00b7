"""The only way to jax-triton, which is imported when a kernel is first asked for and not before.

jax-triton calls kernels written in Triton's own language, the way out that JAX names for its
deprecated Pallas-Triton back end, and the one to tensor cores on NVIDIA GPUs before and after
Hopper. It belongs to the extra ``cuda``; jax 0.12 cannot lower with it.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import jax

from pallas_kernels.accelerator import find_gpu

NAME = "triton"
"""Of these implementations."""
LOWEST = (8, 0)
"""Compute capability of Ampere, the first GPUs with the tensor-core instructions used here."""


def refusal() -> str | None:
    """Why no kernel can run here; None if one can, as far as is known without an import (which
    takes seconds): see ``broken``."""
    gpu = find_gpu()
    if gpu is None:
        return "it needs an NVIDIA GPU"
    if gpu.capability < LOWEST:
        major, minor = gpu.capability
        return f"it needs compute capability 8.0 or more, the GPU has {major}.{minor}"
    if importlib.util.find_spec("jax_triton") is None:
        return "it needs jax-triton: pip install 'quota-jax[cuda]', on Python 3.12 or newer"
    return None


@functools.cache
def broken() -> str | None:
    """Why the package cannot be imported; None if it can."""
    try:
        load()
    except ValueError as error:
        return str(error)
    return None


@functools.cache
def load() -> Any:
    """The package.

    Raises:
      ValueError: it cannot be imported: its version does not go with jax's or triton's.
    """
    try:
        import jax_triton
    except Exception as error:  # versions that do not go together fail in many ways
        raise ValueError(
            f"jax-triton cannot be imported beside jax {jax.__version__} "
            f"({type(error).__name__}: {error}); quota-jax's extra 'cuda' names versions that go "
            "together"
        ) from error
    return jax_triton


def call(
    kernel: Any,
    *arrays: Any,
    out: Any,
    grid: tuple[int, ...],
    warps: int,
    stages: int,
    **sizes: Any,
) -> Any:
    """Results of the shapes ``out`` of a Triton kernel over ``grid``; ``sizes``: its constants."""
    return load().triton_call(
        *arrays,
        kernel=kernel,
        out_type=out,
        grid=grid,
        num_warps=warps,
        num_stages=stages,
        **sizes,
    )
