"""Sizes of the small models, their first parameters, and the auxiliary heads of training."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from quota_jax.config import (
    LlavaConfig,
    ModelConfig,
    QwenVisionConfig,
    QwenVlConfig,
    TextConfig,
    VisionConfig,
)
from quota_jax.models.shapes import parameter_shapes
from quota_jax.testbed.learning.processor import QWEN_ID
from quota_jax.testbed.world.atlas import GLYPHS
from quota_jax.testbed.world.renderer import COLOR_NONE, KIND_SIGN
from quota_jax.testbed.world.vocabulary import ID, IMAGE, VOCAB_SIZE

Params = dict[str, Any]

SMALL_LLAVA = LlavaConfig(
    vision=VisionConfig(
        hidden_size=256,
        intermediate_size=768,
        num_layers=7,
        num_heads=4,
        image_size=336,
        patch_size=14,
    ),
    text=TextConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=384,
        num_layers=12,
        num_heads=4,
        num_kv_heads=4,
        head_dim=64,
        rms_norm_eps=1e-5,
        max_position_embeddings=2048,
    ),
    image_token_id=ID[IMAGE],
)
"""11.9 M parameters. The seventh vision layer is in the file, but never used (feature layer -2)."""

SMALL_QWEN = QwenVlConfig(
    vision=QwenVisionConfig(
        hidden_size=256,
        intermediate_size=512,
        num_layers=6,
        num_heads=4,
        full_attention_layers=(2, 5),
    ),
    text=TextConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=384,
        num_layers=12,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        max_position_embeddings=2048,
        attention_bias=True,
        # The tower knows no absolute places: rows and columns reach the decoder by its rotation
        # alone. So their pairs begin among the fast ones, and the slow ones are left to match
        # content at any distance.
        mrope_section=(2, 6, 24),
    ),
    image_token_id=QWEN_ID["<|image_pad|>"],
    video_token_id=QWEN_ID["<|video_pad|>"],
    vision_start_token_id=QWEN_ID["<|vision_start|>"],
    vision_end_token_id=QWEN_ID["<|vision_end|>"],
)
"""11.6 M parameters; full attention in every third layer of the tower."""

SMALL_MODELS: dict[str, ModelConfig] = {"llava": SMALL_LLAVA, "qwen2_5_vl": SMALL_QWEN}
AUX_CLASSES = {"kind": KIND_SIGN + 1, "color": COLOR_NONE + 1, "glyph": len(GLYPHS)}
"""Outputs of the auxiliary patch classifiers, which exist only during training."""
_RESIDUAL = (".attn.o.weight", ".mlp.down.weight")


def tiny_model(family: str) -> ModelConfig:
    """A two-layer model that a CPU trains in seconds; same vocabulary and pictures."""
    config = SMALL_MODELS[family]
    text = dataclasses.replace(
        config.text,
        hidden_size=64,
        intermediate_size=96,
        num_layers=2,
        head_dim=16,
        mrope_section=(1, 2, 5) if family == "qwen2_5_vl" else None,
    )
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_heads": 2}
    if isinstance(config, QwenVlConfig):
        sizes |= {"num_layers": 2, "full_attention_layers": (1,)}
    else:
        sizes["num_layers"] = 3
    vision: Any = dataclasses.replace(config.vision, **sizes)
    return dataclasses.replace(config, vision=vision, text=text)


def count_parameters(config: ModelConfig) -> int:
    """Numbers in a checkpoint."""
    return sum(math.prod(shape) for shape in parameter_shapes(config).values())


def init_params(config: ModelConfig, seed: int) -> Params:
    """Float32 parameters by name, and zero-initialised auxiliary heads ``aux.*``.

    Matrices N(0, 1/fan_in), residual outputs smaller by sqrt(2 layers). LLaVA's position table
    starts as half a 2-D sine-cosine table.
    """
    rng = np.random.default_rng(seed)
    params: Params = {}
    for name, shape in parameter_shapes(config).items():
        if name.endswith(".bias"):
            value = np.zeros(shape)
        elif name.endswith(".scale"):
            value = np.ones(shape)
        elif name == "vision.position_embed.weight" and isinstance(config, LlavaConfig):
            value = _position_table(config.vision)
        elif name in ("vision.class_embed", "decoder.embed.weight"):
            value = rng.normal(size=shape) * 0.3
        else:
            fan_in = shape[-1] if ".layers." in name else math.prod(shape[1:])
            value = rng.normal(size=shape) / math.sqrt(fan_in)
            if name.endswith(_RESIDUAL):
                value = value / math.sqrt(2 * shape[0])
        params[name] = value.astype(np.float32)
    width = config.vision.hidden_size
    for name, classes in AUX_CLASSES.items():
        params[f"aux.{name}.weight"] = np.zeros((classes, width), np.float32)
        params[f"aux.{name}.bias"] = np.zeros(classes, np.float32)
    return params


def model_params(params: Params) -> Params:
    """The parameters without the auxiliary heads."""
    return {name: value for name, value in params.items() if not name.startswith("aux.")}


def _position_table(config: VisionConfig) -> np.ndarray:
    """[patches + 1, D]; a start that the learned table can leave. The class token has zeros."""
    side, width = config.image_size // config.patch_size, config.hidden_size // 4
    angles = np.arange(side)[:, None] / 10000 ** (np.arange(width) / width)
    axis = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    table = np.concatenate([np.repeat(axis, side, axis=0), np.tile(axis, (side, 1))], axis=1)
    return 0.5 * np.concatenate([np.zeros((1, table.shape[1])), table])
