"""Speed measurements run on tiny shapes of both families and count what they say they count."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_checkpoints import tiny_checkpoint
from tiny_models import TinyLlava, hf_config
from tiny_qwen import TinyQwen
from tiny_qwen import hf_config as qwen_config

import quota_jax.bench.measurement as measuring
import quota_jax.config as configs
from quota_jax.bench import (
    example_batch,
    filled_state,
    find_preset,
    measure,
    measure_decoding,
    peer,
    random_model,
)
from quota_jax.bench.measurement import Decoding
from quota_jax.bench.peer import measure_peer
from quota_jax.bench.programs import compile_programs, host_copy
from quota_jax.cli import main
from quota_jax.config import ModelConfig, QwenVlConfig, config_from_hf
from quota_jax.errors import QuotaError
from quota_jax.generation import forward, generate
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
    assert min(result.first_token, result.decode_step, result.lowering, result.compile) > 0
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


def test_power_is_of_decoding_alone(monkeypatch: pytest.MonkeyPatch):
    class Meter:
        """A device that draws 300 W; every reading takes two seconds."""

        has_power, watts, seconds = True, 300.0, 2.0

        def __init__(self, devices):
            assert len(devices) == 1

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

    monkeypatch.setattr(measuring, "DeviceMeter", Meter)
    monkeypatch.setattr(measuring, "POWER_SECONDS", 1e-9)  # one run
    model = random_model(tiny("llava"), QuantizationConfig.none, jnp.bfloat16)
    recipe = Recipe.none(4)
    result = measure(model, recipe, batch_size=2, text_tokens=9, new_tokens=3, repeats=1)
    # 600 J for three steps of two samples.
    assert (result.watts, result.joules_per_token) == (300, 100)


def test_decoding_again_gives_the_same_tokens():
    model = random_model(tiny("llava"), QuantizationConfig.none, jnp.bfloat16)
    batch = host_copy(example_batch(model.config, 2, 9))
    programs = compile_programs(model, batch, Recipe.none(4), new_tokens=3)
    decoding = Decoding(model, programs, programs.first(model, batch), 3)
    runs = []
    for _ in range(3):
        decoding.run()
        runs.append(np.asarray(decoding.state.tokens)[:, :4].tolist())
    generated = generate(model, batch, max_new_tokens=4)
    assert runs == [generated.tokens.tolist()] * 3


def test_presets_have_the_names_of_released_models():
    for name in ("llava_1_5_7b", "llava-1.5-7b", "LLaVA-1.5-7B"):
        assert find_preset(name) == ("llava_1_5_7b", configs.PRESETS["llava_1_5_7b"])
    assert find_preset("qwen2.5-vl-3b")[0] == "qwen2_5_vl_3b"
    with pytest.raises(QuotaError, match=r"no preset 'llava-1\.5'; known: llava_1_5_13b"):
        find_preset("llava-1.5")


COMMAND = ["bench", "--bits", "W4A8KV4", "--method", "flatquant", "--text", "8", "--new", "2"]
PEAKS = ["--bandwidth", "0.02", "--peak", "0.1", "0.2"]


@pytest.mark.slow
def test_the_command_prints_tables_and_writes_numbers(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setitem(configs.PRESETS, "llava_1_5_7b", tiny("llava"))
    files = ["--json", str(tmp_path / "out.json"), "--plot", str(tmp_path / "roof.png")]
    options = ["--preset", "llava-1.5-7b", "--keep", "0.3", "1", "--first-answer"]
    assert main([*COMMAND, *options, *PEAKS, *files]) == 0
    out, err = capsys.readouterr()
    # Two rows of speed and two of floors; one first answer, cold and warm.
    assert out.count("\nW4A8KV4") == 6
    assert "J/token" not in out
    assert err.count("done:") == 3
    content = json.loads((tmp_path / "out.json").read_text())
    assert (content["preset"], content["method"]) == ("llava_1_5_7b", "flatquant")
    assert [row["keep"] for row in content["results"]] == [0.3, 1.0]
    for row in content["results"]:
        assert row["watts"] is row["joules_per_token"] is None
        assert min(row["load"], row["first_token_floor"], row["decode_step_floor"]) > 0
        for program in ("prefill_compilation", "decode_compilation"):
            assert min(row[program]["lowering"], row[program]["compiling"]) > 0
    (answer,) = content["first_answers"]
    assert (answer["label"], answer["keep"], answer["checkpoint"]) == ("W4A8KV4", 0.3, None)
    assert (answer["cold"]["cached"], answer["warm"]["cached"]) == (False, True)
    assert answer["warm"]["compiling"] < answer["cold"]["compiling"]
    for each in (answer["cold"], answer["warm"]):
        parts = sum(each[name] for name in ("start_up", "load", "lowering", "compiling", "run"))
        assert 0 < parts <= each["total"]
    assert (tmp_path / "roof.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_checkpoint_brings_weights_precision_and_recipe(tmp_path: Path, capsys):
    folder = tiny_checkpoint(tmp_path, "llava", num_layers=4)
    recipe = ["--keep", "0.5", "--layers", "1", "--write"]
    assert main(["recipe", str(folder), *recipe]) == 0
    capsys.readouterr()
    options = ["--text", "8", "--new", "2", "--json", str(tmp_path / "out.json")]
    assert main(["bench", "--checkpoint", str(folder), "--first-answer", *options]) == 0
    out, _ = capsys.readouterr()
    assert "stored weights" in out
    assert "no roofline: cpu is not known" in out
    content = json.loads((tmp_path / "out.json").read_text())
    assert (content["preset"], content["checkpoint"], content["peaks"]) == (None, "ckpt", None)
    (row,), (answer,) = content["results"], content["first_answers"]
    assert (row["label"], row["keep"]) == (answer["label"], answer["keep"]) == ("float32", 0.5)
    assert answer["checkpoint"] == str(folder)


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.parametrize("family", ["llava", "qwen"])
def test_the_peer_does_the_same_work(family: str):
    config = tiny(family)
    rows = measure_peer(
        config, platform="cpu", dtype="float32", batch_sizes=(1, 2), text_tokens=9, new_tokens=3
    )
    assert [row.batch_size for row in rows] == [1, 2]
    model = random_model(config, QuantizationConfig.none, jnp.float32)
    weights = sum(array.nbytes for array in jax.tree.leaves(model))
    text = config.text
    for row in rows:
        assert (row.label, row.device) == ("transformers float32", "cpu")
        assert (row.visual_tokens, row.text_tokens, row.new_tokens) == (16, 9, 3)
        assert min(row.first_token, row.decode_step, row.load) > 0
        assert row.weight_bytes == weights
        # Keys and values of 16 + 9 + 3 tokens in float32.
        token = 2 * text.num_layers * text.num_kv_heads * text.head_dim * 4
        assert row.cache_bytes == row.batch_size * 28 * token
        assert row.peak_bytes is row.watts is row.joules_per_token is None


@pytest.mark.slow
@pytest.mark.torch
def test_the_command_runs_the_peer_beside_its_own(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setitem(configs.PRESETS, "llava_1_5_7b", tiny("llava"))
    options = ["--keep", "1", "--peer", "transformers", "--json", str(tmp_path / "out.json")]
    assert main([*COMMAND, *options]) == 0
    out, _ = capsys.readouterr()
    assert "\ntransformers bf16 " in out
    assert "eager, random weights, all tokens" in out
    (row,) = json.loads((tmp_path / "out.json").read_text())["peer"]
    assert (row["batch_size"], row["text_tokens"], row["new_tokens"]) == (1, 8, 2)


def test_a_peer_that_cannot_run_is_one_line(tmp_path: Path, monkeypatch, capsys):
    def refused(message: str) -> None:
        assert main(["bench", "--peer", "transformers"]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert message in err

    monkeypatch.setattr(peer, "SCRIPT", tmp_path / "bench_peer.py")
    refused("needs the source checkout: the installed package has no bench_peer.py")
    (tmp_path / "bench_peer.py").write_text("import sys\nsys.exit('no such device')\n")
    with monkeypatch.context() as hidden:
        hidden.setattr(peer.importlib.util, "find_spec", lambda name: None)
        refused("--peer needs torch")
    monkeypatch.setattr(peer.importlib.util, "find_spec", lambda name: name)
    refused("the peer's process failed: no such device")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--preset", "gpt"], "no preset 'gpt'"),
        (["--text", "3"], "--text must be at least 5"),
        (["--bits", "W5A5"], "got 5"),
        (["--batch", "0"], "at least 1"),
        (["--keep", "1.5"], "got 1.5"),
        (["--keep"], "--keep needs at least one value"),
        (["--layers", "0"], "--layers must be at least 1"),
        (["--new", "9000"], "9001 exceeds 8192"),
        (["--checkpoint", "a", "--bits", "W4A4"], "--checkpoint and --bits exclude each other"),
        (["--checkpoint", "nowhere"], "nowhere"),
        (["--json", "nowhere/a.json"], "nowhere: no such folder"),
        (["--json", "/"], "/: is a folder"),
        (["--plot", "nowhere/a.png"], "nowhere: no such folder"),
        (["--plot", "a.gif"], "figures are written as .png"),
        (["--plot", "a.png"], "cpu is not known; give --bandwidth and --peak"),
        (["--bandwidth", "0"], "--bandwidth must be positive, got 0"),
        (["--peak", "1", "-2"], "--peak must be positive, got -2"),
        (["--peer", "vllm"], "invalid choice"),
    ],
)
def test_bad_options_are_one_line(capsys, options: list[str], message: str):
    assert main(["bench", *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert message in err
