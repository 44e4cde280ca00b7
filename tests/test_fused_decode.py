"""The fused decode step: equal to the modules one by one, taken where it should be, and lowered for
a GPU that is not there."""

from __future__ import annotations

import dataclasses
import functools
import re
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels.attention_mass.api as mass_api
import pallas_kernels.int4_matmul.api as matmul_api
import pallas_kernels.kv4_append.api as append_api
import pallas_kernels.kv4_attention.api as attention_api
import pallas_kernels.kv4_encode.api as encode_api
import pallas_kernels.transform_quantize.api as quantize_api
import quota_jax as qj
import quota_jax.models.decoder as decoder
from converters import convert
from quota_jax.bench import example_batch
from quota_jax.config import PRESETS
from quota_jax.kv_cache import CacheGroup
from quota_jax.models import fused_layers
from quota_jax.models.fused_decode import obstacle
from quota_jax.models.fused_prefill import run_layers
from quota_jax.models.params import abstract_params, build_model
from quota_jax.quant.calibrate import calibrate
from quota_jax.quantization import QuantizationConfig
from quota_jax.recipe import Recipe
from tests.decode_samples import METHODS, random_groups, random_model, steps, tiny_config
from tests.test_transform_quantize import HOPPER, lower, newer_jax
from tests.tiny_models import draw_picture, write_tiny_llava
from tests.tiny_qwen import write_tiny_qwen

LENGTHS = [[20, 7, 33], [11, 64, 5], [4, 2, 63]]
"""Three groups, three samples; one that is full before and one that fills up in between."""


