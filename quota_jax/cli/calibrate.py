"""``quota-jax calibrate``: quantizes a full-precision checkpoint."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from quota_jax.cli.console import CheckpointPath, progress, size, table
from quota_jax.cli.convert import describe
from quota_jax.errors import QuotaError

if TYPE_CHECKING:
    from quota_jax.quant.calibrate import Options
    from quota_jax.quant.calibration_data import Sample
    from quota_jax.quantization import QuantizationConfig

OWN_OPTIONS: dict[str, tuple[str, ...]] = {
    "steps": ("flatquant",),
    "seed": ("flatquant",),
    "start": ("flatquant",),
    "feed": ("flatquant", "gptq"),
    "modality_weights": ("flatquant",),
    "alpha": ("smoothquant",),
    "act_order": ("gptq",),
    "damping": ("gptq",),
    "block_size": ("gptq",),
}
"""Options that only some methods have."""


@dataclass(frozen=True, kw_only=True)
class Calibrate:
    """Quantize a full-precision checkpoint block by block.

    Round-to-nearest needs no data. The other methods look at pictures and texts: a JSON list of
    {"image": path, "text": prompt}, the image perhaps absent, paths relative to the file, as
    `quota-jax samples` draws it. In place of "text" may stand "turns", those of user and assistant.
    A run that was killed leaves OUT.partial; the same command takes it up again.

    For example:
      quota-jax calibrate llava-7b --method flatquant --data calib.json --out llava-7b-w4a4
      quota-jax calibrate llava-7b --method awq --bits W4A16 --group 128 --modules decoder \\
          --data calib.json --out llava-7b-awq
    """

    checkpoint: CheckpointPath
    """Full-precision checkpoint made by convert."""
    out: Path
    """Folder to write; must not exist."""
    method: Literal["rtn", "smoothquant", "flatquant", "gptq", "flatquant+gptq", "awq"] = "rtn"
    """rtn: round to nearest; smoothquant: scaled channels; flatquant: learned transforms and
    clipping; gptq: rounding that repairs its errors, flatquant+gptq: after FlatQuant's transforms;
    awq: scaled channels and clipping for 16-bit activations."""
    bits: str | None = None
    """Bits of weights, activations and KV cache (4, 8 or 16 each); default W4A4KV4, with awq
    W4A16."""
    group: int | None = None
    """Input channels that share a scale, with 16-bit activations; 0: all of a row. Default 128
    with awq, else 0."""
    asymmetric: bool = False
    """Zero points beside the scales, with 4-bit weights and 16-bit activations."""
    modules: tuple[Literal["vision", "projector", "decoder"], ...] = (
        "vision",
        "projector",
        "decoder",
    )
    """Modules whose matrices are quantized."""
    data: Path | None = None
    """The list of pictures and texts."""
    samples: int | None = None
    """How many of the list, from its start; default 128 or as many as there are."""
    steps: int = 480
    """flatquant: optimizer steps for each block."""
    batch_size: int = 4
    """Samples that are computed together; with flatquant, in a step."""
    seed: int = 0
    """flatquant: of the rotations that transforms start from."""
    start: Literal["random", "identity"] = "random"
    """flatquant: what transforms start from."""
    feed: Literal["full", "quantized"] | None = None
    """flatquant, gptq: what blocks learn from, outputs of full precision or of the quantized blocks
    before them; default full."""
    modality_weights: tuple[float, float] | None = None
    """flatquant: weights of the errors of visual and of text tokens in the decoder; default 1 1."""
    alpha: float = 0.5
    """smoothquant: how much of the outliers moves into the weights, 0 to 1."""
    act_order: bool = False
    """gptq: channels with large inputs first; groups stay where they are."""
    damping: float = 0.01
    """gptq: added to the diagonal of the second moments, in units of its mean."""
    block_size: int = 128
    """gptq: channels after which errors are spread over the rest."""

    def run(self) -> int:
        from quota_jax.checkpoint import open_checkpoint
        from quota_jax.quant.calibrate import calibrate

        start = time.perf_counter()
        if len(set(self.modules)) != len(self.modules) or not self.modules:
            raise QuotaError(f"--modules must name each module once, got {list(self.modules)}")
        quantization = self._quantization()
        losses: list[tuple[str, str, str]] = []
        with progress("quantizing") as step:
            calibrate(
                self.checkpoint,
                self.out,
                quantization,
                samples=self._samples(),
                options=self._options(),
                progress=lambda name, done, total: step(done, total, name),
                report=lambda found: losses.append(
                    (found.name, f"{found.first_loss:.3e}", f"{found.last_loss:.3e}")
                ),
            )
        if losses:
            print(table(("block", "first loss", "last loss"), losses))
        before = open_checkpoint(self.checkpoint).sizes()["files"]
        print(
            f"wrote {self.out}: {describe(self.out)} (before: {size(before)}), "
            f"in {time.perf_counter() - start:.1f} s"
        )
        return 0

    def _quantization(self) -> QuantizationConfig:
        from quota_jax.quantization import QuantizationConfig

        awq = self.method == "awq"
        found = QuantizationConfig.parse(
            self.bits or ("W4A16" if awq else "W4A4KV4"),
            method=self.method,
            modules=self.modules,
            symmetric=not self.asymmetric,
        )
        group = self.group
        if group is None and awq and not found.group:
            group = 128
        return found if group is None else dataclasses.replace(found, group=group)

    def _samples(self) -> list[Sample]:
        from quota_jax.quant.calibration_data import read_samples

        if self.method == "rtn":
            if self.data is not None or self.samples is not None:
                raise QuotaError("--data and --samples are of no use to --method rtn")
            return []
        if self.data is None:
            raise QuotaError(
                f"--method {self.method} needs --data, a JSON list of pictures and texts"
            )
        if self.samples is not None and self.samples < 1:
            raise QuotaError(f"--samples must be at least 1, got {self.samples}")
        found = read_samples(self.data, self.samples)
        return found if self.samples else found[:128]

    def _options(self) -> Options | None:
        from quota_jax.quant.awq import AwqOptions
        from quota_jax.quant.calibrate import FlatQuantGptqOptions
        from quota_jax.quant.calibrate_flatquant import FlatQuantOptions
        from quota_jax.quant.gptq import GptqOptions
        from quota_jax.quant.smoothquant import SmoothQuantOptions

        for field in dataclasses.fields(self):
            methods = OWN_OPTIONS.get(field.name, ())
            unused = methods and not set(methods) & set(self.method.split("+"))
            if unused and getattr(self, field.name) != field.default:
                option = field.name.replace("_", "-")
                raise QuotaError(f"--{option} is of no use to --method {self.method}")
        learning = FlatQuantOptions(
            steps=self.steps,
            batch_size=self.batch_size,
            seed=self.seed,
            start=self.start,
            feed=self.feed or "full",
            modality_weights=self.modality_weights or (1.0, 1.0),
        )
        rounding = GptqOptions(
            damping=self.damping,
            block_size=self.block_size,
            act_order=self.act_order,
            batch_size=self.batch_size,
            feed=self.feed or "full",
        )
        if self.method == "flatquant":
            return learning
        if self.method == "gptq":
            return rounding
        if self.method == "flatquant+gptq":
            return FlatQuantGptqOptions(flatquant=learning, gptq=rounding)
        if self.method == "awq":
            return AwqOptions(batch_size=self.batch_size)
        if self.method == "smoothquant":
            return SmoothQuantOptions(alpha=self.alpha, batch_size=self.batch_size)
        return None
