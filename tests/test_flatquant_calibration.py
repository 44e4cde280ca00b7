"""Calibration with FlatQuant: outliers, losses, killed runs, files of samples, the command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quota_jax as qj
from converters import convert
from quota_jax.checkpoint import open_checkpoint
from quota_jax.cli import main
from quota_jax.errors import QuotaError
from quota_jax.models.params import flatten_params
from quota_jax.quant.blocks import Block, forward
from quota_jax.quant.calibrate import calibrate
from quota_jax.quant.calibrate_flatquant import FlatQuantOptions, masked_error
from quota_jax.quant.calibration_data import (
    Sample,
    digest,
    make_batches,
    read_samples,
)
from quota_jax.quant.smoothquant import SmoothQuantOptions
from quota_jax.quant.streaming import Stream
from quota_jax.quantization import QuantizationConfig
from quota_jax.testbed.outliers import plant_outliers
from quota_jax.testbed.samples import write_samples
from tests.tiny_checkpoints import tiny_checkpoint
from tests.tiny_models import draw_picture, write_tiny_llava

ROOT = Path(__file__).resolve().parent.parent
# A process that is killed adds nothing to the compilation cache: half an entry would stay.
ENVIRONMENT = {**os.environ, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1e9"}
TEXTS = ("is there a red circle ?", "what color is the square", "what is a car ?")


def samples_of(count: int, first: int = 0) -> list[Sample]:
    return [
        Sample(text=TEXTS[i % 3], image=draw_picture(i) if i % 4 < 3 else None)
        for i in range(first, first + count)
    ]


def smooth(label: str, **options) -> QuantizationConfig:
    return QuantizationConfig.parse(label, method="smoothquant", **options)


def parse(label: str, **options) -> QuantizationConfig:
    return QuantizationConfig.parse(label, method="flatquant", **options)


@pytest.fixture(scope="module", params=["llava", pytest.param("qwen", marks=pytest.mark.slow)])
def checkpoints(request, tmp_path_factory) -> tuple[Path, Path]:
    """A tiny checkpoint, and its twin with outliers."""
    root = tmp_path_factory.mktemp("calibration")
    path = tiny_checkpoint(root, request.param)
    return path, plant_outliers(path, root / "outliers")


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("plain")
    convert(write_tiny_llava(root / "hf", image_size=56), root / "ckpt")
    return root / "ckpt"


def logits(path: Path) -> jax.Array:
    """Of pictures that calibration has not seen."""
    vlm = qj.load(path, dtype="float32")
    data = make_batches(vlm.processor, samples_of(4, first=40), 4)
    return qj.prefill(vlm.model, data.batches[0])[0]


def distance(found: jax.Array, expected: jax.Array) -> float:
    return float(jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected))


def block_errors(source: Path, quantized: Path, samples: list[Sample]) -> dict[str, float]:
    """Mean squared error of each quantized block on full-precision inputs."""
    exact, found = open_checkpoint(source), open_checkpoint(quantized)
    processor = qj.load(source).processor
    data = make_batches(processor, samples, len(samples))
    stream, errors = Stream(exact.config, data.batches), {}
    for name in exact.block_names:
        block, params = Block.named(exact.config, name), exact.read_block(name)
        if block is None:
            stream.prepare(name, params)
        elif inputs := stream.pass_through(name, block, params):
            batch = data.batches[0]
            got = forward(
                found.read_block(name),
                inputs[0],
                batch,
                block=block,
                quantization=found.quantization,
            )
            mask = block.mask(batch, data.counts[0])
            errors[name] = float(masked_error(got, jnp.asarray(stream.inputs[0]), mask))
    return errors


@pytest.mark.slow
def test_outliers_break_rounding_but_not_flatquant(checkpoints, tmp_path):
    """Everything but LLaVA's vision tower, which the slow test has."""
    original, outliers = checkpoints
    llava = open_checkpoint(outliers).config.model_type == "llava"
    modules = ("decoder",) if llava else ("vision", "projector")
    exact = logits(original)
    assert distance(logits(outliers), exact) < 1e-5
    reports = []
    calibrate(
        outliers,
        tmp_path / "flat",
        parse("W8A8KV8", modules=modules),
        samples=samples_of(8),
        options=FlatQuantOptions(steps=60),
        report=reports.append,
    )
    calibrate(outliers, tmp_path / "rtn", QuantizationConfig.parse("W8A8KV8", modules=modules))
    rounded, learned = (distance(logits(tmp_path / name), exact) for name in ("rtn", "flat"))
    assert rounded > 0.1
    assert learned < rounded / 3
    assert all(report.last_loss < report.first_loss for report in reports)
    held_out = samples_of(4, first=40)
    before, after = (block_errors(outliers, tmp_path / name, held_out) for name in ("rtn", "flat"))
    for report in reports:
        assert after[report.name] < before[report.name] / 4, report.name
    print(f"logits: rounded {rounded:.3f}, learned {learned:.3f}; blocks: {before} -> {after}")


