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

import dataclasses
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
from quota_jax.quant.folding import (
    Learned,
    Site,
    find_sites,
    fold,
    fold_exactly,
    start,
    start_cache,
)
from quota_jax.quant.streaming import FEEDS, Transform
from quota_jax.quantization import OUTPUT_TRANSFORMS, QuantizationConfig

RESIDENT_SHARE = 0.25
"""A block's inputs and outputs stay on an accelerator while it is trained where they take at most
this share of its memory; otherwise every step copies its batch there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FlatQuantOptions:
    """How the transforms are learned; the defaults are those of the authors' scripts.

    steps: optimizer steps per block, each on one batch, the batches in turn. start: "random"
    rotations or the "identity". Rates fall along a cosine to a thousandth. feed: what blocks read,
    outputs of "full" precision or of the "quantized" blocks before them. modality_weights: of the
    errors of visual and of text tokens in the decoder.

    output_transform: of what attention gives, by "heads" (P_o) or a "kronecker" product over all
    features. transform_values: P_v, with "kronecker" of values that are cached in less than 16 bits
    only. transform_keys: P_k, and clip_cache: learned factors of the ranges of keys and values,
    both where the cache has less than 16 bits. Keys by channel have no P_k: they are quantized
    before their rotation, and a transform of rotated keys would mix their channels again.
    """

    steps: int = 480
    batch_size: int = 4
    seed: int = 0
    start: str = "random"
    transform_rate: float = 5e-3
    clip_rate: float = 5e-2
    feed: str = "full"
    modality_weights: tuple[float, float] = (1.0, 1.0)
    output_transform: str = "kronecker"
    transform_values: bool = True
    transform_keys: bool = False
    clip_cache: bool = False

    def __post_init__(self):
        if self.output_transform not in OUTPUT_TRANSFORMS:
            known = ", ".join(OUTPUT_TRANSFORMS)
            raise QuotaError(
                f"output_transform {self.output_transform!r} is unknown; known: {known}"
            )
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

    def configure(self, quantization: QuantizationConfig) -> QuantizationConfig:
        """``quantization`` with those of the transforms chosen here that its checkpoints store."""
        cached = quantization.kv_bits < 16
        by_token = quantization.key_quantization == "token"
        return dataclasses.replace(
            quantization,
            output_transform=self.output_transform,
            key_transform=self.transform_keys and cached and by_token,
            cache_clip=self.clip_cache and cached,
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
        return "clip" if path[1].key.endswith("_clip") else "transform"

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
        sites = block_sites(block, stored, quantization, options.transform_values)
        task = Task(block=block, quantization=quantization, sites=sites, options=options)
        learned, found = task.learn(name, stored, inputs, outputs, data)
        if report and inputs:
            report(found)
        return fold_exactly(stored, sites, learned)

    return transform


def block_sites(
    block: Block,
    names: Mapping[str, Any],
    quantization: QuantizationConfig,
    transform_values: bool = True,
) -> tuple[Site, ...]:
    """The transforms of a block as ``quantization`` lays them out."""
    if block.kind == "projector":
        return find_sites(names, quantization)
    by_heads = quantization.output_transform == "heads"
    heads = block.config.vision if block.kind == "vision" else block.config.text
    cached = block.kind == "decoder" and quantization.kv_bits < 16
    return find_sites(
        names,
        quantization,
        value_width=heads.head_dim if transform_values and (by_heads or cached) else 0,
        heads=heads.num_heads if by_heads else 0,
    )


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
        room = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", 0)  # a CPU tells none
        if sum(array.nbytes for array in (*inputs, *outputs)) <= RESIDENT_SHARE * room:
            inputs, outputs = jax.device_put((inputs, outputs))
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
        kind = self.options.start if inputs else "identity"
        seed = zlib.crc32(f"{self.options.seed} {name}".encode())
        learned = start(params, self.sites, largest, self.quantization, kind=kind, seed=seed)
        if self.block.kind == "decoder":
            width = self.block.config.text.head_dim
            learned |= start_cache(self.quantization, width, kind=kind, seed=seed)
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
