"""Walks data through a full-precision model block by block while the quantized one is written.

No more than one block's parameters and the activations of the calibration data are held.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np

from quota_jax.batch import Batch
from quota_jax.checkpoint import Checkpoint, CheckpointWriter
from quota_jax.config import ModelConfig, QwenVlConfig
from quota_jax.quant.blocks import Block, Params, forward, partial_model
from quota_jax.quant.rtn import quantize_params
from quota_jax.quantization import QuantizationConfig

Transform = Callable[
    [str, Block, Mapping[str, np.ndarray], list[np.ndarray], list[np.ndarray]],
    Mapping[str, np.ndarray],
]
"""(name, block, parameters, inputs, outputs) -> parameters to be quantized. Inputs and outputs are
those of full precision, one array a batch; no inputs where nothing reads the output."""


class Stream:
    """The calibration data on their way through the full-precision model.

    ``inputs`` are those of the next block, float32 on the host, one array a batch.
    """

    def __init__(self, config: ModelConfig, batches: list[Batch]):
        self.config = config
        self.batches = batches
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

    def pass_through(self, name: str, block: Block, params: Params) -> list[np.ndarray]:
        """Runs a block on all batches; returns its inputs, and ``inputs`` are then its outputs.

        Returns nothing for a block whose output nothing reads (CLIP's last layers).
        """
        config, kind = self.config, block.kind
        layer = int(name.rpartition("_")[2]) if kind == "vision" else -1
        if not isinstance(config, QwenVlConfig):
            if kind == "vision" and layer >= max(config.feature_states):
                return []
            if kind == "projector":
                chosen = zip(*(self._states[state] for state in config.feature_states), strict=True)
                first = int(config.vision_feature_select_strategy == "default")
                self.inputs = [np.concatenate(states, -1)[:, first:] for states in chosen]
                self._states = {}
        before = self.inputs
        self.inputs = [
            np.asarray(forward(params, x, batch, block=block))
            for x, batch in zip(before, self.batches, strict=True)
        ]
        if kind == "vision" and layer + 1 in getattr(config, "feature_states", ()):
            self._states[layer + 1] = self.inputs
        return before


def write_blocks(
    checkpoint: Checkpoint,
    writer: CheckpointWriter,
    batches: list[Batch],
    quantization: QuantizationConfig,
    transform: Transform,
    progress: Callable[[str, int, int], None] | None = None,
) -> None:
    """Transforms, quantizes and writes every block that ``writer`` lacks.

    Blocks are independent of each other (all read full-precision inputs), so finished ones are only
    run, not transformed again.
    """
    stream = Stream(checkpoint.config, batches)
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
            params = {key: jnp.asarray(value, jnp.float32) for key, value in stored.items()}
            if block is None:
                stream.prepare(name, params)
            else:
                inputs = stream.pass_through(name, block, params)
        if name in missing:
            params = stored
            if name in changed and block is not None:
                params = transform(name, block, stored, inputs, stream.inputs)
            writer.write_block(name, quantize_params(params, quantization))
        if progress:
            progress(name, place + 1, len(names))
