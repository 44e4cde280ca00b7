"""Walks data through a full-precision model block by block while the quantized one is written.

No more than one block's parameters and the activations of the calibration data are held; those of
both models where blocks are fed from the quantized one.

Under a recipe the data are pruned on their way: what a stage drops behind its layer, no later block
sees. The stage's own layer is calibrated on all tokens that it reads, as its attention is deployed.
The model that feeds the blocks chooses: in full precision, or with the quantized operators of the
blocks as they were written. The other model follows it, so both always hold the same tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from quota_jax.batch import Batch
from quota_jax.checkpoint import Checkpoint, CheckpointWriter
from quota_jax.checkpoint.format import castable
from quota_jax.config import ModelConfig, QwenVlConfig
from quota_jax.errors import QuotaError
from quota_jax.prune.select import Sequence, gather
from quota_jax.quant.blocks import Block, Params, forward, layer_sequence, partial_model
from quota_jax.quant.rtn import quantize_params
from quota_jax.quantization import QuantizationConfig
from quota_jax.recipe import Recipe, Stage

Transform = Callable[
    [str, Block, Mapping[str, np.ndarray], list[np.ndarray], list[np.ndarray]],
    Mapping[str, np.ndarray],
]
"""(name, block, parameters, inputs, outputs) -> parameters to be quantized. Outputs are those of
full precision, inputs those of the model that ``feed`` names, one array a batch; no inputs where
nothing reads the output."""

Feed = Literal["full", "quantized"]
FEEDS: tuple[str, ...] = get_args(Feed)
"""What a block reads while it is calibrated: outputs of the full-precision blocks before it, or of
the quantized ones."""


class Stream:
    """The calibration data on their way through a model: the full-precision one, or that which is
    quantized as ``quantization`` says.

    ``inputs`` are those of the next block, float32 on the host, one array a batch. ``batches`` may
    be shared with others: behind a pruning layer each is replaced by what is left of it.
    """

    def __init__(
        self,
        config: ModelConfig,
        batches: list[Batch | Sequence],
        quantization: QuantizationConfig = QuantizationConfig.none,
    ):
        self.config = config
        self.batches = batches
        self.quantization = quantization
        self.inputs: list[np.ndarray] = []
        self._states: dict[int, list[np.ndarray]] = {}

    def prepare(self, name: str, params: Params) -> None:
        """Takes in a block without layers: patch or token embeddings, as they are stored."""
        if name == "vision_embeddings":
            model = partial_model(self.config, QuantizationConfig.none, params)
            self.inputs = [
                np.asarray(model.vision.embed(getattr(b.pixels, "values", b.pixels)))
                for b in self.batches
                if isinstance(b, Batch)
            ]
            self._states = {0: self.inputs}
        elif name == "embeddings":
            model = partial_model(self.config, self.quantization, params)
            self.inputs = [
                np.asarray(model.embed(batch, jnp.asarray(x.reshape(-1, x.shape[-1]))))
                for batch, x in zip(self.batches, self.inputs, strict=True)
            ]

    def choose(
        self, params: Params, inputs: list[np.ndarray], block: Block, stage: Stage, recipe: Recipe
    ) -> list[tuple[Sequence, jax.Array]]:
        """What a stage leaves of each batch behind its layer, and the places to gather from."""
        return [
            _choose(
                params,
                x,
                batch,
                block=block,
                quantization=self.quantization,
                stage=stage,
                recipe=recipe,
            )
            for x, batch in zip(inputs, self.batches, strict=True)
        ]

    def drop(self, orders: list[jax.Array]) -> None:
        """Keeps the chosen places of the next block's inputs."""
        self.inputs = [
            np.asarray(gather(jnp.asarray(x), order))
            for x, order in zip(self.inputs, orders, strict=True)
        ]

    def enter(self, name: str, block: Block) -> list[np.ndarray]:
        """The inputs of the next block; none where nothing reads its output: CLIP's last layers."""
        config = self.config
        if not isinstance(config, QwenVlConfig):
            if block.kind == "vision" and _layer(name) >= max(config.feature_states):
                return []
            if block.kind == "projector" and self._states:
                chosen = zip(*(self._states[state] for state in config.feature_states), strict=True)
                first = int(config.vision_feature_select_strategy == "default")
                self.inputs = [np.concatenate(states, -1)[:, first:] for states in chosen]
                self._states = {}
        return self.inputs

    def pass_through(self, name: str, block: Block, params: Params) -> list[np.ndarray]:
        """Runs a block on all batches; returns its inputs, and ``inputs`` are then its outputs.

        Returns nothing for a block whose output nothing reads.
        """
        before = self.enter(name, block)
        if not before:
            return []
        self.inputs = [
            np.asarray(forward(params, x, batch, block=block, quantization=self.quantization))
            for x, batch in zip(before, self.batches, strict=True)
        ]
        done = _layer(name) + 1
        if block.kind == "vision" and done in getattr(self.config, "feature_states", ()):
            self._states[done] = self.inputs
        return before


