"""``quota-jax finetune``: trains a quantized student of a full-precision checkpoint."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from quota_jax.cli.console import CheckpointPath, size, table
from quota_jax.cli.convert import describe
from quota_jax.errors import QuotaError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from quota_jax.checkpoint import Checkpoint
    from quota_jax.quant.calibration_data import Sample
    from quota_jax.quant.grace import GraceOptions
    from quota_jax.quantization import QuantizationConfig
    from quota_jax.recipe import Recipe

Module = Literal["vision", "projector", "decoder"]
WINDOW = 20
"""Steps that a mean in the report is taken over."""


@dataclass(frozen=True, kw_only=True)
class Finetune:
    """Train a quantized student with the full-precision checkpoint as its teacher.

    GRACE (arXiv 2601.22709): weights and their scales learn from the answers, from the teacher's
    distribution where the teacher is sure of it, and from how its visual tokens relate. The student
    computes with the integers that are deployed. Data: a JSON list as for calibrate, with "turns"
    of user and assistant. A run that was killed leaves OUT.partial; the same command takes it up
    again.

    Teacher, student, gradients and moments are in device memory at once, about 20 bytes a parameter
    and the activations: a 7B model does not fit into one GPU.

    For example:
      quota-jax finetune small --data train.json --bits W4A4KV4 --steps 1000 \\
          --learning-rate 1e-4 --out small-grace
    """

    checkpoint: CheckpointPath
    """Full-precision checkpoint made by convert: the teacher, and what the student starts from."""
    out: Path
    """Folder to write; must not exist."""
    data: Path
    """The list of pictures and conversations."""
    method: Literal["grace"] = "grace"
    """grace: gated relational alignment."""
    bits: str = "W4A4KV4"
    """Bits of weights, activations and KV cache; with 16-bit activations a group may follow
    (W4A16G128, the paper's)."""
    modules: tuple[Module, ...] = ("vision", "projector", "decoder")
    """Modules whose matrices are quantized."""
    learned: tuple[Module, ...] | None = None
    """Modules that learn; default: the quantized ones and the projector. Embeddings and head never
    do."""
    samples: int | None = None
    """How many of the list, from its start; default all."""
    targets: Literal["answers", "text"] = "answers"
    """What is learned: the assistant's turns, or all text."""
    keep: float | None = None
    """Train a student that keeps this fraction of the visual tokens."""
    layers: tuple[int, ...] = ()
    """With --keep: decoder layers that drop tokens, from 0; default as the command recipe."""
    own_recipe: bool = False
    """Train a student that is pruned as the checkpoint's recipe says."""
    steps: int = 1000
    """Optimizer steps."""
    batch_size: int = 8
    """Samples of a step."""
    learning_rate: float = 1e-5
    """Of the parameters, at its highest; small models learn with more."""
    scale_learning_rate: float = 2e-4
    """Of the logarithms of the scales."""
    start: Literal["search", "nearest"] = "search"
    """First scales: the best of 20 by squared error, or those of round-to-nearest."""
    temperature: float = 2.0
    """Of the distillation."""
    target_weight: float = 1.0
    """Distillation: weight of the answer's own probability (alpha)."""
    rest_weight: float = 4.0
    """Distillation: weight of the distribution over all other tokens (beta_d)."""
    ungated: bool = False
    """Positions weigh the same, however sure the teacher is."""
    relational_weight: float = 3.0
    """Of the alignment of visual tokens (omega); 0 leaves it out."""
    relational_warmup: int = 400
    """Steps in which it rises."""
    beta: float = 0.5
    """First weight of the distillation."""
    beta_rate: float = 0.003
    """How fast it follows the distillation's loss (eta)."""
    beta_target: float = 3.0
    """The loss that it steers at (tau)."""
    seed: int = 0
    """Of the order of the samples."""
    save_every: int = 100
    """Steps between saved states."""

    def run(self) -> int:
        from tqdm import tqdm

        from quota_jax.checkpoint import open_checkpoint
        from quota_jax.quant.grace import finetune

        began = time.perf_counter()
        checkpoint = open_checkpoint(self.checkpoint)
        quantization, options = self._quantization(), self._options()
        recipe, samples = self._recipe(checkpoint), self._samples()
        with tqdm(desc="training", unit="step", disable=None, leave=False) as bar:

            def step(done: int, total: int, metrics: Mapping[str, float]) -> None:
                bar.total = total
                bar.set_postfix_str(f"loss {metrics['loss']:.3f}", refresh=False)
                bar.update(done - bar.n)

            history = finetune(
                self.checkpoint,
                self.out,
                quantization,
                samples,
                options=options,
                recipe=recipe,
                save_every=self.save_every,
                progress=step,
            )
        print(report(history))
        print(
            f"wrote {self.out}: {describe(self.out)} "
            f"(before: {size(checkpoint.sizes()['files'])}), "
            f"in {time.perf_counter() - began:.1f} s"
        )
        return 0

    def _quantization(self) -> QuantizationConfig:
        from quota_jax.quantization import QuantizationConfig

        if len(set(self.modules)) != len(self.modules) or not self.modules:
            raise QuotaError(f"--modules must name each module once, got {list(self.modules)}")
        found = QuantizationConfig.parse(self.bits, modules=self.modules)
        if found.weight_bits == 16:
            raise QuotaError(f"--bits {self.bits}: method grace needs quantized weights")
        return dataclasses.replace(found, method=self.method)

    def _recipe(self, checkpoint: Checkpoint) -> Recipe | None:
        from quota_jax.cli.answering import RecipeOptions

        if self.own_recipe and (self.keep is not None or self.layers):
            raise QuotaError("--own-recipe and --keep exclude each other")
        if self.own_recipe:
            if checkpoint.recipe.is_none:
                raise QuotaError(f"--own-recipe: the recipe of {self.checkpoint} prunes nothing")
            return checkpoint.recipe
        options = RecipeOptions(keep=self.keep, layers=self.layers)
        found = options.recipe(checkpoint)
        return None if self.keep is None else found

    def _samples(self) -> list[Sample]:
        from quota_jax.quant.calibration_data import read_samples

        if self.samples is not None and self.samples < 1:
            raise QuotaError(f"--samples must be at least 1, got {self.samples}")
        return read_samples(self.data, self.samples)

    def _options(self) -> GraceOptions:
        from quota_jax.quant.grace import GraceOptions

        ours = {field.name for field in dataclasses.fields(self)}
        shared = [f.name for f in dataclasses.fields(GraceOptions) if f.name in ours]
        values = {name: getattr(self, name) for name in shared}
        return GraceOptions(**values, gated=not self.ungated)


def report(history: list[dict[str, float]]) -> str:
    """Means over the first and the last steps."""
    window = max(1, min(WINDOW, len(history) // 2))
    names = {
        "loss": "loss",
        "ce": "cross entropy",
        "gdkd": "distillation",
        "rcka": "1 - CKA",
        "beta": "beta",
        "gate": "gate",
    }
    rows = [
        (
            title,
            *(
                f"{sum(step[name] for step in part) / len(part):.4f}"
                for part in (history[:window], history[-window:])
            ),
        )
        for name, title in names.items()
    ]
    return table(("mean of", f"first {window}", f"last {window}"), rows)
