"""FlatQuant's options: quantized inputs, weights of the two modalities, transforms of values."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quota_jax.checkpoint import CheckpointWriter, open_checkpoint
from quota_jax.cli import main
from quota_jax.errors import QuotaError
from quota_jax.processing import Processor
from quota_jax.quant import calibrate as calibration
from quota_jax.quant.blocks import Block, forward
from quota_jax.quant.calibrate import FlatQuantGptqOptions, calibrate
from quota_jax.quant.calibrate_flatquant import FlatQuantOptions, Task, masked_error
from quota_jax.quant.calibration_data import Sample, make_batches
from quota_jax.quant.flatquant import factor
from quota_jax.quant.folding import find_sites, fold_exactly, start
from quota_jax.quant.streaming import write_blocks
from quota_jax.quantization import QuantizationConfig
from tests.tiny_checkpoints import tiny_checkpoint
from tests.tiny_models import draw_picture

ROUNDED = QuantizationConfig.parse("W4A4KV4")
W4A4 = QuantizationConfig.parse("W4A4KV4", method="flatquant")


@pytest.fixture(scope="module", params=["llava", "qwen"])
def source(request, tmp_path_factory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp(request.param), request.param)


def samples() -> list[Sample]:
    return [Sample(text="what is a car ?", image=draw_picture(i)) for i in range(2)]


class Stopped(Exception):
    pass


def write(source: Path, out: Path, feed: str, stop_after: str = "") -> dict[str, Any]:
    """Rounds all blocks to nearest; returns what each was given."""
    checkpoint = open_checkpoint(source)
    processor = Processor.from_folder(checkpoint.assets_dir, checkpoint.config)
    batches = make_batches(processor, samples(), 2).batches
    seen: dict[str, Any] = {}

    def note(name, block, stored, inputs, outputs):
        seen[name] = [np.array(x) for x in inputs], [np.array(x) for x in outputs]
        return stored

    def stop(name, done, total):
        if name == stop_after:
            raise Stopped

    with (
        CheckpointWriter(
            out,
            config=checkpoint.config,
            quantization=ROUNDED,
            provenance={},
            assets={path.name: path.read_bytes() for path in checkpoint.assets_dir.iterdir()},
            fingerprint=feed,
        ) as writer,
        contextlib.suppress(Stopped),
    ):
        write_blocks(checkpoint, writer, batches, ROUNDED, note, stop, feed)
        writer.finish()
    return seen


@pytest.mark.slow
def test_blocks_read_what_the_quantized_model_gives(source, tmp_path):
    """Inputs of decoder layers are the states that the finished checkpoint computes before them;
    a run that stops and goes on sees and writes the same."""
    fed, full = (write(source, tmp_path / feed, feed) for feed in ("quantized", "full"))
    checkpoint = open_checkpoint(tmp_path / "quantized")
    model = checkpoint.load_model("float32")
    processor = Processor.from_folder(checkpoint.assets_dir, checkpoint.config)
    batch = make_batches(processor, samples(), 2).batches[0]
    entering = jax.jit(lambda model, batch: model.embed(batch, model.visual_features(batch.pixels)))
    expected = np.asarray(entering(model, batch))
    found = fed["decoder_layer_000"][0][0]
    real = np.asarray(batch.is_real)
    np.testing.assert_allclose(found[real], expected[real], rtol=1e-4, atol=1e-4)
    assert np.abs(full["decoder_layer_000"][0][0] - expected)[real].max() > 1e-2
    after = forward(
        checkpoint.read_block("decoder_layer_000"),
        found,
        batch,
        block=Block.named(checkpoint.config, "decoder_layer_000"),
        quantization=ROUNDED,
    )
    np.testing.assert_array_equal(fed["decoder_layer_001"][0][0], after)
    # What is learned is the full-precision output either way.
    assert set(fed) == set(full)
    for name, (_, outputs) in full.items():
        np.testing.assert_array_equal(fed[name][1], outputs, err_msg=name)
    for name, same in (("vision_layer_000", True), ("vision_layer_001", False)):
        assert np.array_equal(fed[name][0], full[name][0]) == same

    cut = tmp_path / "cut"
    before = write(source, cut, "quantized", stop_after="decoder_layer_000")
    rest = write(source, cut, "quantized")
    assert [*before, *rest] == list(fed)
    assert list(rest) == ["decoder_layer_001"]
    np.testing.assert_array_equal(rest["decoder_layer_001"][0], fed["decoder_layer_001"][0])
    for name in checkpoint.block_names:
        resumed = open_checkpoint(cut).read_block(name)
        for key, value in checkpoint.read_block(name).items():
            np.testing.assert_array_equal(resumed[key], value, err_msg=key)


@pytest.mark.parametrize("source", ["llava"], indirect=True)
def test_weights_of_visual_and_text_errors(source):
    """Against numpy; equal weights of 1 are the plain loss bit for bit."""
    checkpoint = open_checkpoint(source)
    processor = Processor.from_folder(checkpoint.assets_dir, checkpoint.config)
    batch = make_batches(processor, [*samples(), Sample(text="car")], 3).batches[0]
    draw = np.random.default_rng(0)
    shape = (*batch.tokens.shape, checkpoint.config.text.hidden_size)
    found, target = draw.standard_normal((2, *shape)).astype(np.float32)
    mask, visual = np.asarray(batch.is_real), np.asarray(batch.is_visual)
    real = batch.is_real

    def loss(weights, kind="decoder", found=found):
        block = Block(config=checkpoint.config, kind=kind)
        options = FlatQuantOptions(modality_weights=weights)
        task = Task(block=block, quantization=W4A4, sites=(), options=options)
        return masked_error(jnp.asarray(found), jnp.asarray(target), real, task.row_weights(batch))

    plain = masked_error(jnp.asarray(found), jnp.asarray(target), real)
    assert loss((1.0, 1.0)) == plain
    ones = jnp.ones(mask.shape, jnp.float32)
    assert masked_error(jnp.asarray(found), jnp.asarray(target), real, ones) == plain
    assert loss((0.2, 3.0), "projector") == plain
    error = np.square(found.astype(np.float64) - target).mean(-1)
    expected = (0.2 * error[mask & visual].sum() + 3 * error[mask & ~visual].sum()) / mask.sum()
    np.testing.assert_allclose(loss((0.2, 3.0)), expected, rtol=1e-5)
    worse = found + 10 * ~visual[..., None]
    assert loss((1.0, 0.0), found=worse) == loss((1.0, 0.0))
    assert loss((0.0, 1.0), found=worse) > loss((0.0, 1.0))


@pytest.mark.parametrize("weights", [(-1.0, 1.0), (0.0, 0.0), (float("nan"), 1.0), (1.0,)])
def test_bad_weights_are_refused(weights):
    with pytest.raises(QuotaError, match="modality_weights must be two numbers"):
        FlatQuantOptions(modality_weights=weights)


@pytest.mark.parametrize("source", ["llava"], indirect=True)
def test_the_options_of_the_command(source, tmp_path, capsys):
    with pytest.raises(QuotaError, match="feed 'float' is unknown; known: full, quantized"):
        FlatQuantOptions(feed="float")
    assert FlatQuantGptqOptions(flatquant=FlatQuantOptions(feed="quantized")).feed == "quantized"
    draw_picture(1).save(tmp_path / "a.png")
    (tmp_path / "c.json").write_text('[{"image": "a.png", "turns": ["what is a car ?", "red"]}]')
    base = ["calibrate", source, "--data", tmp_path / "c.json", "--out", tmp_path / "q"]
    base += ["--bits", "W4A8KV4", "--modules", "projector"]
    flags = ["--feed", "quantized", "--modality-weights", 0.5, 2]
    for options, message in (
        (["--method", "smoothquant", *flags[:2]], "--feed is of no use to --method smoothq"),
        (["--method", "smoothquant", *flags[2:]], "--modality-weights is of no use"),
        (
            ["--method", "flatquant", "--act-order"],
            "--act-order is of no use to",
        ),
        (["--method", "flatquant", "--modality-weights", 0, 0], "not both 0; got 0.0 0.0"),
    ):
        assert main([str(each) for each in (*base, *options)]) == 2
        assert message in capsys.readouterr().err
    run = [*base, "--method", "flatquant", "--steps", 1, "--batch-size", 1]
    assert main([str(each) for each in (*run, *flags)]) == 0
    told = open_checkpoint(tmp_path / "q").provenance["calibration"]["options"]
    assert (told["feed"], told["modality_weights"]) == ("quantized", [0.5, 2.0])


@pytest.mark.parametrize("source", ["llava"], indirect=True)
def test_other_options_are_another_run(source, tmp_path, monkeypatch):
    """A killed run is taken up by one with the same options only."""
    prints = []

    def note(*arguments, fingerprint, **options):
        prints.append(fingerprint)
        raise Stopped

    monkeypatch.setattr(calibration, "CheckpointWriter", note)
    for options in (
        FlatQuantOptions(),
        FlatQuantOptions(feed="quantized"),
        FlatQuantOptions(modality_weights=(0.5, 1.0)),
        FlatQuantOptions(transform_values=False),
        FlatQuantOptions(),
    ):
        with pytest.raises(Stopped):
            calibrate(source, tmp_path, W4A4, samples=samples(), options=options)
    assert len(set(prints)) == 4
    assert prints[0] == prints[4]


def test_value_transforms_change_nothing_while_nothing_is_quantized(source):
    """All transforms of a decoder layer far from the identity, with shared heads and biases (Qwen);
    P_v itself against one product per head."""
    checkpoint = open_checkpoint(source)
    text = checkpoint.config.text
    params = checkpoint.read_block("decoder_layer_000")
    block = Block(config=checkpoint.config, kind="decoder")
    processor = Processor.from_folder(checkpoint.assets_dir, checkpoint.config)
    batch = make_batches(processor, samples(), 2).batches[0]
    sites = find_sites(params, W4A4, value_width=text.head_dim)
    draw = np.random.default_rng(1)
    learned = jax.tree.map(
        lambda value: value + 0.2 * draw.standard_normal(value.shape),
        start(params, sites, {}, W4A4, kind="random", seed=0),
    )
    x = draw.standard_normal((*batch.tokens.shape, text.hidden_size)).astype(np.float32)
    real = np.asarray(batch.is_real)
    expected = np.asarray(forward(params, x, batch, block=block))[real]
    folded = fold_exactly(params, sites, learned, clip=False)
    found = np.asarray(forward(folded, x, batch, block=block))[real]
    assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)

    o = "decoder.layers.attn.o"
    alone = {o: {"value": learned[o]["value"]}}
    moved = fold_exactly(params, tuple(s for s in sites if s.linear == o), alone)
    matrix = factor(learned[o]["value"], np)[0]
    first = (text.num_heads + text.num_kv_heads) * text.head_dim
    for part in ("weight", "bias"):
        if (name := f"decoder.layers.attn.qkv.{part}") not in params:
            continue
        after = params[name].astype(np.float64)
        for head in range(text.num_kv_heads):
            rows = slice(first + head * text.head_dim, first + (head + 1) * text.head_dim)
            after[rows] = matrix.T @ after[rows]
        np.testing.assert_allclose(moved[name], after, rtol=1e-5, atol=1e-6)
    for head in range(text.num_heads):
        columns = slice(head * text.head_dim, (head + 1) * text.head_dim)
        back = moved[f"{o}.weight"][:, columns] @ matrix.T
        np.testing.assert_allclose(back, params[f"{o}.weight"][:, columns], rtol=1e-4, atol=1e-5)
