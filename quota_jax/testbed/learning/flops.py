"""Arithmetic of a training step, to plan sizes: matrix products and attention only."""

from __future__ import annotations

import math

from quota_jax.config import QwenVlConfig
from quota_jax.models.shapes import parameter_shapes
from quota_jax.testbed.learning.dialect import dialect_of, visual_grid
from quota_jax.testbed.learning.qwen import picture_grid
from quota_jax.testbed.learning.step import TrainingConfig

MEASURED_RATE = 90e12
"""FLOP/s that a step of such a model reached on one H100 (about; by the count below)."""


def sequence_length(config: TrainingConfig, size: tuple[int, int]) -> int:
    """Tokens of a training sequence."""
    return (
        len(dialect_of(config.model).before)
        + math.prod(visual_grid(config.model, size))
        + config.text_length
    )


def flops_per_picture(config: TrainingConfig, size: tuple[int, int]) -> float:
    """Forward and backward pass of one picture with its conversation.

    A product counts 2 per multiplication, three times over (the backward pass has two products
    for each); attention 3.5 times, because its backward pass computes the scores again. Causal
    attention counts half.
    """
    model = config.model
    vision, text = model.vision, model.text
    patches = math.prod(edge // vision.patch_size for edge in size)
    length, visual = sequence_length(config, size), math.prod(visual_grid(model, size))
    tower_layers, full_layers = vision.num_layers, vision.num_layers
    windows = 0
    if isinstance(model, QwenVlConfig):
        full_layers = len(model.vision.full_attention_layers)
        windows = len(picture_grid(model.vision, size).window_lengths)
        window = model.vision.window_patches
    else:
        tower_layers = full_layers = model.feature_states[0]
        window = 0
    linear = 0.0
    for name, shape in parameter_shapes(model).items():
        if not name.endswith("weight") or "position" in name:
            continue
        products = math.prod(shape)
        if name.startswith("vision.layers"):
            products = products // vision.num_layers * tower_layers
        rows = patches if name.startswith("vision") else visual
        if name.startswith("decoder"):
            rows = length if "layers" in name else config.text_length
        linear += 2.0 * products * rows
    width = text.num_heads * text.head_dim
    attention = text.num_layers * 4.0 * length**2 * width / 2
    attention += full_layers * 4.0 * patches**2 * vision.hidden_size
    attention += (tower_layers - full_layers) * 4.0 * windows * window**2 * vision.hidden_size
    return 3.0 * linear + 3.5 * attention


def pictures_per_second(config: TrainingConfig, rate: float = MEASURED_RATE) -> float:
    """Expected speed at ``rate`` FLOP/s, over the sizes in turn; drawing is left out (some %)."""
    mean = sum(flops_per_picture(config, size) for size in config.sizes) / len(config.sizes)
    return rate / mean
