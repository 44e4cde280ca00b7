"""Learns FlatQuant's transforms block by block (section 3.2 of the paper, arXiv 2410.09426).

Each block is trained alone to repeat its full-precision output on full-precision inputs, so a block
depends only on the full-precision model, the data and the seed. With ``feed`` "quantized" it reads
the outputs of the quantized blocks before it, as they were written, and learns to make their errors
good too. Either way a killed run goes on with the blocks that are missing and ends with the arrays
of an uninterrupted one.

Errors of visual and of text tokens may have different weights in the decoder. MBQ (Li et al., CVPR
2025), where the idea comes from, weighs absolute errors of visual tokens by the ratio of the mean
absolute gradients of the caption's loss at visual and at answer tokens, layer by layer; here the
weights are given, one pair for all layers, and errors are squared as FlatQuant's are. The divisor
stays the number of all tokens, as in MBQ, so equal weights of 1 are FlatQuant's loss.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from quota_jax.batch import Batch
from quota_jax.errors import QuotaError
from quota_jax.quant.blocks import Block, largest_inputs
from quota_jax.quant.calibration_data import CalibrationData
from quota_jax.quant.flatquant import STARTS
from quota_jax.quant.folding import Learned, Site, find_sites, fold, fold_exactly, start
from quota_jax.quant.streaming import FEEDS, Transform
from quota_jax.quantization import QuantizationConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class FlatQuantOptions:
    """How the transforms are learned; the defaults are those of the authors' scripts.

    steps: optimizer steps per block, each on one batch, the batches in turn. start: "random"
    rotations or the "identity". Rates fall along a cosine to a thousandth. feed: what blocks read,
    outputs of "full" precision or of the "quantized" blocks before them. modality_weights: of the
    errors of visual and of text tokens in the decoder. transform_values: also the values that are
    cached in less than 16 bits.
    """

    steps: int = 480
    batch_size: int = 4
    seed: int = 0
    start: str = "random"
    transform_rate: float = 5e-3
    clip_rate: float = 5e-2
    feed: str = "full"
    modality_weights: tuple[float, float] = (1.0, 1.0)
    transform_values: bool = True

    def __post_init__(self):
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise QuotaError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.start not in STARTS:
            raise QuotaError(f"start {self.start!r} is unknown; known: {', '.join(STARTS)}")
        if self.feed not in FEEDS:
            raise QuotaError(f"feed {self.feed!r} is unknown; known: {', '.join(FEEDS)}")
        weights = self.modality_weights
        if (
            len(weights) != 2
            or not all(math.isfinite(each) and each >= 0 for each in weights)
            or not any(weights)
        ):
            raise QuotaError(
                "modality_weights must be two numbers of at least 0, of visual and of text tokens, "
                f"not both 0; got {' '.join(map(str, weights))}"
            )

    def optimizer(self) -> optax.GradientTransformation:
        """AdamW (decay 0.01, as in torch) with ten times the rate for clipping factors."""

        def adamw(rate):
            schedule = optax.cosine_decay_schedule(rate, self.steps, alpha=1e-3)
            return optax.adamw(schedule, weight_decay=0.01)

        return optax.multi_transform(
            {"transform": adamw(self.transform_rate), "clip": adamw(self.clip_rate)}, _groups
        )


def _groups(learned: Learned) -> Any:
    def group(path, _):
        return "clip" if path[1].key in ("weight_clip", "input_clip") else "transform"

    return jax.tree_util.tree_map_with_path(group, learned)


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockReport:
    """Mean squared error of a block's output over the first and the last round of the batches."""

    name: str
    first_loss: float
    last_loss: float


