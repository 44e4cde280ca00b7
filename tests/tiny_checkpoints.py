"""Converted tiny models of either family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from converters import convert
from tests.tiny_models import write_tiny_llava
from tests.tiny_qwen import write_tiny_qwen


def tiny_checkpoint(root: Path, family: str, **options: Any) -> Path:
    """``root/ckpt``, of a tiny "llava" (pictures of 56 x 56) or "qwen" in ``root/hf``; ``options``
    as its writer takes them."""
    if family == "llava":
        folder = write_tiny_llava(root / "hf", image_size=56, **options)
    else:
        folder = write_tiny_qwen(root / "hf", **options)
    convert(folder, root / "ckpt")
    return root / "ckpt"
