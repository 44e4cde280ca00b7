"""``quota-jax calibrate``: quantizes a full-precision checkpoint."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from quota_jax.cli.console import CheckpointPath, progress, size, table
from quota_jax.cli.convert import describe
from quota_jax.cli.variant import VariantOptions
from quota_jax.errors import QuotaError

if TYPE_CHECKING:
    from quota_jax.quant.calibrate import Options
    from quota_jax.quant.calibrate_flatquant import BlockReport
    from quota_jax.quant.calibration_data import Sample
    from quota_jax.quantization import QuantizationConfig

OWN_OPTIONS: dict[str, tuple[str, ...]] = {
    "steps": ("flatquant",),
    "seed": ("flatquant",),
    "start": ("flatquant",),
    "feed": ("flatquant", "gptq", "luq"),
    "modality_weights": ("flatquant",),
    "output_transform": ("flatquant",),
    "transform_values": ("flatquant",),
    "transform_keys": ("flatquant",),
    "clip_cache": ("flatquant",),
    "alpha": ("smoothquant",),
    "act_order": ("gptq", "luq"),
    "damping": ("gptq", "luq"),
    "block_size": ("gptq", "luq"),
    "mean_bits": ("luq",),
    "low_bits": ("luq",),
}
"""Options that only some methods have."""


@dataclass(frozen=True, kw_only=True)
class Calibrate(VariantOptions):
    """Quantize a full-precision checkpoint block by block.

    Round-to-nearest needs no data, unless keys are quantized by channel. The other methods look at
    pictures and texts: a JSON list of {"image": path, "text": prompt}, the image perhaps absent,
    paths relative to the file, as `quota-jax samples` draws it. In place of "text" may stand
    "turns", those of user and assistant.
    A run that was killed leaves OUT.partial, with --variant OUT.unfinished; the same command takes
    it up again.

    --variant makes a whole pipeline of quantization and pruning in one call, also of a Hugging Face
    folder, and stores the recipe, which generate, chat and eval then use by default.

    For example:
      quota-jax calibrate llava-7b --method flatquant --data calib.json --out llava-7b-w4a4
      quota-jax calibrate llava-1.5-7b-hf --variant collaborative --keep 0.3 --data calib.json \\
          --out llava-7b-quota
      quota-jax calibrate llava-7b --method awq --bits W4A16 --group 128 --modules decoder \\
          --data calib.json --out llava-7b-awq
    """

    checkpoint: CheckpointPath
    """Full-precision checkpoint made by convert; with --variant also a Hugging Face folder."""
    out: Path
    """Folder to write; must not exist."""
    method: (
        Literal["rtn", "smoothquant", "flatquant", "gptq", "flatquant+gptq", "awq", "luq"] | None
    ) = None
    """Default rtn, with --variant flatquant. rtn: round to nearest; smoothquant: scaled channels;
    flatquant: learned transforms and clipping; gptq: rounding that repairs its errors,
    flatquant+gptq: after FlatQuant's transforms; awq: scaled channels and clipping for 16-bit
    activations; luq: gptq with fewer bits in decoder layers whose outputs have little entropy."""
    bits: str | None = None
    """Bits of weights, activations and KV cache (4, 8 or 16 each; weights also 2 or 3, stored in
    4); default W4A4KV4, with awq and luq W4A16."""
    group: int | None = None
    """Input channels that share a scale, with 16-bit activations; 0: all of a row. Default 128
    with awq, and with luq and 16-bit activations, else 0."""
    asymmetric: bool = False
    """Zero points beside the scales, with weights of at most 4 bits and 16-bit activations; luq
    with 16-bit activations always has them."""
    embedding_bits: Literal[8, 16] = 16
    """Bits of the token embeddings; 8: one scale for each token. Where the head is the embeddings
    both have the same."""
    head_bits: Literal[8, 16] = 16
    """Bits of the output head's weights; 8: one scale for each token. Its inputs stay 16 bit."""
    modules: tuple[Literal["vision", "projector", "decoder"], ...] = (
        "vision",
        "projector",
        "decoder",
    )
    """Modules whose matrices are quantized."""
    key_quantization: Literal["token", "channel"] = "token"
    """How a KV cache of 4 or 8 bits scales its keys: token: each for itself, after rotation;
    channel: before rotation, by ranges measured on --data (KVQuant). Decoding by channel has no
    kernel and runs in plain XLA."""
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
    output_transform: Literal["heads", "kronecker"] = "kronecker"
    """flatquant: transform of what attention gives: across heads, or over all features."""
    transform_values: bool = True
    """flatquant: a transform of each head's values, folded into the weights."""
    transform_keys: bool = False
    """flatquant: a transform of each head's rotated keys and queries, with a KV cache of 4 or 8
    bits and keys by token."""
    clip_cache: bool = False
    """flatquant: learned clipping of the ranges of keys and values, with a KV cache of 4 or 8
    bits."""
    mean_bits: float = 3.0
    """luq: at most so many bits on average over the decoder's layers."""
    low_bits: Literal[2, 3] = 2
    """luq: bits of the layers with little entropy; the others have 4."""
    alpha: float = 0.5
    """smoothquant: how much of the outliers moves into the weights, 0 to 1."""
    act_order: bool = False
    """gptq: channels with large inputs first; groups stay where they are."""
    damping: float = 0.01
    """gptq: added to the diagonal of the second moments, in units of its mean."""
    block_size: int = 128
    """gptq: channels after which errors are spread over the rest."""

    def run(self) -> int:
        self.check()
        learns = self.chosen is not None and self.chosen.quantized
        method = self.method or ("flatquant" if learns else "rtn")
        return dataclasses.replace(self, method=method)._make()

    def _make(self) -> int:
        """The work, the method being named."""
        from quota_jax.quant.calibrate import calibrate

        start = time.perf_counter()
        if len(set(self.modules)) != len(self.modules) or not self.modules:
            raise QuotaError(f"--modules must name each module once, got {list(self.modules)}")
        quantization, samples = self._quantization(), self._samples()
        options = self._options()
        losses: list[tuple[str, str, str]] = []

        def report(found: BlockReport) -> None:
            losses.append((found.name, f"{found.first_loss:.3e}", f"{found.last_loss:.3e}"))

        with progress("quantizing") as step:
            if self.variant is not None:
                self.build(
                    self.checkpoint,
                    self.out,
                    self.pipeline(quantization, options),
                    samples,
                    step,
                    report,
                )
            else:
                calibrate(
                    self.checkpoint,
                    self.out,
                    quantization,
                    samples=samples,
                    options=options,
                    progress=lambda name, done, total: step(done, total, name),
                    report=report,
                )
        if losses:
            print(table(("block", "first loss", "last loss"), losses))
        self._tell(time.perf_counter() - start)
        return 0

    def _tell(self, seconds: float) -> None:
        """What was written, and its recipe."""
        from quota_jax.checkpoint import open_checkpoint
        from quota_jax.cli.recipe_tables import describe_recipe

        before = ""
        if self.variant is None:
            before = f" (before: {size(open_checkpoint(self.checkpoint).sizes()['files'])})"
        print(f"wrote {self.out}: {describe(self.out)}{before}, in {seconds:.1f} s")
        made = open_checkpoint(self.out)
        if self.variant is not None and not made.recipe.is_none:
            print(f"\n{describe_recipe(made.recipe, made.config)}")

    def _quantization(self) -> QuantizationConfig:
        from quota_jax.quantization import QuantizationConfig

        assert self.method is not None
        weight_only = self.method in ("awq", "luq")
        found = QuantizationConfig.parse(
            self.bits or ("W4A16" if weight_only else "W4A4KV4"),
            method=self.method,
            modules=self.modules,
            symmetric=not self.asymmetric,
        )
        group = found.group if self.group is None else self.group
        symmetric = found.symmetric
        if weight_only and found.activation_bits == 16:
            group = 128 if self.group is None and not found.group else group
            symmetric = symmetric and self.method != "luq"
        # E8 and H8 may also stand in --bits.
        embedding = min(self.embedding_bits, found.embedding_bits)
        head = min(self.head_bits, found.head_bits)
        return dataclasses.replace(
            found,
            group=group,
            symmetric=symmetric,
            embedding_bits=embedding,
            head_bits=head,
            key_quantization=self.key_quantization,
        )

    def _samples(self) -> list[Sample]:
        from quota_jax.quant.calibration_data import read_samples

        by_channel = self.key_quantization == "channel"
        if self.method == "rtn" and not by_channel and not self.measures:
            if self.data is not None or self.samples is not None:
                raise QuotaError("--data and --samples are of no use to --method rtn")
            return []
        if self.data is None:
            needs = "--key-quantization channel" if by_channel else f"--method {self.method}"
            if self.measures:
                needs = f"--variant {self.variant}"
            raise QuotaError(f"{needs} needs --data, a JSON list of pictures and texts")
        if self.samples is not None and self.samples < 1:
            raise QuotaError(f"--samples must be at least 1, got {self.samples}")
        found = read_samples(self.data, self.samples)
        return found if self.samples else found[:128]

    def _options(self) -> Options | None:
        from quota_jax.quant.awq import AwqOptions
        from quota_jax.quant.calibrate import FlatQuantGptqOptions
        from quota_jax.quant.calibrate_flatquant import FlatQuantOptions
        from quota_jax.quant.gptq import GptqOptions
        from quota_jax.quant.luq import LuqOptions
        from quota_jax.quant.smoothquant import SmoothQuantOptions

        assert self.method is not None
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
            output_transform=self.output_transform,
            transform_values=self.transform_values,
            transform_keys=self.transform_keys,
            clip_cache=self.clip_cache,
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
        if self.method == "luq":
            return LuqOptions(mean_bits=self.mean_bits, low_bits=self.low_bits, gptq=rounding)
        if self.method == "awq":
            return AwqOptions(batch_size=self.batch_size)
        if self.method == "smoothquant":
            return SmoothQuantOptions(alpha=self.alpha, batch_size=self.batch_size)
        return None
