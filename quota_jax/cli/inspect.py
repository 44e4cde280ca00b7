"""``quota-jax inspect``: what is in a checkpoint, and which kernels would run."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from quota_jax.cli.console import size, table
from quota_jax.cli.recipe import describe_recipe
from quota_jax.errors import QuotaError

if TYPE_CHECKING:
    from quota_jax.checkpoint import Checkpoint
    from quota_jax.quantization import QuantizationConfig


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """Show a checkpoint's configuration, parameters, bits, bytes on disk and recipe.

    For example:
      quota-jax inspect llava-7b-w4a8 --kernels
    """

    checkpoint: tyro.conf.Positional[Path | None] = None
    """Checkpoint; may be left out with --kernels."""
    kernels: bool = False
    """Show which implementation of each kernel runs on this machine."""

    def run(self) -> int:
        if self.checkpoint is None and not self.kernels:
            raise QuotaError("name a checkpoint, or give --kernels")
        if self.checkpoint is not None:
            print(report(self.checkpoint))
        if self.kernels:
            import jax

            from pallas_kernels.choices import choices

            device = jax.devices()[0]
            rows = choices()
            if self.checkpoint is not None and keys_by_channel(self.checkpoint):
                rows = [row for row in rows if row[0] != "kv4_attention"]
                rows.append(("decode attention", "keys by channel, rotated when read", "xla"))
            print(f"kernels on {device.platform} ({device.device_kind}), jax {jax.__version__}")
            print(table(("operation", "shape", "implementation"), rows, left=3))
        return 0


def keys_by_channel(path: Path) -> bool:
    """Whether the checkpoint's cache keeps keys as no kernel reads them."""
    from quota_jax.checkpoint import open_checkpoint

    return open_checkpoint(path).quantization.key_quantization == "channel"


def report(path: Path) -> str:
    """All that is known of a checkpoint without loading its arrays."""
    from quota_jax.checkpoint import PARTIAL_SUFFIX, open_checkpoint

    unfinished = path.with_name(path.name + PARTIAL_SUFFIX)
    if not path.exists() and unfinished.is_dir():
        raise QuotaError(f"{path}: not finished ({unfinished}); run its command again to go on")
    checkpoint = open_checkpoint(path)
    config, text = checkpoint.config, checkpoint.config.text
    sizes = checkpoint.sizes()
    counts = {name: parameters(checkpoint, name) for name in checkpoint.block_names}

    quantization = checkpoint.quantization
    bits = f"none ({checkpoint.dtype.name})"
    if not quantization.is_none:
        bits = f"{quantization.label} by {quantization.method}, {', '.join(quantization.modules)}"
        if (groups := quantization.groups) is not None:
            kind = "symmetric" if groups.symmetric else "with zero points"
            size_of = f"groups of {groups.size}" if groups.size else "output channels"
            bits += f"; {size_of}, {kind}, {groups.scale_dtype} scales"
            bits += ", in activation order" if quantization.act_order else ""
        parts = {
            "keys by channel": quantization.key_quantization == "channel",
            "P_o": quantization.output_transform == "heads",
            "P_k": quantization.key_transform,
            "clipped keys and values": quantization.cache_clip,
        }
        if chosen := [name for name, there in parts.items() if there]:
            bits += f"; {', '.join(chosen)}"
        bits += low_bits(quantization)
    facts = [
        ("checkpoint", f"{path} (complete)"),
        ("source", checkpoint.provenance.get("source", "unknown")),
        ("model", config.model_type),
        ("vision", config.vision_summary),
        (
            "decoder",
            f"{text.num_layers} layers, width {text.hidden_size}, {text.num_heads} heads "
            f"({text.num_kv_heads} key/value) of {text.head_dim}, vocabulary {text.vocab_size}, "
            f"{text.max_position_embeddings} positions",
        ),
        ("parameters", f"{sum(counts.values()):,}"),
        ("quantization", bits),
        (
            "bytes",
            f"{size(sizes['logical'])} of arrays, {size(sizes['files'])} in files, "
            f"{size(sizes['disk'])} on disk (du)",
        ),
        ("dtypes", ", ".join(f"{k} {size(v)}" for k, v in sizes["dtypes"].items())),
    ]
    if sizes["effective"] < sizes["logical"]:
        note = "if codes took their own bits; weights of 2 and 3 bits are stored in 4"
        facts.append(("effective", f"{size(sizes['effective'])} {note}"))
    width = max(len(name) for name, _ in facts)
    lines = [f"{name:<{width}}  {value}" for name, value in facts]
    rows = [
        (name, f"{counts[name]:,}", size(sizes["blocks"][name])) for name in checkpoint.block_names
    ]
    lines += ["", table(("block", "parameters", "bytes"), rows)]
    lines += ["", describe_recipe(checkpoint.recipe, config)]
    return "\n".join(lines)


def low_bits(quantization: QuantizationConfig) -> str:
    """Which decoder layers have which bits, and their mean; empty where all have the same."""
    found = quantization.layer_bits
    if not found:
        return ""
    layers = {
        bits: ", ".join(str(layer) for layer, own in enumerate(found) if own == bits)
        for bits in sorted(set(found))
    }
    listed = "; ".join(f"{bits} bits in decoder layers {names}" for bits, names in layers.items())
    return f"; {listed} (mean {sum(found) / len(found):.2f})"


def parameters(checkpoint: Checkpoint, block: str) -> int:
    """Parameters of a block as the model counts them: two per packed byte, scales and zeros
    none."""
    specs = checkpoint.block_specs(block)
    counts: Counter[str] = Counter()
    for name, spec in specs.items():
        stem, _, kind = name.rpartition(".")
        quantized = f"{stem}.packed" in specs or f"{stem}.codes" in specs
        if kind in ("scale", "zeros", "group_index") and quantized:
            continue
        counts[name] = math.prod(spec.shape) * (2 if kind == "packed" else 1)
    return counts.total()
