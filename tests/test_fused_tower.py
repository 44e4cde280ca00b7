"""Vision towers in few launches: equal to the modules one by one, taken where they should be, and
lowered for a GPU that is not there."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels.int4_matmul.api as matmul_api
import pallas_kernels.transform_quantize.api as quantize_api
from quota_jax.bench import example_batch
from quota_jax.config import PRESETS
from quota_jax.models import fused_layers
from quota_jax.models.params import abstract_params, build_model
from quota_jax.models.vision_layers import fused_layer
from quota_jax.nn.linear import observed
from quota_jax.quantization import QuantizationConfig
from tests.decode_samples import METHODS, random_model, tiny_config
from tests.test_fused_decode import TARGETS
from tests.test_transform_quantize import HOPPER, lower, newer_jax, triton


def tower(family: str, method: str, dtype: str, **changes: Any) -> tuple[Any, Any]:
    """A random model and pictures; CLIP is read after two layers and in between."""
    if family == "llava":
        changes = {"vision_feature_layer": (-2, 1), **changes}
    config = tiny_config(family, **changes)
    model = random_model(config, METHODS[method], jnp.dtype(dtype))
    pixels = example_batch(config, 2, 16).pixels
    noise = np.random.default_rng(7).standard_normal
    if family == "llava":
        return model, jnp.asarray(noise(pixels.shape, np.float32))
    values = jnp.asarray(noise(pixels.values.shape, np.float32))
    return model, dataclasses.replace(pixels, values=values)


def run(model: Any, pixels: Any, monkeypatch: Any = None) -> np.ndarray:
    """What the projector reads; with a ``monkeypatch`` by the modules."""
    if monkeypatch is not None:
        monkeypatch.setattr(fused_layers, "obstacle", lambda layers: "a test wants the modules")
    jax.clear_caches()
    found = jax.jit(lambda model, pixels: model.tower_states(pixels))(model, pixels)
    if monkeypatch is not None:
        monkeypatch.undo()
    return np.asarray(found.astype(jnp.float32))


@pytest.mark.parametrize(
    ("method", "dtype"),
    [
        ("RTN", "bfloat16"),
        ("RTN", "float32"),
        ("RTN, 8-bit activations", "bfloat16"),
        ("FlatQuant", "bfloat16"),
        ("FlatQuant of heads, keys and cache", "float32"),
    ],
)
@pytest.mark.parametrize("family", ["llava", "qwen"])
def test_the_fused_tower_equals_the_modules_bit_for_bit(monkeypatch, family, method, dtype):
    """On a CPU, with the number of tokens that it is and with padding behind it."""
    model, pixels = tower(family, method, dtype)
    assert fused_layers.obstacle(model.vision.layers) is None
    found, expected = run(model, pixels), run(model, pixels, monkeypatch)
    assert expected.std() > 0.1
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("act", ["gelu", "gelu_pytorch_tanh", "relu", "silu"])
def test_towers_with_other_activations_equal_the_modules_too(monkeypatch, act):
    model, pixels = tower("llava", "RTN", "bfloat16")
    model.vision.layers.mlp.hidden_act = act
    assert fused_layers.obstacle(model.vision.layers) is None
    np.testing.assert_array_equal(run(model, pixels), run(model, pixels, monkeypatch))


@pytest.mark.parametrize("family", ["llava", "qwen"])
@pytest.mark.parametrize(
    ("quantization", "words"),
    [
        (QuantizationConfig.none, "not packed"),
        (QuantizationConfig.parse("W8A8KV4"), "not packed"),
        (QuantizationConfig.parse("W4A4KV4", modules=("decoder",)), "not packed"),
        (QuantizationConfig.parse("W4A16KV4"), "activations are not quantized"),
        (QuantizationConfig.parse("W4A16KV4G16"), "activations are not quantized"),
    ],
)
def test_other_towers_run_module_by_module(family, quantization, words):
    config = tiny_config(family)
    specs = abstract_params(config, quantization, jnp.bfloat16)
    layers = build_model(config, quantization, specs).vision.layers
    assert words in (fused_layers.obstacle(layers) or "")


def test_a_simulated_tower_runs_module_by_module():
    """What calibration and training see: float weights beside a quantization."""
    config = tiny_config("llava")
    specs = abstract_params(config, None, jnp.bfloat16)
    layers = build_model(config, METHODS["RTN"], specs).vision.layers
    assert fused_layers.obstacle(layers) == "weights are not packed"


@pytest.mark.parametrize("family", ["llava", "qwen"])
def test_a_single_layer_shows_all_its_linears_to_an_observer(family):
    """Calibration runs a tower by ``layer``, which is never fused, not even where it could be."""
    model, pixels = tower(family, "RTN", "float32")
    vision, seen = model.vision, []
    with observed(lambda linear, rows: seen.append((id(linear), rows.shape[1]))):
        if family == "llava":
            vision.layer(vision.embed(pixels), jnp.int32(0))
        else:
            x = vision.embed(pixels.values)
            one = jnp.ones((*x.shape[:2], vision.config.head_dim // 2))
            vision.layer(x, jnp.int32(0), pixels, (one, 0 * one), full=True)
    layers = vision.layers
    linears = layers.attn.qkv, layers.attn.o, layers.mlp.expand, layers.mlp.down
    width, hidden = vision.config.hidden_size, vision.config.intermediate_size
    assert seen == list(zip(map(id, linears), (width, width, width, hidden), strict=True))


@newer_jax
@triton
@pytest.mark.parametrize("method", ["RTN", "FlatQuant"])
def test_the_kernel_in_the_interpreter_fits_into_the_tower(monkeypatch, method):
    """All but the matmuls. Features are as near as codes that fell on the other side of a boundary
    allow."""
    from pallas_kernels.transform_quantize import pallas_triton

    model, pixels = tower("llava", method, "float32")
    expected, used = run(model, pixels), []
    kernel = pallas_triton.transform_quantize_triton

    def interpreted(*arrays, **options):
        used.append((arrays[2].norm_bias is not None, options["activation"]))
        return kernel(*arrays, **options, interpret=True)

    monkeypatch.setattr(pallas_triton, "transform_quantize_triton", interpreted)
    monkeypatch.setattr(quantize_api, "find_gpu", lambda: HOPPER)
    monkeypatch.setattr(quantize_api, "on_platform", lambda platform, kernel, elsewhere: kernel)
    found = run(model, pixels)
    assert set(used) == {(True, None), (False, None), (False, "quick_gelu")}
    off = np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    print("relative distance", off.max())
    assert off.max() <= 0.1


@newer_jax
@pytest.mark.parametrize("method", ["RTN", "FlatQuant"])
@pytest.mark.parametrize("preset", ["llava_1_5_7b", "qwen2_5_vl_7b"])
def test_a_layer_of_a_7b_tower_lowers_to_eight_kernels_and_its_attention(
    monkeypatch, preset, method
):
    """Without the attention. Between the kernels no norm, activation, residual sum or rounding is
    left. Qwen's 3420 hidden features have become 3456, which the tensor-core kernel takes."""
    for api in (matmul_api, quantize_api):
        monkeypatch.setattr(api, "find_gpu", lambda: HOPPER)
    config = PRESETS[preset]
    specs = abstract_params(config, METHODS[method], jnp.bfloat16)
    layers = build_model(config, METHODS[method], specs).vision.layers
    states = jax.ShapeDtypeStruct((1, 584, config.vision.hidden_size), jnp.bfloat16)

    def one(layers, states, added, index):
        return fused_layer(layers, (states, added), index, lambda q, k, v: v)

    text = lower(one, layers, states, states, jax.ShapeDtypeStruct((), jnp.int32))
    triton, mosaic = (text.count(f"custom_call @{name}") for name in TARGETS)
    assert (triton, mosaic) == (4, 4)
    left = {"rsqrt", "logistic", "exponential", "divide"}
    left |= {"multiply", "reduce_precision", "dot_general", "reduce"}
    assert not {name for name in left if re.search(rf"stablehlo\.{name}\b", text)}