def test_smoothquant_moves_outliers_into_the_weights(checkpoints, tmp_path):
    original, outliers = checkpoints
    exact, options = logits(original), SmoothQuantOptions(alpha=0.6)
    calibrate(outliers, tmp_path / "s", smooth("W8A8"), samples=samples_of(8), options=options)
    calibrate(outliers, tmp_path / "r", QuantizationConfig.parse("W8A8"))
    smoothed, rounded = (distance(logits(tmp_path / name), exact) for name in "sr")
    assert smoothed < rounded / 3
    # The product of norm and column is what it was: only the split between them has moved.
    before, after = (
        open_checkpoint(path).read_block("decoder_layer_001") for path in (outliers, tmp_path / "s")
    )
    name = "decoder.layers.attn.qkv"
    weight = after[f"{name}.codes"] * after[f"{name}.scale"][:, None]
    product = weight * after["decoder.layers.norm1.scale"]
    expected = before[f"{name}.weight"] * before["decoder.layers.norm1.scale"]
    assert distance(jnp.asarray(product), jnp.asarray(expected)) < 0.02
    names = {key.rsplit(".", 1)[-1] for key in after}
    assert names <= {"codes", "scale", "bias"}
    with pytest.raises(QuotaError, match="takes SmoothQuantOptions, not FlatQuantOptions"):
        calibrate(
            original, "unused", smooth("W8A8"), samples=samples_of(1), options=FlatQuantOptions()
        )
    with pytest.raises(QuotaError, match=r"alpha must lie in \[0, 1\], got 2"):
        SmoothQuantOptions(alpha=2)


@pytest.mark.slow
def test_outliers_at_four_bits(checkpoints, tmp_path):
    original, outliers = checkpoints
    exact = logits(original)
    options, label = FlatQuantOptions(steps=80), "W4A4KV4"
    calibrate(outliers, tmp_path / "flat", parse(label), samples=samples_of(8), options=options)
    calibrate(outliers, tmp_path / "rtn", QuantizationConfig.parse(label))
    rounded, learned = (distance(logits(tmp_path / name), exact) for name in ("rtn", "flat"))
    print(f"{label}: rounded {rounded:.3f}, learned {learned:.3f}")
    # Four-bit weights alone cost some 0.5 here.
    assert rounded > 0.8
    assert learned < 0.65 * rounded


KILLED = """
import os, signal, sys
from pathlib import Path
from quota_jax.quant.calibrate import calibrate
from quota_jax.quant.calibrate_flatquant import FlatQuantOptions
from quota_jax.quant.calibration_data import Sample
from quota_jax.quantization import QuantizationConfig
from tests.test_flatquant_calibration import samples_of
source, out, limit = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
def progress(name, done, total):
    print(name, flush=True)
    if done == limit:
        os.kill(os.getpid(), signal.SIGKILL)
quantization = QuantizationConfig.parse("W4A4KV4", method="flatquant", modules=("decoder",))
options = FlatQuantOptions(steps=3)
calibrate(source, out, quantization, samples=samples_of(5), options=options, progress=progress)
"""


def run_killed(source: Path, out: Path, limit: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", KILLED, str(source), str(out), str(limit)],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=200,
    )


