"""GPTQ against a slow one by hand, and block by block on a model."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from converters import convert
from quota_jax.checkpoint import open_checkpoint
from quota_jax.cli import main
from quota_jax.errors import QuotaError
from quota_jax.quant.blocks import Block
from quota_jax.quant.calibrate import FlatQuantGptqOptions, calibrate
from quota_jax.quant.calibrate_flatquant import FlatQuantOptions
from quota_jax.quant.calibration_data import Sample, make_batches
from quota_jax.quant.gptq import GptqOptions, gptq, inverse_factor
from quota_jax.quant.groups import Groups
from quota_jax.quant.moments import moments
from quota_jax.quantization import QuantizationConfig
from quota_jax.testbed.samples import write_samples
from quota_jax.vlm import load
from tests.tiny_models import draw_picture, write_tiny_llava

BLOCKS = ("projector", "decoder_layer_000", "decoder_layer_001")


def correlated(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    few = rng.standard_normal((rows, columns // 4)) @ rng.standard_normal((columns // 4, columns))
    return few + 0.2 * rng.standard_normal((rows, columns))


def slow_gptq(
    weight: np.ndarray, hessian: np.ndarray, grid: Groups, options: GptqOptions
) -> np.ndarray:
    """Codes by optimal brain surgery, channel by channel: the inverse is downdated each time,
    without any factorization, in float64."""
    w = weight.astype(np.float64)
    rows, columns = w.shape
    size = grid.size or columns
    diagonal = np.diag(hessian)
    order = list(range(columns))
    if options.act_order:
        order = sorted(order, key=lambda k: -diagonal[k])

    def fit(part: np.ndarray) -> tuple[float, float]:
        low, high = min(part.min(), 0.0), max(part.max(), 0.0)
        if grid.symmetric:
            return float(np.float32(max(high, -low, 1e-8) / 7)), 0.0
        scale = float(np.float32(max(high - low, 1e-8) / 15))
        return scale, float(np.clip(np.round(-low / scale), 0, 15))

    grids = {
        (n, g): fit(w[n, g * size : (g + 1) * size])
        for n in range(rows)
        for g in range(-(-columns // size))
    }
    inverse = np.linalg.inv(hessian + options.damping * diagonal.mean() * np.eye(columns))
    codes = np.zeros((rows, columns))
    for k in order:
        if grid.size and not options.act_order and k % size == 0:
            grids |= {(n, k // size): fit(w[n, k : k + size]) for n in range(rows)}
        for n in range(rows):
            scale, zero = grids[n, k // size]
            codes[n, k] = np.clip(np.round(w[n, k] / scale) + zero, grid.lowest, grid.highest)
            value = (codes[n, k] - zero) * scale
            w[n] -= (w[n, k] - value) / inverse[k, k] * inverse[k]
            w[n, k] = value
        inverse = inverse - np.outer(inverse[:, k], inverse[k]) / inverse[k, k]
        inverse[k], inverse[:, k] = 0, 0
    return codes


@pytest.mark.parametrize(
    ("size", "symmetric", "act_order"),
    [(0, True, False), (0, False, True), (12, True, True), (12, False, False)],
)
def test_codes_are_those_of_optimal_brain_surgery(size, symmetric, act_order) -> None:
    """Blocks that end inside the row, a short last group; the error is far below rounding's."""
    rng = np.random.default_rng(5)
    x = correlated(rng, 300, 44)
    weight = rng.standard_normal((7, 44)).astype(np.float32)
    grid = Groups(bits=4, size=size, symmetric=symmetric, scale_dtype="float32")
    options = GptqOptions(act_order=act_order, block_size=16)
    codes, scale, zeros = gptq(jnp.asarray(weight), x.T @ x, grid, options)
    np.testing.assert_array_equal(codes, slow_gptq(weight, x.T @ x, grid, options))

    def error(found) -> float:
        return float(np.square((np.asarray(found) - weight) @ x.T).sum())

    rounded = grid.dequantize(*grid.quantize(jnp.asarray(weight)))
    assert error(grid.dequantize(codes, scale, zeros)) < 0.4 * error(rounded)


def test_the_inverse_factor_and_inputs_that_say_little() -> None:
    rng = np.random.default_rng(0)
    x = correlated(rng, 700, 600)
    hessian = x.T @ x
    upper = inverse_factor(hessian, 0.01)
    damped = hessian + 0.01 * np.diag(hessian).mean() * np.eye(600)
    np.testing.assert_array_equal(upper, np.triu(upper))
    np.testing.assert_allclose(upper.T @ upper @ damped, np.eye(600), atol=1e-8)

    # One row of data, a channel without input, no data at all: the latter two round to nearest.
    grid = Groups(bits=4, scale_dtype="float32")
    weight = jnp.asarray(rng.standard_normal((5, 16)), jnp.float32)
    plain = grid.quantize(weight)[0]
    row = rng.standard_normal((1, 16))
    row[0, 3] = 0
    codes = gptq(weight, row.T @ row, grid, GptqOptions())[0]
    assert (codes != plain).any()
    np.testing.assert_array_equal(codes[:, 3], plain[:, 3])
    np.testing.assert_array_equal(gptq(weight, np.zeros((16, 16)), grid, GptqOptions())[0], plain)
    with pytest.raises(QuotaError, match="not finite"):
        inverse_factor(np.full((2, 2), np.nan), 0.01)
    with pytest.raises(QuotaError, match="not positive definite"):
        inverse_factor(np.array([[1.0, 9.0], [9.0, 1.0]]), 0.01)
    with pytest.raises(QuotaError, match="damping"):
        GptqOptions(damping=0.0)
    with pytest.raises(QuotaError, match="block_size"):
        GptqOptions(block_size=0)


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("gptq")
    convert(write_tiny_llava(root / "hf"), root / "ckpt")
    return root / "ckpt"


