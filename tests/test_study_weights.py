"""Checkpoints of a study: outliers planted in the source, mixed precision, and trained students."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

import quota_jax as qj
from quota_jax.checkpoint import open_checkpoint
from quota_jax.errors import QuotaError
from quota_jax.quant.calibrate import calibrate
from quota_jax.quant.calibration_data import Sample, make_batches
from quota_jax.quantization import QuantizationConfig
from quota_jax.reproduce import weights as study_weights
from quota_jax.reproduce.weights import GRACE, Weights, make_weights
from quota_jax.testbed.outliers import FACTOR, plant_outliers
from tests.tiny_checkpoints import tiny_checkpoint
from tests.tiny_models import draw_picture


@pytest.fixture(scope="module", params=["llava", pytest.param("qwen", marks=pytest.mark.slow)])
def source(request, tmp_path_factory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp(request.param), request.param)


def talks(count: int = 2) -> list[Sample]:
    return [Sample(turns=("what is a car ?", "yes"), image=draw_picture(i)) for i in range(count)]


def test_planted_outliers_change_activations_and_no_answer(source, tmp_path):
    planted = plant_outliers(source, tmp_path / "planted", channels=(3, 17))
    before, after = open_checkpoint(source), open_checkpoint(planted)
    grown = []
    for name in before.block_names:
        one, other = before.read_block(name), after.read_block(name)
        for key, value in one.items():
            if key.endswith((".norm1.scale", ".norm2.scale")) or key == "projector.norm.scale":
                expected = np.array(value, np.float32)
                expected[[3, 17]] *= FACTOR
                np.testing.assert_allclose(other[key], expected, rtol=1e-6)
                grown.append(key)
    towers = [key for key in grown if key.startswith("vision")]
    decoder = [key for key in grown if key.startswith("decoder")]
    assert towers
    assert decoder
    models = [qj.load(path, dtype="float32") for path in (source, planted)]
    batch = make_batches(models[0].processor, talks(), 2).batches[0]
    exact, found = (np.asarray(qj.prefill(vlm.model, batch)[0]) for vlm in models)
    assert np.linalg.norm(found - exact) < 1e-5 * np.linalg.norm(exact)
    assert after.provenance["outliers"] == {"factor": FACTOR, "at": [3, 17]}


def test_outliers_are_refused_where_they_cannot_be(source, tmp_path):
    calibrate(source, tmp_path / "rounded", QuantizationConfig.parse("W4A4KV4"))
    with pytest.raises(QuotaError, match="is quantized: outliers are planted in full precision"):
        plant_outliers(tmp_path / "rounded", tmp_path / "x")
    with pytest.raises(QuotaError, match="channels, no channel 100000"):
        plant_outliers(source, tmp_path / "x", channels=(100000,))
    assert not (tmp_path / "x").exists()


def test_names_tell_weights_apart():
    plain = Weights(method="rtn", bits="W4A4KV4")
    others = [
        dataclasses.replace(plain, outliers=30.0),
        dataclasses.replace(plain, outliers=10.0),
        dataclasses.replace(plain, seed=1),
        dataclasses.replace(plain, method="luq", bits="W4A16G128"),
        dataclasses.replace(plain, modules=("decoder",)),
        dataclasses.replace(plain, variant="co-calibrated", keep=0.3),
    ]
    assert len({each.name for each in (plain, *others)}) == 7
    assert not Weights(method="luq", bits="W4A16G128").quantization.symmetric
    assert Weights(method="awq", bits="W4A16G128").quantization.symmetric


@pytest.mark.slow
def test_luq_and_grace_are_made_of_their_own_samples(source, tmp_path, monkeypatch):
    """LUQ sees the samples of the seed, GRACE trains on the whole pool."""
    monkeypatch.setattr(study_weights, "GRACE", dataclasses.replace(GRACE, steps=1, batch_size=2))
    samples, pool = talks(1), talks(3)
    luq = Weights(method="luq", bits="W4A16G16", modules=("projector", "decoder"))
    make_weights(luq, source, tmp_path / "luq", samples=samples, pool=pool)
    made = open_checkpoint(tmp_path / "luq")
    assert made.quantization.layer_bits
    assert made.provenance["calibration"]["samples"] == 1
    grace = Weights(method="grace", bits="W4A8KV4", seed=5)
    make_weights(grace, source, tmp_path / "grace", samples=samples, pool=pool)
    told = open_checkpoint(tmp_path / "grace").provenance["calibration"]
    assert (told["samples"], told["options"]["seed"]) == (3, 5)
    with pytest.raises(QuotaError, match="method 'grace' trains"):
        make_weights(
            dataclasses.replace(grace, variant="collaborative", keep=0.3),
            source,
            tmp_path / "x",
            samples=samples,
            pool=pool,
        )
