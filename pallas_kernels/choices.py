"""What "auto" takes on this machine, for people to look at."""

from __future__ import annotations

from pallas_kernels.attention.api import automatic as attention
from pallas_kernels.attention_mass.api import automatic as mass
from pallas_kernels.dispatch import left_to_xla
from pallas_kernels.int4_matmul.api import automatic as matmul
from pallas_kernels.kv4_append.api import automatic as append
from pallas_kernels.kv4_attention.api import automatic as decode
from pallas_kernels.kv4_encode.api import automatic as encode
from pallas_kernels.transform_quantize.api import automatic as quantize
from pallas_kernels.w4a16_matmul.api import automatic as weight_only


def choices() -> list[tuple[str, str, str]]:
    """Operation, shape and what "auto" takes for it on this machine (shapes of LLaVA-1.5-7B)."""
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
