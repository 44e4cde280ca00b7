"""Walks data through a full-precision model block by block while the quantized one is written.

No more than one block's parameters and the activations of the calibration data are held; those of
both models where blocks are fed from the quantized one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from quota_jax.batch import Batch
from quota_jax.checkpoint import Checkpoint, CheckpointWriter
from quota_jax.checkpoint.format import castable
from quota_jax.config import ModelConfig, QwenVlConfig
from quota_jax.quant.blocks import Block, Params, forward, partial_model
from quota_jax.quant.rtn import quantize_params
from quota_jax.quantization import QuantizationConfig

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

    ``inputs`` are those of the next block, float32 on the host, one array a batch.
    """

    def __init__(
        self,
        config: ModelConfig,
        batches: list[Batch],
        quantization: QuantizationConfig = QuantizationConfig.none,
    ):
        self.config = config
        self.batches = batches
        self.quantization = quantization
        self.inputs: list[np.ndarray] = []
        self._states: dict[int, list[np.ndarray]] = {}

    def prepare(self, name: str, params: Params) -> None:
        """Takes in a block without layers: patch or token embeddings."""
        if name == "vision_embeddings":
            model = partial_model(self.config, QuantizationConfig.none, params)
            self.inputs = [
                np.asarray(model.vision.embed(getattr(b.pixels, "values", b.pixels)))
                for b in self.batches
            ]
            self._states = {0: self.inputs}
        elif name == "embeddings":
            model = partial_model(self.config, QuantizationConfig.none, params)
            self.inputs = [
                np.asarray(model.embed(batch, jnp.asarray(x.reshape(-1, x.shape[-1]))))
                for batch, x in zip(self.batches, self.inputs, strict=True)
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


def _layer(name: str) -> int:
    """The layer of a block, -1 for one that is none."""
    number = name.rpartition("_")[2]
    return int(number) if number.isdigit() else -1


def write_blocks(
    checkpoint: Checkpoint,
    writer: CheckpointWriter,
    batches: list[Batch],
    quantization: QuantizationConfig,
    transform: Transform,
    progress: Callable[[str, int, int], None] | None = None,
    feed: str = "full",
) -> None:
    """Transforms, quantizes and writes every block that ``writer`` lacks.

    Finished blocks are only run, not transformed again: a block depends on the full-precision model
    and, with ``feed`` "quantized", on the blocks before it as they were written.
    """
    exact = Stream(checkpoint.config, batches)
    fed = exact if feed == "full" else Stream(checkpoint.config, batches, quantization)
    names = list(checkpoint.block_names)
    blocks = {name: Block.named(checkpoint.config, name) for name in names}
    changed = {n for n, block in blocks.items() if block and quantization.quantizes(block.kind)}
    missing = [name for name in names if name not in writer.finished]
    # Behind the last block to transform nobody reads the data any more.
    last = max((names.index(name) for name in missing if name in changed), default=-1)
    for place, name in enumerate(names):
        if place > last and name not in missing:
            continue
        stored, block = checkpoint.read_block(name), blocks[name]
        inputs: list[np.ndarray] = []
        if place <= last:
            params = _floats(stored)
            if block is None:
                for stream in {id(each): each for each in (exact, fed)}.values():
                    stream.prepare(name, params)
            else:
                inputs = fed.enter(name, block)
                exact.pass_through(name, block, params)
        if name in missing:
            params = stored
            if name in changed and block is not None:
                params = transform(name, block, stored, inputs, exact.inputs)
            writer.write_block(name, quantize_params(params, quantization))
        if block is not None and fed is not exact and place < last:
            fed.pass_through(name, block, _floats(writer.read_block(name)))
        if progress:
            progress(name, place + 1, len(names))


def _floats(params: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Parameters on the device, floats as a model that is loaded as float32 has them."""
    specs = {key: jax.ShapeDtypeStruct(value.shape, value.dtype) for key, value in params.items()}
    free = castable(specs)
    return {
        key: jnp.asarray(value, jnp.float32 if key in free else None)
        for key, value in params.items()
    }
