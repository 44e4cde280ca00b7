"""Models of real shapes with random weights, and prompts for them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from quota_jax.batch import Batch
from quota_jax.config import PRESETS, LlavaConfig, ModelConfig, QwenVlConfig
from quota_jax.errors import QuotaError
from quota_jax.models.params import abstract_params, build_model
from quota_jax.models.vision_language import VisionLanguageModel
from quota_jax.processing.buckets import Buckets, Shape, assemble
from quota_jax.processing.pictures import Picture
from quota_jax.processing.qwen_pictures import QwenPictures
from quota_jax.quantization import QuantizationConfig

PIECE = 1 << 24
"""Values that are drawn at a time."""


def find_preset(name: str) -> tuple[str, ModelConfig]:
    """A preset's own name and its configuration, also by the spelling of released models
    (``llava-1.5-7b``).

    Raises:
      QuotaError: there is no such preset.
    """
    own = name.lower().replace("-", "_").replace(".", "_")
    if own not in PRESETS:
        raise QuotaError(f"no preset {name!r}; known: {', '.join(sorted(PRESETS))}")
    return own, PRESETS[own]


def random_model(
    config: ModelConfig, quantization: QuantizationConfig, dtype: Any, *, seed: int = 0
) -> VisionLanguageModel:
    """A model of this shape with random weights, made on the device piece by piece."""
    key = jax.random.key(seed)
    params = {}
    specs = abstract_params(config, quantization, dtype)
    for place, (name, spec) in enumerate(specs.items()):
        stem, _, leaf = name.rpartition(".")
        quantized = f"{stem}.packed" in specs or f"{stem}.codes" in specs
        params[name] = _random(jax.random.fold_in(key, place), leaf, quantized, spec)
    return build_model(config, quantization, params)


def _random(key: Any, leaf: str, quantized: bool, spec: jax.ShapeDtypeStruct) -> jax.Array:
    shape, dtype = spec.shape, spec.dtype
    if dtype in (jnp.uint8, jnp.int8):
        return _drawn(key, shape, dtype, lambda key, shape: jax.random.bits(key, shape, jnp.uint8))
    if leaf == "scale":
        # Codes of 4 bits have a spread of 4.6: rows of some thousands then keep their size.
        return jnp.full(shape, 0.003 if quantized else 1.0, dtype)
    if leaf == "clip":
        return jnp.ones(shape, dtype)
    if leaf == "bias" or len(shape) < 2:
        return jnp.zeros(shape, dtype)
    scale = shape[-1] ** -0.5
    return _drawn(key, shape, dtype, lambda key, shape: jax.random.normal(key, shape) * scale)


def _drawn(key: Any, shape: tuple[int, ...], dtype: Any, draw: Callable[..., Array]) -> Array:
    """An array made piece by piece in its place, so that a model's largest arrays need hardly more
    memory while they are made than afterwards (the peak is reported)."""
    out = jnp.zeros(shape, dtype)
    rows = max(1, PIECE * shape[0] // out.size)

    @functools.partial(jax.jit, static_argnames="count", donate_argnums=0)
    def fill(out, key, start, count):
        piece = draw(jax.random.fold_in(key, start), (count, *shape[1:])).astype(dtype)
        return jax.lax.dynamic_update_slice_in_dim(out, piece, start, 0)

    for start in range(0, shape[0], rows):
        out = fill(out, key, start, count=min(rows, shape[0] - start))
    return out


def example_batch(
    config: ModelConfig, batch_size: int, text_tokens: int, *, seed: int = 0
) -> Batch:
    """Prompts of one picture each: 336 x 336 for LLaVA-1.5, 1008 x 1008 for Qwen2.5-VL."""
    rng = np.random.default_rng(seed)
    image = config.image_token_id
    ids = rng.integers(0, min(image, config.text.vocab_size) - 1, (batch_size, text_tokens + 1))
    ids[:, 4] = image
    visual = ids[0] == image
    _, tokens = config.reference_picture
    if isinstance(config, QwenVlConfig):
        side = round(tokens**0.5) * config.vision.spatial_merge_size
        shape = (1, side * side, config.vision.patch_values)
        pixels: Any = rng.standard_normal(shape, np.float32)
        picture = Picture(pixels=pixels, num_tokens=tokens, grid=(1, side, side))
        reader = QwenPictures(image_processor=None, config=config)
        packed, rows = reader.pack(
            [picture] * batch_size,
            Buckets(),
            Shape(image_slots=batch_size, patch_bucket=side * side),
        )
        places = reader.positions(visual, [picture])
    else:
        assert isinstance(config, LlavaConfig)
        side = config.vision.image_size
        packed = rng.standard_normal((batch_size, 3, side, side), np.float32)
        rows = list(np.arange(batch_size * tokens).reshape(batch_size, tokens))
        places = np.arange(text_tokens + tokens)
    return assemble(
        list(ids.astype(np.int32)),
        [[row] for row in rows],
        [places] * batch_size,
        packed,
        placeholders=[image],
        text_bucket=text_tokens,
        visual_bucket=tokens,
        batch_size=batch_size,
        filler_id=0,
    )