def samples(count: int) -> list[Sample]:
    texts = ("is there a red circle ?", "what is a car ?")
    return [
        Sample(text=texts[i % 2], image=draw_picture(i) if i % 3 else None) for i in range(count)
    ]


def test_padding_never_enters_the_moments(full) -> None:
    """The decoder's inputs are rewritten where nothing is real; the last batch is half copies."""
    vlm = load(full)
    data = make_batches(vlm.processor, samples(3), 2)
    block = Block(config=vlm.config, kind="decoder")
    params = open_checkpoint(full).read_block("decoder_layer_000")
    rng, found = np.random.default_rng(0), []
    masks = data.masks(block)
    assert [int(mask.sum(1).astype(bool).sum()) for mask in masks] == [2, 1]
    base = [rng.standard_normal((*mask.shape, 64)).astype(np.float32) for mask in masks]
    for padding in (0.0, 1e3):
        inputs = [
            np.where(np.asarray(m)[..., None], x, np.float32(padding))
            for x, m in zip(base, masks, strict=True)
        ]
        linears = ("decoder.layers.attn.qkv", "decoder.layers.mlp.down")
        found.append(moments(block, params, inputs, data.batches, masks, linears))
    rows = sum(int(mask.sum()) for mask in masks)
    for name in linears:
        first, second = (f[name] for f in found)
        assert float(first.count) == rows
        np.testing.assert_array_equal(first.second, second.second)
        np.testing.assert_array_equal(first.absolute, second.absolute)
    # By hand for q/k/v, whose input is the normed state.
    real = np.concatenate([x[np.asarray(m)] for x, m in zip(base, masks, strict=True)])
    real = real.astype(np.float64)
    normed = real / np.sqrt(np.square(real).mean(-1, keepdims=True) + vlm.config.text.rms_norm_eps)
    normed *= params["decoder.layers.norm1.scale"]
    np.testing.assert_allclose(found[0][linears[0]].second, normed.T @ normed, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(found[0][linears[0]].absolute, np.abs(normed).sum(0), rtol=1e-5)


@pytest.mark.slow
def test_blocks_err_less_than_rounding_and_a_killed_run_goes_on(full, tmp_path, capsys) -> None:
    data = write_samples(tmp_path / "calib.json", 4)
    command = ["calibrate", str(full), "--method", "gptq", "--bits", "W4A16", "--group", "16"]
    command += ["--data", str(data), "--act-order", "--modules", "projector", "decoder"]
    assert main([*command, "--out", str(tmp_path / "whole")]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    losses = {row[0]: (float(row[1]), float(row[2])) for row in rows if row[0] in BLOCKS}
    assert sorted(losses) == sorted(BLOCKS)
    assert all(last < 0.8 * first for first, last in losses.values()), losses

    from quota_jax.quant.calibration_data import read_samples

    class Killed(Exception):
        pass

    def kill(name: str, done: int, total: int) -> None:
        if name == "decoder_layer_000":
            raise Killed

    config = QuantizationConfig.parse("W4A16G16", method="gptq", modules=("projector", "decoder"))
    options = GptqOptions(act_order=True)
    arguments = (full, tmp_path / "again", config)
    with pytest.raises(Killed):
        calibrate(*arguments, samples=read_samples(data), options=options, progress=kill)
    assert (tmp_path / "again.partial").is_dir()
    calibrate(*arguments, samples=read_samples(data), options=options)
    whole, again = open_checkpoint(tmp_path / "whole"), open_checkpoint(tmp_path / "again")
    assert whole.quantization == again.quantization
    for block in whole.block_names:
        left, right = whole.read_block(block), again.read_block(block)
        assert left.keys() == right.keys()
        for name, value in left.items():
            np.testing.assert_array_equal(value, right[name])


@pytest.mark.slow
def test_on_top_of_flatquant(full, tmp_path) -> None:
    """Transforms are learned, then GPTQ sees transformed and quantized inputs."""
    config = QuantizationConfig.parse("W4A4KV4", method="flatquant+gptq", modules=("projector",))
    reports = []
    learning = FlatQuantOptions(steps=4, batch_size=2)
    calibrate(
        full,
        tmp_path / "out",
        config,
        samples=samples(4),
        options=FlatQuantGptqOptions(flatquant=learning),
        report=reports.append,
    )
    assert [report.name for report in reports] == ["projector", "projector gptq"]
    assert reports[1].last_loss < 0.9 * reports[1].first_loss
    found = open_checkpoint(tmp_path / "out").read_block("projector")
    assert {"left", "right", "clip", "packed", "scale", "bias"} == {
        name.rsplit(".", 1)[1] for name in found if ".linear_1." in name
    }
    plain = QuantizationConfig.parse("W4A4", method="gptq")
    with pytest.raises(QuotaError, match="takes GptqOptions, not FlatQuantOptions"):
        calibrate(full, tmp_path / "no", plain, samples=samples(2), options=learning)
