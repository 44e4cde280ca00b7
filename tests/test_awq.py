"""AWQ's two searches by hand, where its scales go, and what it gains on a model."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from converters import convert
from quota_jax.checkpoint import open_checkpoint
from quota_jax.cli import main
from quota_jax.errors import QuotaError
from quota_jax.quant import calibrate_awq
from quota_jax.quant.awq import AwqOptions, clip_groups, search_scale, tied
from quota_jax.quant.blocks import Block, forward
from quota_jax.quant.calibrate_awq import scaled, with_input_scales
from quota_jax.quant.calibration_data import Sample, make_batches
from quota_jax.quant.folding import find_sites
from quota_jax.quant.groups import Groups
from quota_jax.quant.moments import Moments
from quota_jax.quant.streaming import Stream
from quota_jax.quantization import QuantizationConfig
from quota_jax.testbed.samples import write_samples
from quota_jax.vlm import load
from tests.tiny_models import draw_picture, write_tiny_llava
from tests.tiny_qwen import write_tiny_qwen


def slow_round(weight: np.ndarray, size: int) -> np.ndarray:
    """Symmetric 4-bit groups."""
    out = np.empty_like(weight)
    for n, row in enumerate(weight):
        for start in range(0, len(row), size):
            part = row[start : start + size]
            scale = max(np.abs(part).max(), 1e-8) / 7
            out[n, start : start + size] = np.clip(np.round(part / scale), -8, 7) * scale
    return out


@pytest.fixture(scope="module")
def case() -> tuple[np.ndarray, np.ndarray]:
    """Inputs of which a few channels are large, and a weight."""
    rng = np.random.default_rng(2)
    x = rng.standard_normal((200, 24)) * np.where(np.arange(24) % 7 == 3, 20, 1)
    return x, rng.standard_normal((6, 24))


def test_the_scale_is_the_best_of_all_candidates(case) -> None:
    x, weight = case
    pairs = x.reshape(200, 1, 2, 12)  # two channels twelve apart share a scale
    mean = np.abs(pairs).mean((0, 1))
    x_mean = np.tile(mean.mean(0), 2)
    relative = np.concatenate(
        [np.abs(p) / np.abs(p).max(1, keepdims=True) for p in np.split(weight, 3, axis=1)], axis=1
    )
    w_mean = np.tile(relative.mean(0).reshape(2, 12).mean(0), 2)
    best, losses = np.ones(24), []
    for duo in (False, True):
        for r in np.arange(20) / 20:
            s = x_mean**r / (w_mean ** (1 - r) + 1e-4 if duo else 1)
            s = np.maximum(s, 1e-4)
            s = s / np.sqrt(s.max() * s.min())
            losses.append(np.square(x @ (slow_round(weight * s, 8) / s - weight).T).sum())
            if losses[-1] == min(losses):
                best = s
    found = search_scale(
        jnp.asarray(weight, jnp.float32),
        jnp.asarray(x.T @ x, jnp.float32),
        jnp.asarray(np.abs(x).mean(0), jnp.float32),
        grid=Groups(bits=4, size=8),
        shape=(1, 2, 12),
        options=AwqOptions(),
    )
    np.testing.assert_allclose(found, best, rtol=1e-4)
    assert min(losses) < 0.5 * losses[0]  # the first candidate is no scaling


def test_each_group_is_cut_where_its_partial_product_errs_least(case) -> None:
    x, weight = case
    expected = weight.copy()
    for n in range(6):
        for start in range(0, 24, 10):
            part, inputs = weight[n, start : start + 10], x[:, start : start + 10]
            errors = []
            for i in range(10):
                limit = np.abs(part).max() * (1 - i / 20)
                cut = slow_round(np.clip(part, -limit, limit)[None], 10)[0]
                errors.append(np.square(inputs @ (cut - part)).sum())
            limit = np.abs(part).max() * (1 - int(np.argmin(errors)) / 20)
            expected[n, start : start + 10] = np.clip(part, -limit, limit)
    found = clip_groups(
        jnp.asarray(weight, jnp.float32),
        jnp.asarray(x.T @ x, jnp.float32),
        grid=Groups(bits=4, size=10),
        options=AwqOptions(),
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert (np.abs(expected - weight).max(1) > 0.01).any()


KEPT = {
    "llava": ("vision.layers.mlp.down", "projector.linear_1", "projector.linear_2"),
    "qwen": ("projector.linear_2",),
}


@pytest.mark.parametrize("family", ["llava", pytest.param("qwen", marks=pytest.mark.slow)])
def test_scales_change_nothing_before_rounding(tmp_path, family, monkeypatch) -> None:
    """All sites of both families with random scales: every block computes what it did."""
    rng = np.random.default_rng(0)

    def random_scale(weight, second, mean, *, grid, shape, options):
        return tied(jnp.asarray(np.exp(rng.standard_normal(weight.shape[1]))), shape)

    monkeypatch.setattr(calibrate_awq, "search_scale", random_scale)
    monkeypatch.setattr(calibrate_awq, "clip_groups", lambda weight, second, **_: weight)
    write = write_tiny_llava if family == "llava" else write_tiny_qwen
    convert(write(tmp_path / "hf"), tmp_path / "full")
    vlm, checkpoint = load(tmp_path / "full"), open_checkpoint(tmp_path / "full")
    plain = QuantizationConfig.parse("W4A16G16", method="awq")
    config = with_input_scales(plain, vlm.config)
    assert config.input_scales == KEPT[family]
    data = make_batches(vlm.processor, [Sample(text="what is a car ?", image=draw_picture(0))], 1)
    stream, seen = Stream(vlm.config, data.batches), set()
    for name in checkpoint.block_names:
        block, params = Block.named(vlm.config, name), checkpoint.read_block(name)
        if block is None:
            stream.prepare(name, params)
            continue
        inputs = stream.pass_through(name, block, params)
        if not inputs or block in seen:
            continue
        seen.add(block)
        sites = find_sites(params, config)
        known = {}
        for site in sites:
            width = params[f"{site.linear}.weight"].shape[1]
            known[site.linear] = Moments(
                second=jnp.eye(width), absolute=jnp.ones(width), count=jnp.float32(1)
            )
        found = scaled(params, sites, known, block, config, AwqOptions())
        for site in sites:
            change = found[f"{site.linear}.weight"] / params[f"{site.linear}.weight"]
            assert change.max() / change.min() > 1.5, site
        output = forward(found, inputs[0], data.batches[0], block=block)
        expected = np.asarray(stream.inputs[0])
        assert np.abs(output - expected).max() <= 2e-5 * np.abs(expected).max(), name


@pytest.mark.slow
def test_blocks_together_err_less_than_rounding(tmp_path, capsys) -> None:
    convert(write_tiny_llava(tmp_path / "hf"), tmp_path / "full")
    data = write_samples(tmp_path / "calib.json", 4)
    command = ["calibrate", str(tmp_path / "full"), "--method", "awq", "--data", str(data)]
    command += ["--modules", "decoder", "--group", "16", "--out", str(tmp_path / "awq")]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "W4A16KV16G16" in shown
    rows = [line.split() for line in shown.splitlines() if line.startswith("decoder_layer")]
    assert len(rows) == 2
    # AWQ looks at the outputs of one module at a time; a block's own error need not fall with them.
    first, last = (sum(float(row[column]) for row in rows) for column in (1, 2))
    assert last < 0.95 * first
    checkpoint = open_checkpoint(tmp_path / "awq")
    assert checkpoint.quantization.input_scales == ()
    assert checkpoint.quantization.method == "awq"
    with pytest.raises(QuotaError, match="quantizes weights only"):
        QuantizationConfig.parse("W4A8", method="awq")
