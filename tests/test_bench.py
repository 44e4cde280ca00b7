"""Speed measurements run on tiny shapes of both families and count what they say they count."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import TinyLlava, hf_config
from tiny_qwen import TinyQwen
from tiny_qwen import hf_config as qwen_config

import quota_jax.config as configs
from quota_jax.bench import example_batch, filled_state, measure, measure_decoding, random_model
from quota_jax.cli import main
from quota_jax.config import ModelConfig, QwenVlConfig, config_from_hf
from quota_jax.generation import forward
from quota_jax.quantization import QuantizationConfig
from quota_jax.recipe import Recipe


def tiny(family: str) -> ModelConfig:
    if family == "llava":
        return config_from_hf(hf_config(TinyLlava(num_layers=4, image_size=56)))
    config = config_from_hf(qwen_config(TinyQwen(num_layers=4)))
    assert isinstance(config, QwenVlConfig)
    # A token of 252 x 252 pixels: the picture of 1008 x 1008 then has 16 of them.
    vision = dataclasses.replace(config.vision, patch_size=126, window_size=504)
    return dataclasses.replace(config, vision=vision)


@pytest.mark.parametrize(
    ("family", "label"),
    [
        ("llava", "W4A4KV4"),
        pytest.param("llava", "W16A16KV16", marks=pytest.mark.slow),
        pytest.param("qwen", "W4A4KV4", marks=pytest.mark.slow),
    ],
)
def test_a_measurement_counts_tokens_and_bytes(family: str, label: str):
    config = tiny(family)
    quantization = QuantizationConfig.parse(label)
    model = random_model(config, quantization, jnp.bfloat16)
    batch = example_batch(config, 2, 9)
    assert np.asarray(batch.is_visual).sum(1).tolist() == [16, 16]
    assert np.asarray(batch.lengths).tolist() == [25, 25]
    assert np.isfinite(np.asarray(forward(model, batch))).all()
    recipe = Recipe.uniform(num_layers=4, layers=[1], keep=0.5)
    result = measure(model, recipe, batch_size=2, text_tokens=9, new_tokens=2, repeats=1)
    assert (result.visual_tokens, result.text_tokens, result.keep) == (16, 9, 0.5)
    assert result.label == ("bf16" if label.startswith("W16") else label)
    assert min(result.first_token, result.decode_step, result.compile) > 0
    assert result.tokens_per_second == 2 / result.decode_step
    assert result.weight_bytes > result.cache_bytes > 0


@pytest.mark.slow
def test_decoding_alone_has_the_caches_of_a_prefill():
    config = tiny("llava")
    quantization = QuantizationConfig.parse("W4A4KV4", method="flatquant")
    model = random_model(config, quantization, jnp.bfloat16)
    recipe = Recipe.uniform(num_layers=4, layers=[1], keep=0.5)
    shape = {"batch_size": 2, "text_tokens": 9, "new_tokens": 2}
    result = measure(model, recipe, repeats=1, **shape)
    state = filled_state(model, recipe, **shape)
    assert sum(group.nbytes for group in state.groups) == result.cache_bytes
    for group in state.groups:
        assert np.asarray(group.lengths).tolist() == [group.capacity - 128] * 2
    assert measure_decoding(model, recipe, **shape) > 0


@pytest.mark.slow
def test_the_command_prints_a_table_and_writes_numbers(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setitem(configs.PRESETS, "llava_1_5_7b", tiny("llava"))
    command = [
        "bench",
        "--bits",
        "W4A8KV4",
        "--method",
        "flatquant",
        "--keep",
        "0.3",
        "1",
        "--text",
        "8",
        "--new",
        "2",
    ]
    assert main([*command, "--json", str(tmp_path / "out.json")]) == 0
    out, err = capsys.readouterr()
    assert out.count("W4A8KV4") == 2
    assert err.count("done:") == 2
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["method"] == "flatquant"
    assert [row["keep"] for row in content["results"]] == [0.3, 1.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--preset", "gpt"], "no preset 'gpt'"),
        (["--text", "3"], "--text must be at least 5"),
        (["--bits", "W5A5"], "got 5"),
        (["--batch", "0"], "at least 1"),
        (["--keep", "1.5"], "got 1.5"),
    ],
)
def test_bad_options_are_one_line(capsys, options: list[str], message: str):
    assert main(["bench", *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert message in err
