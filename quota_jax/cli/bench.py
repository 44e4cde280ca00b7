"""``quota-jax bench``: speed and memory at a preset's shape, with random weights."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quota_jax.cli.console import size, table
from quota_jax.errors import QuotaError

if TYPE_CHECKING:
    from quota_jax.bench import BenchResult


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Time to the first token, decoding speed and memory of a preset, on this machine.

    Weights are random: shapes, bytes and times are real, answers are not. Smaller models run first,
    because the peak memory is that of the process so far.

    For example:
      quota-jax bench --preset llava_1_5_7b --bits W4A4KV4 W16A16KV16 --keep 1 0.3
    """

    preset: str = "llava_1_5_7b"
    """llava_1_5_7b, llava_1_5_13b, qwen2_5_vl_3b or qwen2_5_vl_7b."""
    bits: tuple[str, ...] = ("W4A4KV4", "W4A8KV4", "W16A16KV16")
    """Precisions to run, W16A16KV16 being bfloat16."""
    method: str = "rtn"
    """Method of the quantized models: rtn, or flatquant, whose transforms take time."""
    keep: tuple[float, ...] = (0.3, 1.0)
    """Fractions of the visual tokens that the recipe leaves; 1 keeps all."""
    batch: tuple[int, ...] = (1,)
    """Batch sizes."""
    text: int = 64
    """Text tokens of a prompt."""
    new: int = 64
    """Tokens to decode."""
    layers: int | None = None
    """Decoder layers; None takes the preset's."""
    json: Path | None = None
    """File for the numbers."""

    def run(self) -> int:
        import jax
        import jax.numpy as jnp

        from quota_jax.bench import measure, random_model
        from quota_jax.config import PRESETS
        from quota_jax.prune.presets import candidates
        from quota_jax.quantization import QuantizationConfig
        from quota_jax.recipe import Recipe

        if self.preset not in PRESETS:
            raise QuotaError(f"no preset {self.preset!r}; known: {', '.join(sorted(PRESETS))}")
        if min(self.text, self.new, *self.batch) < 1:
            raise QuotaError("--text, --new and --batch must be at least 1")
        if self.text < 5:
            raise QuotaError(f"--text must be at least 5, got {self.text}")
        config = PRESETS[self.preset]
        if self.layers is not None:
            text = dataclasses.replace(config.text, num_layers=self.layers)
            config = dataclasses.replace(config, text=text)
        depth = config.text.num_layers
        precisions = [QuantizationConfig.parse(label, method=self.method) for label in self.bits]
        recipes = [
            Recipe.none(depth)
            if keep == 1
            else Recipe.uniform(num_layers=depth, layers=candidates(config), keep=keep)
            for keep in self.keep
        ]
        results = []
        for quantization in precisions:
            model = random_model(config, quantization, jnp.bfloat16)
            for batch in self.batch:
                for recipe in recipes:
                    result = measure(
                        model, recipe, batch_size=batch, text_tokens=self.text, new_tokens=self.new
                    )
                    results.append(result)
                    print(f"done: {describe(result)}", file=sys.stderr, flush=True)
            del model
        device = jax.devices()[0]
        print(
            f"{self.preset}, {results[0].visual_tokens} visual + {self.text} text tokens, "
            f"{device.device_kind}, jax {jax.__version__}, random weights, {self.method}"
        )
        print(report(results))
        if self.json:
            content = {
                "preset": self.preset,
                "method": self.method,
                "device": device.device_kind,
                "jax": jax.__version__,
                "results": [dataclasses.asdict(result) for result in results],
            }
            self.json.write_text(json.dumps(content, indent=1) + "\n")
            print(f"wrote {self.json}")
        return 0


def describe(result: BenchResult) -> str:
    return (
        f"{result.label}, keep {result.keep:g}, batch {result.batch_size}: first token "
        f"{1e3 * result.first_token:.1f} ms, {result.tokens_per_second:.0f} tokens/s"
    )


def report(results: list[BenchResult]) -> str:
    """A table of all runs."""
    rows = [
        (
            result.label,
            f"{100 * result.keep:g} %",
            result.batch_size,
            f"{1e3 * result.first_token:.1f} ms",
            f"{1e3 * result.decode_step:.2f} ms",
            f"{result.tokens_per_second:.0f}",
            size(result.weight_bytes),
            size(result.cache_bytes),
            size(result.peak_bytes) if result.peak_bytes else "-",
            f"{result.compile:.0f} s",
        )
        for result in results
    ]
    header = (
        *("precision", "tokens kept", "batch", "first token", "step", "tokens/s"),
        *("weights", "cache", "peak so far", "compile"),
    )
    return table(header, rows)
