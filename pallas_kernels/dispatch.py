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


def choices() -> list[tuple[str, str, str]]:
    """Operation, shape and what "auto" takes for it on this machine (shapes of LLaVA-1.5-7B)."""
    from pallas_kernels.attention.api import automatic as attention
    from pallas_kernels.attention_mass.api import automatic as mass
    from pallas_kernels.int4_matmul.api import automatic as matmul
    from pallas_kernels.kv4_append.api import automatic as append
    from pallas_kernels.kv4_attention.api import automatic as decode
    from pallas_kernels.kv4_encode.api import automatic as encode
    from pallas_kernels.transform_quantize.api import automatic as quantize
    from pallas_kernels.w4a16_matmul.api import automatic as weight_only

    rows = [
        ("int4_matmul", f"{tokens} tokens, 22016 x 4096", matmul(tokens, 22016, 4096))
        for tokens in (1, 8, 640)
    ]
    rows += [
        ("w4a16_matmul", f"{tokens} tokens, 22016 x 4096, groups of 128", weight_only(tokens, 4096))
        for tokens in (1, 8, 640)
    ]
    rows += [
        ("transform_quantize", f"{name}, transformed", quantize(a * b, a, splits=gated))
        for name, (a, b), gated in (
            ("norm of 4096", (64, 64), False),
            ("gate of 18944", (128, 148), True),
        )
    ]
    rows.append(("kv4_encode", "heads of 128", encode(128)))
    rows.append(("kv4_append", "any", append()))
    rows.append(("kv4_attention", "32 heads of 128", decode(128)))
    for dtype in ("bfloat16", "float32"):
        rows.append(("sequence_attention", f"heads of 128, {dtype}", attention(dtype, 128)))
    for dtype in ("bfloat16", "float32"):
        rows.append(("attention_mass", f"heads of 128, {dtype}", mass(dtype, 128)))
    left = left_to_xla()
    return [(name, shape, "xla" if name in left else choice) for name, shape, choice in rows]
