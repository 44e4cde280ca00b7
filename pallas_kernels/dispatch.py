"""Which implementation of an operation runs. A named one that does not exist fails loudly."""

from __future__ import annotations

from collections.abc import Collection

OPERATIONS = ("int4_matmul", "kv4_attention")


def choose(operation: str, available: Collection[str], impl: str) -> str:
    """The implementation for ``impl``; "auto" is the XLA path until a kernel measures faster."""
    if impl == "auto":
        return "xla"
    if impl not in available:
        raise ValueError(f"{operation}: no implementation {impl!r}; available: {sorted(available)}")
    return impl


def choices() -> dict[str, str]:
    """What "auto" takes for each operation on this machine."""
    return {operation: choose(operation, ("xla",), "auto") for operation in OPERATIONS}