@pytest.mark.slow
def test_a_killed_run_goes_on_to_identical_arrays(plain, tmp_path):
    whole, quantization = tmp_path / "whole", parse("W4A4KV4", modules=("decoder",))
    options = FlatQuantOptions(steps=3)
    calibrate(plain, whole, quantization, samples=samples_of(5), options=options)
    names = open_checkpoint(whole).block_names
    middle = names.index("decoder_layer_000") + 1
    killed = run_killed(plain, tmp_path / "cut", middle)
    assert killed.returncode == -9, killed.stderr
    assert not (tmp_path / "cut").exists()
    assert killed.stdout.split() == list(names[:middle])
    done = []
    calibrate(
        plain,
        tmp_path / "cut",
        quantization,
        samples=samples_of(5),
        options=options,
        report=lambda found: done.append(found.name),
    )
    # Only what was missing has been trained again.
    assert done == ["decoder_layer_001"]
    for name in names:
        one, other = (open_checkpoint(path).read_block(name) for path in (whole, tmp_path / "cut"))
        assert set(one) == set(other)
        for key, value in one.items():
            np.testing.assert_array_equal(other[key], value, err_msg=key)


def test_a_checkpoint_loads_as_it_was_written(plain, tmp_path):
    calibrate(
        plain,
        tmp_path / "q",
        parse("W4A4KV4"),
        samples=samples_of(4),
        options=FlatQuantOptions(steps=2, seed=1, start="identity"),
    )
    checkpoint = open_checkpoint(tmp_path / "q")
    checkpoint.verify_checksums()
    assert checkpoint.quantization == parse("W4A4KV4")
    told = checkpoint.provenance["calibration"]
    assert (told["method"], told["samples"], told["options"]["start"]) == (
        "flatquant",
        4,
        "identity",
    )
    exact = flatten_params(checkpoint.load_model())
    small = flatten_params(checkpoint.load_model("bfloat16"))
    for name, value in small.items():
        kind = name.rsplit(".", 1)[-1]
        if kind in ("left", "right", "clip", "packed"):
            np.testing.assert_array_equal(value, exact[name])
            assert value.dtype == (jnp.uint8 if kind == "packed" else jnp.float32)
    layer = checkpoint.read_block("decoder_layer_001")
    for key, value in layer.items():
        np.testing.assert_array_equal(exact[key][1], value)
    # Nothing reads CLIP's last layer: it is rounded to nearest as it is.
    unused = checkpoint.read_block("vision_layer_002")
    np.testing.assert_array_equal(unused["vision.layers.attn.o.left"], np.eye(4))
    batch = make_batches(qj.load(plain).processor, samples_of(1), 1).batches[0]
    tokens = qj.generate(checkpoint.load_model("bfloat16"), batch, max_new_tokens=4).tokens
    assert tokens.shape == (1, 4)


def test_only_the_modules_asked_for_are_changed(plain, tmp_path):
    done = []
    calibrate(
        plain,
        tmp_path / "q",
        parse("W4A16", modules=("projector",)),
        samples=samples_of(3),
        options=FlatQuantOptions(steps=2),
        report=lambda found: done.append(found.name),
    )
    assert done == ["projector"]
    checkpoint, source = open_checkpoint(tmp_path / "q"), open_checkpoint(plain)
    for name in set(source.block_names) - {"projector"}:
        for key, value in source.read_block(name).items():
            np.testing.assert_array_equal(checkpoint.read_block(name)[key], value)
    assert not [key for key in checkpoint.read_block("projector") if key.endswith("clip")]


def test_samples_share_one_shape_and_padding_counts_for_nothing(plain):
    processor = qj.load(plain).processor
    long = Sample(text="USER: <image> <image>\n" + "car " * 40, image=None)
    data = make_batches(processor, samples_of(5), 2)
    assert data.counts == [2, 2, 1]
    shapes = [jax.tree.map(lambda a: a.shape, batch) for batch in data.batches]
    assert shapes[0] == shapes[1] == shapes[2]
    config = open_checkpoint(plain).config
    last = data.batches[2]
    decoder = Block(config=config, kind="decoder").mask(last, 1)
    np.testing.assert_array_equal(decoder.sum(1), [last.lengths[0], 0])
    vision = Block(config=config, kind="vision").mask(last, 1)
    assert vision.any(1).tolist() == [True, False]
    with pytest.raises(QuotaError, match="prompt 0 has 2 <image> placeholders but 0 images"):
        make_batches(processor, [long], 1)
    with pytest.raises(QuotaError, match="hold no picture, which vision needs"):
        calibrate(plain, "unused", parse("W4A4"), samples=[Sample(text="car")])
    with pytest.raises(QuotaError, match="needs calibration samples"):
        calibrate(plain, "unused", parse("W4A4"))