@pytest.mark.parametrize(
    ("method", "dtype"),
    [
        ("RTN", "float32"),
        pytest.param("RTN, 8-bit activations", "bfloat16", marks=pytest.mark.slow),
        ("FlatQuant", "bfloat16"),
        pytest.param("FlatQuant of heads, keys and cache", "float32", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("family", [pytest.param("llava", marks=pytest.mark.slow), "qwen"])
def test_the_fused_step_equals_the_modules_bit_for_bit(monkeypatch, family, method, dtype):
    """Logits and caches of three steps, on a CPU."""
    config = tiny_config(family)
    model = random_model(config, METHODS[method], jnp.dtype(dtype))
    assert obstacle(model.decoder.layers) is None
    groups = random_groups(config, LENGTHS, [1, 2, 1])
    found, cache = steps(model, groups, 3, monkeypatch, fused=True)
    expected, expected_cache = steps(model, groups, 3, monkeypatch, fused=False)
    assert np.abs(np.diff(expected, axis=0)).max() > 0.1
    np.testing.assert_array_equal(found, expected)
    for one, other in zip(jax.tree.leaves(cache), jax.tree.leaves(expected_cache), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("method", "dtype"),
    [
        ("RTN", "bfloat16"),
        ("FlatQuant of heads, keys and cache", "float32"),
        pytest.param("FlatQuant", "bfloat16", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("family", ["llava", pytest.param("qwen", marks=pytest.mark.slow)])
def test_the_fused_prefill_equals_the_modules_bit_for_bit(monkeypatch, family, method, dtype):
    """States, kept tokens and caches of a pruned prefill of two prompts, on a CPU."""
    config = tiny_config(family)
    model = random_model(config, METHODS[method], jnp.dtype(dtype))
    assert fused_layers.obstacle(model.decoder.layers) is None
    batch = example_batch(config, 2, 16)
    recipe = Recipe.uniform(num_layers=4, layers=[1], keep=0.5)
    runs = []
    for fused in (True, False):
        if not fused:
            monkeypatch.setattr(fused_layers, "obstacle", lambda layers: "a test wants the modules")
        jax.clear_caches()
        runs.append(qj.prefill(model, batch, recipe=recipe))
    jax.clear_caches()
    (found, cache), (expected, expected_cache) = runs
    assert np.ptp(np.asarray(expected)) > 0.1
    np.testing.assert_array_equal(found, expected)
    for one, other in zip(jax.tree.leaves(cache), jax.tree.leaves(expected_cache), strict=True):
        np.testing.assert_array_equal(one, other)


def test_biases_of_every_linear_are_added(monkeypatch):
    config = tiny_config("llava", attention_bias=True, mlp_bias=True)
    model = random_model(config, METHODS["RTN"], jnp.bfloat16)
    assert "bias" in model.decoder.layers.mlp.down.names
    groups = random_groups(config, LENGTHS, [1, 2, 1])
    found, _ = steps(model, groups, 2, monkeypatch, fused=True)
    expected, _ = steps(model, groups, 2, monkeypatch, fused=False)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llava", pytest.param("qwen", marks=pytest.mark.slow)])
def test_pruned_prompts_generate_the_same_tokens(tmp_path, monkeypatch, family):
    """The whole way from pictures, in batches of unequal prompts, over several cache groups."""
    if family == "llava":
        folder = write_tiny_llava(tmp_path / "hf", num_layers=4, num_kv_heads=2, image_size=56)
        image = "<image>"
    else:
        folder = write_tiny_qwen(tmp_path / "hf", num_layers=4, num_kv_heads=2)
        image = "<|vision_start|><|image_pad|><|vision_end|>"
    convert(folder, tmp_path / "full")
    calibrate(tmp_path / "full", tmp_path / "q", QuantizationConfig.parse("W4A4KV4"))
    vlm = qj.load(tmp_path / "q")
    batch = vlm.processor(
        images=[[draw_picture(0)], [draw_picture(1), draw_picture(2)], []],
        prompts=[f"{image} is there a red circle", f"{image} car {image}", "what is the color"],
    )
    recipe = Recipe.uniform(num_layers=4, layers=[1, 2], keep=0.3)
    _, cache = qj.prefill(vlm.model, batch, recipe=recipe)
    assert len(cache.groups) == 3
    found = qj.generate(vlm.model, batch, recipe=recipe, max_new_tokens=12).tokens
    jax.clear_caches()
    monkeypatch.setattr(decoder, "obstacle", lambda layers: "a test wants the modules")
    expected = qj.generate(vlm.model, batch, recipe=recipe, max_new_tokens=12).tokens
    jax.clear_caches()
    np.testing.assert_array_equal(found, expected)


@newer_jax
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
@pytest.mark.parametrize(
    ("method", "bound"), [("FlatQuant", 0.1), ("FlatQuant of heads, keys and cache", 0.02)]
)
def test_kernels_in_the_interpreter_fit_into_the_step(monkeypatch, method, bound):
    """All but matmul and attention, which have no interpreter or tests of their own. Caches of the
    first group are equal; logits are as near as codes that fell on the other side of a boundary
    allow (at most 0.05 and 0.004 were seen)."""
    from pallas_kernels.kv4_append import pallas_triton as append
    from pallas_kernels.transform_quantize import pallas_triton as quantize

    config = tiny_config("qwen")
    model = random_model(config, METHODS[method], jnp.float32)
    groups = random_groups(config, LENGTHS, [1, 2, 1])
    expected, expected_cache = steps(model, groups, 1, monkeypatch, fused=True)
    used = []

    def interpreted(kernel):
        def run(*arrays, **options):
            used.append(kernel.__name__)
            return kernel(*arrays, **options, interpret=True)

        return run

    for module, name in (
        (quantize, "transform_quantize_triton"),
        (append, "kv4_append_triton"),
    ):
        monkeypatch.setattr(module, name, interpreted(getattr(module, name)))
    for api in (append_api, quantize_api):
        monkeypatch.setattr(api, "find_gpu", lambda: HOPPER)
        monkeypatch.setattr(api, "on_platform", lambda platform, kernel, elsewhere: kernel)
    found, cache = steps(model, groups, 1, monkeypatch, fused=True)
    assert set(used) == {"transform_quantize_triton", "kv4_append_triton"}
    off = np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert off.max() <= bound
    for one, other in zip(
        cache[0].key + cache[0].value, expected_cache[0].key + expected_cache[0].value, strict=True
    ):
        np.testing.assert_array_equal(one, other)


def abstract_model(config, quantization) -> Any:
    return build_model(config, quantization, abstract_params(config, quantization, jnp.bfloat16))


@pytest.mark.parametrize(
    ("quantization", "words"),
    [
        (QuantizationConfig.none, "cache has 16 bits"),
        (QuantizationConfig.parse("W4A4KV8"), "cache has 8 bits"),
        (QuantizationConfig.parse("W8A8KV4"), "not packed"),
        (QuantizationConfig.parse("W4A4KV4", modules=("vision",)), "not packed"),
        (QuantizationConfig.parse("W4A16KV4"), "activations are not quantized"),
        (QuantizationConfig.parse("W4A16KV4G16"), "activations are not quantized"),
        (
            dataclasses.replace(METHODS["RTN"], key_quantization="channel"),
            "keys are stored by channel",
        ),
    ],
)
def test_other_models_run_module_by_module(quantization, words):
    layers = abstract_model(tiny_config("llava"), quantization).decoder.layers
    assert words in (obstacle(layers) or "")


def test_what_no_quantization_says_is_seen_too():
    """Simulated weights, other gates, scaled inputs."""
    config = tiny_config("llava")
    simulated = build_model(config, METHODS["RTN"], abstract_params(config, None, jnp.bfloat16))
    assert obstacle(simulated.decoder.layers) == "weights are not packed"
    layers = abstract_model(config, METHODS["RTN"]).decoder.layers
    assert obstacle(layers) is None
    layers.mlp.down.names += ("input_scale",)
    assert "scale of each channel" in (obstacle(layers) or "")
    layers.mlp.hidden_act = "gelu"
    assert "not gated by SiLU" in (obstacle(layers) or "")


TARGETS = ("__gpu$xla.gpu.triton", "mosaic_gpu")


@newer_jax
@pytest.mark.parametrize(
    ("method", "batch"),
    [("RTN", 1), ("FlatQuant", 8), ("FlatQuant of heads, keys and cache", 1)],
)
@pytest.mark.parametrize("preset", ["llava_1_5_7b", "qwen2_5_vl_7b"])
def test_a_layer_of_a_7b_model_lowers_to_few_kernels(monkeypatch, preset, method, batch):
    """Four times quantization and matmul, the append, and two launches of attention; of the longest
    rows several programs make the transform, and one launch more their codes."""
    for api in (matmul_api, append_api, attention_api, quantize_api):
        monkeypatch.setattr(api, "find_gpu", lambda: HOPPER)
    config = PRESETS[preset]
    model = abstract_model(config, METHODS[method])
    spec: Any = jax.ShapeDtypeStruct
    shape = (config.text.num_layers, batch, config.text.num_kv_heads, 384)
    stored = (
        spec((*shape, config.text.head_dim // 2), jnp.uint8),
        spec(shape, jnp.bfloat16),
        spec(shape, jnp.uint8),
    )
    rows = spec((batch,), jnp.int32)
    group = CacheGroup(key=stored, value=stored, lengths=rows, shift=rows, bits=4)

    def step(model, tokens, group, active):
        return model.decoder.step(tokens, tokens, (group,), active)

    text = lower(step, model, rows, group, spec((batch,), jnp.bool_))
    # The kernels take the loop's own counter: a scan's would be sliced out of an array each time.
    assert not re.search(r"dynamic_slice.*xi32>", text)
    # The body of the loop over layers stands there once.
    triton, mosaic = (text.count(f"custom_call @{name}") for name in TARGETS)
    assert mosaic == (0 if batch == 1 else 4)
    assert triton + mosaic == (11 if method == "RTN" else 12)


@newer_jax
@pytest.mark.parametrize("method", ["RTN", "FlatQuant"])
def test_a_prefill_at_7b_lowers_to_one_launch_between_matmuls(monkeypatch, method):
    """Tower, projector and decoder, as "auto" chooses on a Hopper GPU; attention is cuDNN's, which
    is not there to be lowered."""
    for api in (matmul_api, quantize_api, encode_api):
        monkeypatch.setattr(api, "find_gpu", lambda: HOPPER)
    monkeypatch.setenv("QUOTA_JAX_XLA", "sequence_attention")
    config = PRESETS["llava_1_5_7b"]
    model = abstract_model(config, METHODS[method])
    batch = jax.eval_shape(lambda: example_batch(config, 1, 64))
    text = lower(functools.partial(qj.prefill, recipe=None), model, batch)
    triton, mosaic = (text.count(f"custom_call @{name}") for name in TARGETS)
    # Each loop over layers stands there once; FlatQuant's projector and tower are as the decoder.
    assert (triton, mosaic) == (11, 10)
    # Norms that no quantization follows: before the tower, and before the head.
    assert text.count("stablehlo.rsqrt") == 2
    # Codes are written in place: nothing copies a layer's into the stack.
    updates = [line for line in text.splitlines() if "dynamic_update_slice" in line]
    assert not any("ui8" in line for line in updates)


@newer_jax
@pytest.mark.parametrize("batch", [1, 2, 8])
def test_tokens_that_are_no_whole_groups_are_not_padded_before_each_matmul(monkeypatch, batch):
    for api in (matmul_api, quantize_api, encode_api):
        monkeypatch.setattr(api, "find_gpu", lambda: HOPPER)
    monkeypatch.setenv("QUOTA_JAX_XLA", "sequence_attention")
    config = PRESETS["llava_1_5_7b"]
    layers = abstract_model(config, METHODS["RTN"]).decoder.layers
    spec: Any = jax.ShapeDtypeStruct
    states = spec((batch, 237, 4096), jnp.bfloat16)
    angle = spec((batch, 237, 64), jnp.float32)
    lengths = spec((batch,), jnp.int32)

    def run(layers, x, cos, sin, lengths):
        sequence: Any = SimpleNamespace(lengths=lengths)
        return run_layers(layers, x, sequence, (cos, sin), 6, 26, sm_scale=0.1)

    text = lower(run, layers, states, angle, angle, lengths)
    assert text.count("custom_call @mosaic_gpu_v2") == 4
    # From the codes of tokens to those with more: none; the pads that are left change nothing.
    codes = re.findall(r"stablehlo\.pad .*\(tensor<(\w+)xi8>.* -> tensor<(\w+)xi8>", text)
    assert codes
    assert all(given == made for given, made in codes)
    (out, _), stored = jax.eval_shape(run, layers, states, angle, angle, lengths)
    assert out.shape == states.shape
    assert stored[0][0].shape == (26, batch, 237, 32, 64)


@newer_jax
def test_a_stage_of_a_16_bit_prefill_is_scored_by_the_kernel(monkeypatch):
    """Keys that were read of a 4-bit cache are float32, which the kernel refuses: it must get them
    as attention reads them."""
    for api in (mass_api, quantize_api):
        monkeypatch.setattr(api, "find_gpu", lambda: HOPPER)
    monkeypatch.setenv("QUOTA_JAX_XLA", "sequence_attention")  # cuDNN is not there to be lowered
    config = tiny_config("llava")
    model = random_model(config, METHODS["RTN"], jnp.bfloat16)
    batch = example_batch(config, 1, 9)
    recipe = Recipe.uniform(num_layers=4, layers=[1, 2], keep=0.5)
    counts = []
    for dtype in (jnp.float32, jnp.bfloat16):
        monkeypatch.setattr(decoder, "operand_dtype", lambda *_, dtype=dtype: dtype)
        jax.clear_caches()  # the trace depends on what is patched
        text = lower(functools.partial(qj.prefill, recipe=recipe), model, batch)
        counts.append(text.count(f"custom_call @{TARGETS[0]}"))
    assert counts[1] - counts[0] == 2 * len(recipe.stages)  # two passes each