@functools.partial(jax.jit, static_argnames=("block", "quantization", "stage", "recipe"))
def _choose(params, x, batch, *, block: Block, quantization, stage: Stage, recipe: Recipe):
    model = partial_model(block.config, quantization, params)
    return model.decoder.chosen(x, layer_sequence(batch), jnp.int32(0), stage, recipe)


def check_graph(recipe: Recipe) -> None:
    """Refuses recipes that blocks cannot be calibrated on one by one."""
    for stage in recipe.stages:
        if stage.point != "after_attention" or stage.min_keep_per_image or stage.selector.options:
            raise QuotaError(
                "calibration on a pruned model takes stages inside layers, without a floor per "
                f"picture, not {stage.selector.name!r} at {stage.point!r} of layer {stage.layer}"
            )


def _layer(name: str) -> int:
    """The layer of a block, -1 for one that is none."""
    number = name.rpartition("_")[2]
    return int(number) if number.isdigit() else -1


def write_blocks(
    checkpoint: Checkpoint,
    writer: CheckpointWriter,
    batches: list[Batch | Sequence],
    quantization: QuantizationConfig,
    transform: Transform,
    progress: Callable[[str, int, int], None] | None = None,
    feed: str = "full",
    recipe: Recipe | None = None,
) -> None:
    """Transforms, quantizes and writes every block that ``writer`` lacks.

    Finished blocks are only run, not transformed again: a block depends on the full-precision model
    and, with ``feed`` "quantized", on the blocks before it as they were written. Under a ``recipe``
    the entries of ``batches`` are replaced in place as tokens are dropped.
    """
    if recipe is not None:
        check_graph(recipe)
    stages = {stage.layer: stage for stage in (recipe.stages if recipe else ())}
    exact = Stream(checkpoint.config, batches)
    fed = exact if feed == "full" else Stream(checkpoint.config, batches, quantization)
    streams = [exact] if fed is exact else [exact, fed]
    names = list(checkpoint.block_names)
    blocks = {name: Block.named(checkpoint.config, name) for name in names}
    changed = {n for n, block in blocks.items() if block and quantization.quantizes(block.kind)}
    if quantization.has_cache_parameters:
        changed |= {n for n, block in blocks.items() if block and block.kind == "decoder"}
    missing = [name for name in names if name not in writer.finished]
    # Behind the last block to transform nobody reads the data any more.
    last = max((names.index(name) for name in missing if name in changed), default=-1)
    for place, name in enumerate(names):
        if place > last and name not in missing:
            continue
        stored, block = checkpoint.read_block(name), blocks[name]
        inputs: list[np.ndarray] = []
        reads: Params = {}
        if place <= last:
            reads = _floats(stored)
            if block is None:
                exact.prepare(name, reads)
                if fed is not exact:
                    fed.prepare(name, _floats(quantize_params(stored, quantization)))
            else:
                inputs = fed.enter(name, block)
                exact.pass_through(name, block, reads)
        if name in missing:
            params = stored
            if name in changed and block is not None:
                params = transform(name, block, stored, inputs, exact.inputs)
            writer.write_block(name, quantize_params(params, quantization))
        if block is not None and place < last:
            if fed is not exact:
                reads = _floats(writer.read_block(name))
                fed.pass_through(name, block, reads)
            stage = stages.get(_layer(name)) if block.kind == "decoder" else None
            if stage is not None and recipe is not None:
                found = fed.choose(reads, inputs, block, stage, recipe)
                for stream in streams:
                    stream.drop([order for _, order in found])
                batches[:] = [sequence for sequence, _ in found]
        if progress:
            progress(name, place + 1, len(names))


def outputs(
    checkpoint: Checkpoint, batches: list[Batch | Sequence]
) -> Iterator[tuple[str, Block | None, list[np.ndarray]]]:
    """Every block of a full-precision checkpoint with its outputs, one array a batch."""
    stream = Stream(checkpoint.config, list(batches))
    for name in checkpoint.block_names:
        params, block = _floats(checkpoint.read_block(name)), Block.named(checkpoint.config, name)
        if block is None:
            stream.prepare(name, params)
        else:
            stream.pass_through(name, block, params)
        yield name, block, stream.inputs


def _floats(params: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Parameters on the device, floats as a model that is loaded as float32 has them."""
    specs = {key: jax.ShapeDtypeStruct(value.shape, value.dtype) for key, value in params.items()}
    free = castable(specs)
    return {
        key: jnp.asarray(value, jnp.float32 if key in free else None)
        for key, value in params.items()
    }
