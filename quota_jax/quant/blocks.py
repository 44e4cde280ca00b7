"""Single checkpoint blocks as functions, through the layer methods that inference runs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from quota_jax.batch import Batch
from quota_jax.config import ModelConfig, QwenVlConfig
from quota_jax.models.params import build_model
from quota_jax.models.shapes import parameter_shapes
from quota_jax.models.vision_language import sequence_of
from quota_jax.nn.linear import observed
from quota_jax.nn.rope import axial_angles
from quota_jax.prune.select import Sequence
from quota_jax.quantization import QuantizationConfig

Array = jax.Array
Params = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """What is static about a block: its program is compiled once for all blocks that are alike.

    kind: "vision", "projector" or "decoder". full: full attention (a layer of Qwen's tower).
    """

    config: ModelConfig
    kind: str
    full: bool = True

    @classmethod
    def named(cls, config: ModelConfig, name: str) -> Block | None:
        """The block with this name; None for embeddings, head and the like, which have no
        linears."""
        kind, _, rest = name.partition("_layer_")
        if not rest:
            return cls(config=config, kind=kind) if kind == "projector" else None
        full = True
        if kind == "vision" and isinstance(config, QwenVlConfig):
            full = int(rest) in config.vision.full_attention_layers
        return cls(config=config, kind=kind, full=full)

    def __call__(
        self, params: Params, x: Array, batch: Batch | Sequence, quantization: QuantizationConfig
    ) -> Array:
        """The block's output; float weights of a quantized module are simulated."""
        return self.run(partial_model(self.config, quantization, params), x, batch)

    def run(self, model: Any, x: Array, batch: Batch | Sequence) -> Array:
        """The block as layer 0 of ``model``; a decoder layer takes what pruning left of a batch."""
        first = jnp.int32(0)
        if self.kind == "projector":
            tokens = model.project(x)
            # A batch may hold no picture: -1 would be no number then.
            rows = tokens.shape[0] // max(1, x.shape[0])
            return tokens.reshape(x.shape[0], rows, tokens.shape[-1])
        if self.kind == "decoder":
            return model.decoder.layer(x, layer_sequence(batch), first)[0]
        assert isinstance(batch, Batch)
        if not isinstance(self.config, QwenVlConfig):
            return model.vision.layer(x, first)
        vision = self.config.vision
        angles = axial_angles(vision.head_dim, vision.rope_theta, batch.pixels.coordinates)
        return model.vision.layer(x, first, batch.pixels, angles, full=self.full)

    def mask(self, batch: Batch | Sequence, count: int) -> Array:
        """Which rows of the output are real, of the first ``count`` samples; bool."""
        if self.kind == "decoder":
            return batch.is_real & (jnp.arange(batch.lengths.shape[0]) < count)[:, None]
        assert isinstance(batch, Batch)
        config = self.config
        if isinstance(config, QwenVlConfig):
            unit = config.vision.merge_unit
            slots, tokens = batch.pixels.values.shape[0], batch.pixels.values.shape[1] // unit
            lengths = batch.pixels.lengths // unit
            repeat = unit if self.kind == "vision" else 1
            extra = 0
        else:
            slots, tokens = batch.pixels.shape[0], config.tokens_per_image
            lengths, repeat = jnp.full((slots,), tokens), 1
            # The class token stands in front of the patches inside the tower, and "full" keeps it.
            extra = config.vision.num_patches + 1 - tokens if self.kind == "vision" else 0
        used = -(-(jnp.max(batch.visual_index[:count], initial=-1) + 1) // max(tokens, 1))
        rows = jnp.arange((tokens + extra) * repeat)[None]
        real = rows < ((lengths + extra) * repeat)[:, None]
        return real & (jnp.arange(slots) < used)[:, None]


def layer_sequence(batch: Batch | Sequence) -> Sequence:
    """What a decoder layer sees of a batch: all of it, or what pruning left."""
    return batch if isinstance(batch, Sequence) else sequence_of(batch)


def partial_model(config: ModelConfig, quantization: QuantizationConfig, params: Params) -> Any:
    """A model with these parameters; those of a block become layer 0, all others are empty."""
    quantization = dataclasses.replace(quantization, layer_bits=())
    whole: dict[str, Any] = {
        name: value[None] if ".layers." in name else value for name, value in params.items()
    }
    for name, shape in parameter_shapes(config).items():
        stem, _, kind = name.rpartition(".")
        stored = {f"{stem}.packed", f"{stem}.codes"} if kind == "weight" else {name}
        if name not in whole and not stored & set(whole):
            whole[name] = jnp.zeros((0,) * len(shape), jnp.float32)
    return build_model(config, quantization, whole)


@functools.partial(jax.jit, static_argnames=("block", "quantization"))
def forward(
    params: Params,
    x: Array,
    batch: Batch,
    *,
    block: Block,
    quantization: QuantizationConfig = QuantizationConfig.none,
) -> Array:
    """The output of a block."""
    return block(params, x, batch, quantization)


@functools.partial(jax.jit, static_argnames=("block", "linears"))
def observe(
    params: Params, x: Array, batch: Batch, mask: Array, *, block: Block, linears: tuple[str, ...]
) -> dict[str, Array]:
    """Largest absolute value of each input channel of each linear, in full precision."""
    model = partial_model(block.config, QuantizationConfig.none, params)
    names = {id(functools.reduce(getattr, name.split("."), model)): name for name in linears}
    found = {}

    def record(linear, rows):
        if (name := names.get(id(linear))) is not None:
            found[name] = jnp.where(mask.reshape(-1, 1), jnp.abs(rows), 0).max(0)

    with observed(record):
        block.run(model, x, batch)
    return found


def largest_inputs(
    block: Block,
    params: Params,
    inputs: list[np.ndarray],
    batches: list[Batch],
    masks: list[Array],
    linears: tuple[str, ...],
) -> dict[str, np.ndarray]:
    """``observe`` over all batches; empty without any."""
    largest: dict[str, np.ndarray] = {}
    for x, batch, mask in zip(inputs, batches, masks, strict=bool(inputs)):
        found = observe(params, x, batch, mask, block=block, linears=linears)
        largest = {key: np.maximum(largest.get(key, 0), found[key]) for key in linears}
    return largest