def test_a_drawn_list_reads_back(tmp_path):
    path = write_samples(tmp_path / "drawn.json", 3, seed=5)
    found = read_samples(path)
    assert len(found) == 3
    assert all(Path(sample.image).is_file() and len(sample.turns) == 8 for sample in found)
    again = read_samples(write_samples(tmp_path / "again.json", 3, seed=5))
    assert digest(found) == digest(again)
    assert digest(found[:2]) != digest(found)
    with pytest.raises(QuotaError, match="holds 3 samples, 4 were asked for"):
        read_samples(path, 4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "not valid JSON"),
        ("[]", "a JSON list of samples that is not empty"),
        ("{}", "a JSON list of samples that is not empty"),
        ("[3]", "sample 0: expected an object"),
        ('[{"text": "a"}, {"text": ""}]', "sample 1: 'text' must be a string"),
        ('[{"text": "a", "image": "no.png"}]', "sample 0: no picture"),
        ('[{"text": "a", "image": 3}]', "sample 0: 'image' must be a path"),
        ('[{"text": "a", "picture": "a.png"}]', "sample 0: unknown field 'picture'"),
        ('[{"text": "a", "image": "broken.png"}]', "broken.png"),
        ('[{"text": "car"}]', "no picture, which vision needs"),
    ],
)
def test_bad_lists_are_one_line(plain, tmp_path, capsys, content, message):
    (tmp_path / "calib.json").write_text(content)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    out = tmp_path / "out"
    arguments = ["calibrate", plain, "--method", "flatquant", "--out", out]
    status = main([str(a) for a in (*arguments, "--data", tmp_path / "calib.json")])
    _, err = capsys.readouterr()
    assert status == 2
    assert message in err
    assert err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.png", "calib.json"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--method flatquant", "needs --data"),
        ("--method flatquant --data nowhere.json", "nowhere.json: cannot be read"),
        ("--data calib.json", "no use to --method rtn"),
        ("--method flatquant --data nowhere.json --samples 0", "--samples must be at least 1"),
        ("--method flatquant --data nowhere.json --steps 0", "nowhere.json"),
        ("--method flatquant --bits W16A16KV4", "needs quantized weights"),
    ],
)
def test_bad_options_are_one_line(plain, tmp_path, capsys, options, message):
    status = main(["calibrate", str(plain), "--out", str(tmp_path / "out"), *options.split()])
    _, err = capsys.readouterr()
    assert status == 2
    assert message in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_command(plain, tmp_path, capsys):
    draw_picture(1).save(tmp_path / "a.png")
    entries = [
        {"image": "a.png", "text": "USER: <image>\nwhat color is the square ASSISTANT: red"},
        {"text": "USER: car ASSISTANT: car"},
    ]
    (tmp_path / "calib.json").write_text(json.dumps(entries))
    arguments = ["calibrate", plain, "--method", "flatquant", "--data", tmp_path / "calib.json"]
    arguments += ["--steps", 2, "--batch-size", 2, "--bits", "W4A8KV4", "--modules", "decoder"]
    arguments += ["--out", tmp_path / "q"]
    assert main([str(a) for a in arguments]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "decoder_layer_001" in out
    assert "wrote" in out
    assert main(["inspect", str(tmp_path / "q")]) == 0
    assert "W4A8KV4" in capsys.readouterr().out
    ask = [
        "generate",
        tmp_path / "q",
        "--image",
        tmp_path / "a.png",
        "--prompt",
        "what is the color",
    ]
    assert main([str(a) for a in (*ask, "--max-new", 3)]) == 0