def learner(
    data: CalibrationData,
    quantization: QuantizationConfig,
    options: FlatQuantOptions,
    report: Callable[[BlockReport], None] | None = None,
) -> Transform:
    """What ``write_blocks`` does to each block: trains and folds its transforms."""

    def transform(name, block, stored, inputs, outputs):
        cached = block.kind == "decoder" and quantization.kv_bits < 16
        width = block.config.text.head_dim if cached and options.transform_values else 0
        sites = find_sites(stored, quantization, value_width=width)
        task = Task(block=block, quantization=quantization, sites=sites, options=options)
        learned, found = task.learn(name, stored, inputs, outputs, data)
        if report and inputs:
            report(found)
        return fold_exactly(stored, sites, learned)

    return transform


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """The training of one block; hashable, so that blocks of one kind share a compiled program."""

    block: Block
    quantization: QuantizationConfig
    sites: tuple[Site, ...]
    options: FlatQuantOptions

    def learn(
        self,
        name: str,
        stored: Mapping[str, np.ndarray],
        inputs: list[np.ndarray],
        outputs: list[np.ndarray],
        data: CalibrationData,
    ) -> tuple[Learned, BlockReport]:
        """All steps of one block.

        Without ``inputs`` (a block whose output nothing reads) nothing is learned: identities.

        Raises:
          QuotaError: the loss is not finite.
        """
        params = {key: jnp.asarray(value, jnp.float32) for key, value in stored.items()}
        masks = data.masks(self.block)
        learned = self.begin(name, params, inputs, data.batches, masks)
        state = self.options.optimizer().init(learned)
        losses: list[jax.Array] = []
        for step in range(self.options.steps if inputs else 0):
            i = step % len(inputs)
            learned, state, loss = _step(
                learned, state, params, inputs[i], outputs[i], data.batches[i], masks[i], task=self
            )
            losses.append(loss)
        # Means over one round of the batches: single steps see different data.
        head, tail = losses[: len(inputs)], losses[len(losses) - len(inputs) :]
        first, last = (float(np.mean(part)) if part else 0.0 for part in (head, tail))
        if not np.isfinite(last):
            raise QuotaError(f"calibration of block {name!r} diverged: its loss is not finite")
        return learned, BlockReport(name=name, first_loss=first, last_loss=last)

    def begin(
        self,
        name: str,
        params: Mapping[str, jax.Array],
        inputs: list[np.ndarray],
        batches: list[Batch],
        masks: list[jax.Array],
    ) -> Learned:
        """The trainable parameters before the first step."""
        linears = tuple(site.linear for site in self.sites)
        largest = largest_inputs(self.block, params, inputs, batches, masks, linears)
        learned = start(
            params,
            self.sites,
            largest,
            self.quantization,
            kind=self.options.start if inputs else "identity",
            seed=zlib.crc32(f"{self.options.seed} {name}".encode()),
        )
        return jax.tree.map(lambda value: jnp.asarray(value, jnp.float32), learned)

    def loss(
        self,
        learned: Learned,
        params: Mapping[str, jax.Array],
        x: jax.Array,
        target: jax.Array,
        batch: Batch,
        mask: jax.Array,
    ) -> jax.Array:
        """Mean squared error over the real rows of a batch, with modalities weighted."""
        with jax.default_matmul_precision("highest"):
            folded = fold(params, self.sites, learned, jnp)
            found = self.block(folded, x, batch, self.quantization)
        return masked_error(found, target, mask, self.row_weights(batch))

    def row_weights(self, batch: Batch) -> jax.Array | None:
        """Weights of the rows' errors; None where all are equal: vision tower and projector have
        visual rows only."""
        visual, text = self.options.modality_weights
        if self.block.kind != "decoder" or visual == text == 1:
            return None
        return jnp.where(batch.is_visual, jnp.float32(visual), jnp.float32(text))


def masked_error(
    found: jax.Array, target: jax.Array, mask: jax.Array, weights: jax.Array | None = None
) -> jax.Array:
    """Mean squared error over the rows of ``mask``, each times its weight."""
    error = jnp.where(mask[..., None], jnp.square(found - target), 0).mean(-1)
    if weights is not None:
        error = error * weights
    return error.sum() / jnp.maximum(mask.sum(), 1)


@functools.partial(jax.jit, static_argnames="task", donate_argnums=(0, 1))
def _step(learned, state, params, x, target, batch, mask, *, task: Task):
    def scale_free(learned):
        loss = task.loss(learned, params, x, target, batch, mask)
        return loss / jnp.maximum(jax.lax.stop_gradient(loss), 1e-30), loss

    gradients, loss = jax.grad(scale_free, has_aux=True)(learned)
    updates, state = task.options.optimizer().update(gradients, state, learned)
    return optax.apply_updates(learned, updates), state, loss
