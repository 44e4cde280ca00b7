"""Which implementation of an operation runs. A named one that cannot run fails loudly.

"auto" is decided by each operation's ``automatic`` from the GPU that is there and the shape; the
measurements behind the choices are in ``pallas_kernels/measured``.

The environment variable ``QUOTA_JAX_XLA`` names operations, with commas, that "auto" leaves to XLA
("all" are all): to find out whether a kernel is at fault, or where compiling kernels takes longer
than running them (they are compiled anew for every number of tokens).
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping

AUTO = "auto"
LEFT_TO_XLA = "QUOTA_JAX_XLA"
OPERATIONS = (
    "int4_matmul", "w4a16_matmul", "transform_quantize", "kv4_encode", "kv4_append",
    "kv4_attention", "sequence_attention", "attention_mass",
)  # fmt: skip


def resolve(
    operation: str, impl: str, automatic: str, known: Collection[str], refusals: Mapping[str, str]
) -> str:
    """The implementation for ``impl``.

    Args:
      automatic: what "auto" means here. refusals: why a known implementation cannot run here.
    """
    if impl == AUTO:
        return "xla" if operation in left_to_xla() else automatic
    if impl not in known:
        raise ValueError(f"{operation}: no implementation {impl!r}; available: {sorted(known)}")
    if impl in refusals:
        raise ValueError(f"{operation}: implementation {impl!r} cannot run: {refusals[impl]}")
    return impl


def left_to_xla() -> tuple[str, ...]:
    """The operations that ``QUOTA_JAX_XLA`` names."""
    value = os.environ.get(LEFT_TO_XLA, "")
    names = tuple(filter(None, (name.strip() for name in value.split(","))))
    if unknown := set(names) - {*OPERATIONS, "all"}:
        known = ", ".join(OPERATIONS)
        raise ValueError(f"{LEFT_TO_XLA}: no operation {unknown.pop()!r}; known: all, {known}")
    return OPERATIONS if "all" in names else names
