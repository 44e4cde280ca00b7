"""Random packed models and caches for tests of one decode step, without a prefill before it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import quota_jax.models.decoder as decoder
from quota_jax.config import ModelConfig, config_from_hf
from quota_jax.kv_cache import CacheGroup
from quota_jax.models.params import abstract_params, build_model
from quota_jax.models.vision_language import VisionLanguageModel
from quota_jax.quantization import QuantizationConfig
from tests.tiny_models import TinyLlava
from tests.tiny_models import hf_config as llava_config
from tests.tiny_qwen import TinyQwen
from tests.tiny_qwen import hf_config as qwen_config

METHODS = {
    "RTN": QuantizationConfig.parse("W4A4KV4"),
    "RTN, 8-bit activations": QuantizationConfig.parse("W4A8KV4"),
    "FlatQuant": QuantizationConfig.parse("W4A4KV4", method="flatquant"),
    "FlatQuant of heads, keys and cache": dataclasses.replace(
        QuantizationConfig.parse("W4A8KV4", method="flatquant"),
        output_transform="heads",
        key_transform=True,
        cache_clip=True,
    ),
}


def tiny_config(family: str, **changes: Any) -> ModelConfig:
    """Two query heads to a key head; Qwen's projection of queries, keys and values has a bias."""
    if family == "llava":
        return config_from_hf(llava_config(TinyLlava(num_layers=4, num_kv_heads=2, **changes)))
    return config_from_hf(qwen_config(TinyQwen(num_layers=4, num_kv_heads=2, **changes)))


def random_model(
    config: ModelConfig, quantization: QuantizationConfig, dtype: Any, seed: int = 0
) -> VisionLanguageModel:
    """A model whose sublayers all move the residual stream, so that a wrong one shows."""
    rng = np.random.default_rng(seed)

    def draw(name: str, spec: jax.ShapeDtypeStruct) -> jax.Array:
        stem, _, leaf = name.rpartition(".")
        if leaf in ("packed", "codes"):
            value = rng.integers(0, 256, spec.shape).astype(np.uint8)
        elif leaf == "zeros":
            value = rng.integers(0, 16, spec.shape)
        elif leaf == "clip":
            value = rng.uniform(0.7, 1.0, spec.shape)
        elif leaf == "scale" and "norm" not in stem:
            value = rng.uniform(0.2, 0.4, spec.shape) / 4.6 / 8
        elif leaf == "scale":
            value = rng.uniform(0.5, 1.5, spec.shape)
        else:
            value = rng.standard_normal(spec.shape) * spec.shape[-1] ** -0.5
        return jnp.asarray(value).astype(spec.dtype)

    specs = abstract_params(config, quantization, dtype)
    return build_model(config, quantization, {name: draw(name, s) for name, s in specs.items()})


def random_groups(
    config: ModelConfig,
    lengths: list[list[int]],
    layers: list[int],
    *,
    capacity: int = 64,
    seed: int = 1,
) -> tuple[CacheGroup, ...]:
    """A filled 4-bit cache: for each group its number of layers and each sample's length."""
    rng = np.random.default_rng(seed)
    text = config.text

    def stored(depth: int, batch: int):
        shape = (depth, batch, text.num_kv_heads, capacity)
        codes = rng.integers(0, 256, (*shape, text.head_dim // 2)).astype(np.uint8)
        scale = jnp.asarray(rng.uniform(0.05, 0.2, shape), jnp.bfloat16)
        return jnp.asarray(codes), scale, jnp.asarray(rng.integers(0, 16, shape), jnp.uint8)

    return tuple(
        CacheGroup(
            key=stored(depth, len(own)),
            value=stored(depth, len(own)),
            lengths=jnp.asarray(own, jnp.int32),
            shift=jnp.asarray(rng.integers(0, 3, len(own)), jnp.int32),
            bits=4,
        )
        for depth, own in zip(layers, lengths, strict=True)
    )


def steps(model: VisionLanguageModel, groups: Any, count: int, monkeypatch: Any, *, fused: bool):
    """Logits of ``count`` greedy decode steps and the cache after them; the last sample is
    inactive."""
    if not fused:
        monkeypatch.setattr(decoder, "obstacle", lambda layers: "a test wants the modules")
    batch = groups[0].lengths.shape[0]
    active = jnp.arange(batch) < max(1, batch - 1)
    step = jax.jit(lambda m, t, p, g: m.decoder.step(t, p, g, active))
    tokens, logits = jnp.arange(batch) + 3, []
    for index in range(count):
        found, groups = step(model, tokens, 50 + index * active, groups)
        tokens = found.argmax(-1)
        logits.append(np.asarray(found))
    monkeypatch.undo()
    return np.stack(logits), groups
