"""Variants of quantization and pruning, and the calibration on pruned models that they need."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from quota_jax import co_calibration, pipeline
from quota_jax.checkpoint import CheckpointWriter, open_checkpoint
from quota_jax.config import TextConfig
from quota_jax.errors import QuotaError
from quota_jax.pipeline import (
    VARIANTS,
    PipelineOptions,
    build_variant,
    candidates,
    equal_recipe,
    selector,
)
from quota_jax.processing import Processor
from quota_jax.prune.sensitivity import layer_errors
from quota_jax.quant.calibration_data import Sample, make_batches
from quota_jax.quant.gptq import GptqOptions
from quota_jax.quant.streaming import check_graph, write_blocks
from quota_jax.quantization import QuantizationConfig
from quota_jax.recipe import Recipe, Selector, Stage
from quota_jax.testbed.learning.models import SMALL_MODELS
from tests.tiny_checkpoints import tiny_checkpoint
from tests.tiny_models import draw_picture

ROUNDED = QuantizationConfig.parse("W4A4KV4")


@pytest.fixture(scope="module", params=["llava", pytest.param("qwen", marks=pytest.mark.slow)])
def source(request, tmp_path_factory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp(request.param), request.param)


def samples() -> list[Sample]:
    words = ("what is a car ?", "car")
    return [Sample(text=text, image=draw_picture(i)) for i, text in enumerate(words)]


def recipe_of(source: Path, name: str) -> Recipe:
    """Half of the visual tokens leaves inside layer 0, by the whole score or without residual."""
    weights = Selector(name="quota").weights
    chosen = weights if name == "deployed" else weights.without("residual")
    stage = Stage(
        layer=0,
        keep=0.5,
        point="after_attention",
        selector=Selector(name="quota", weights=chosen),
    )
    depth = open_checkpoint(source).config.text.num_layers
    return Recipe(num_layers=depth, stages=(stage,))


@pytest.mark.parametrize("name", [pytest.param("full", marks=pytest.mark.slow), "deployed"])
def test_blocks_are_calibrated_on_the_tokens_that_inference_keeps(source, tmp_path, name):
    """Behind a stage blocks read what is left after it: the tokens that the model which feeds them
    keeps in a prefill under the recipe, and their states."""
    checkpoint, recipe = open_checkpoint(source), recipe_of(source, name)
    processor = Processor.from_folder(checkpoint.assets_dir, checkpoint.config)
    batches = make_batches(processor, samples(), 2).batches
    whole, seen = batches[0], {}

    def note(block_name, block, stored, inputs, outputs):
        seen[block_name] = [np.array(x) for x in inputs], [np.array(x) for x in outputs]
        return stored

    feed = "full" if name == "full" else "quantized"
    with CheckpointWriter(
        tmp_path / "out",
        config=checkpoint.config,
        quantization=ROUNDED,
        provenance={},
        assets={path.name: path.read_bytes() for path in checkpoint.assets_dir.iterdir()},
        fingerprint=name,
    ) as writer:
        write_blocks(checkpoint, writer, batches, ROUNDED, note, feed=feed, recipe=recipe)
        writer.finish()

    decides = checkpoint if feed == "full" else open_checkpoint(tmp_path / "out")
    model = decides.load_model("float32")

    @jax.jit
    def prefill(model, batch):
        x, sequence, vision = model.decoder_input(batch, recipe)
        layers = Recipe(num_layers=recipe.num_layers, stages=recipe.stages)
        return model.decoder.prefill(x, sequence, layers, vision)[1]

    expected = prefill(model, whole)
    assert batches[0].source.shape[1] < whole.tokens.shape[1]
    real = np.asarray(expected.is_real)
    np.testing.assert_array_equal(batches[0].is_real, real)
    np.testing.assert_array_equal(
        np.asarray(batches[0].source)[real], np.asarray(expected.source)[real]
    )
    # Both streams hold these tokens: the next layer's targets are as many as its inputs.
    inputs, outputs = seen["decoder_layer_001"]
    assert inputs[0].shape == outputs[0].shape == (*batches[0].source.shape, inputs[0].shape[-1])
    before = seen["decoder_layer_000"][1][0]
    if feed == "full":
        kept = np.take_along_axis(before, np.asarray(batches[0].source)[..., None], 1)
        np.testing.assert_array_equal(inputs[0][real], kept[real])


@pytest.mark.slow
def test_sensitivities_of_a_pruned_execution(source, tmp_path):
    """A model differs from itself nowhere; errors behind a stage are those of the kept tokens."""
    reference = open_checkpoint(source)
    recipe = recipe_of(source, "full")
    processor = Processor.from_folder(reference.assets_dir, reference.config)
    batch = make_batches(processor, samples(), 2).batches[0]
    model = reference.load_model("float32")
    same = layer_errors(model, model, batch, eta=1e-6, recipe=recipe)
    assert same.shape == (2, recipe.num_layers)
    np.testing.assert_array_equal(same, 0)
    out = build_variant(
        "quant-only",
        source,
        tmp_path / "rtn",
        PipelineOptions(quantization=ROUNDED, layers=(0,)),
    )
    quantized = open_checkpoint(out).load_model("float32")
    pruned = np.asarray(layer_errors(quantized, model, batch, eta=1e-6, recipe=recipe))
    whole = np.asarray(layer_errors(quantized, model, batch, eta=1e-6))
    assert (pruned > 0).all()
    assert not np.allclose(pruned, whole)

    @jax.jit
    def slow(quantized, model, batch):
        """Layer by layer with gathers of our own."""
        x, sequence, _ = model.decoder_input(batch, recipe)
        x_q = quantized.decoder_input(batch, recipe)[0]
        stage, errors = recipe.stages[0], []
        for index in range(recipe.num_layers):
            number = np.int32(index)
            left, order = sequence, None
            if index == stage.layer:
                left, order = quantized.decoder.chosen(x_q, sequence, number, stage, recipe)
            x = model.decoder.layer(x, sequence, number)[0]
            x_q = quantized.decoder.layer(x_q, sequence, number)[0]
            if order is not None:
                x, x_q = (jax.vmap(lambda a, o: a[o])(part, order) for part in (x, x_q))
            sequence = left
            mask = sequence.is_real[..., None]
            norm = jax.numpy.sqrt(((x * mask) ** 2).sum((1, 2)))
            errors.append(jax.numpy.sqrt((((x_q - x) * mask) ** 2).sum((1, 2))) / (norm + 1e-6))
        return jax.numpy.stack(errors, 1)

    np.testing.assert_allclose(pruned, slow(quantized, model, batch), rtol=1e-4)


@pytest.mark.slow
def test_variants_store_their_recipes(source, tmp_path):
    """What each variant calibrates on, how its drops are spread and what it scores by."""
    options = PipelineOptions(
        keep=0.25,
        quantization=QuantizationConfig.parse("W4A4KV4", method="gptq"),
        options=GptqOptions(batch_size=2),
        layers=(0, 1),
    )
    config = open_checkpoint(source).config
    built = {}
    for name, variant in VARIANTS.items():
        out = build_variant(name, source, tmp_path / name, options, samples=samples())
        built[name] = open_checkpoint(out)
        assert built[name].provenance["variant"] == name
        assert built[name].quantization.is_none == (not variant.quantized)
        stages = built[name].recipe.canonical().stages
        assert bool(stages) == variant.pruned
        if not stages:
            continue
        assert [stage.layer for stage in stages] == [0, 1]
        assert stages[-1].keep == 0.25
        derived = "derivation" in built[name].provenance
        assert derived == (variant.schedule == "sensitivity")
        told = built[name].provenance.get("calibration", {})
        assert bool(told) == variant.quantized
        if variant.graph == "deployed":  # what it chose: tests/test_co_calibration.py
            continue
        weights = stages[0].selector.weights
        assert bool(weights.residual) == variant.residual
        equal = equal_recipe(config, options, stages[0].selector)
        assert (stages == equal.stages) or derived
        assert ("recipe" in told) == (variant.graph == "pruned")
    assert {path.name for path in tmp_path.iterdir()} == set(built)
    # Calibration on all tokens is the same for the variants that share it.
    name = "decoder_layer_001"
    plain = built["quant-only"].read_block(name)
    for other, same in (("collaborative", True), ("prune-then-quantize", False)):
        block = built[other].read_block(name)
        assert all(np.array_equal(plain[key], block[key]) for key in plain) == same


def test_a_killed_call_leaves_no_checkpoint_and_goes_on(source, tmp_path, monkeypatch):
    """Killed after calibration, before its recipe is there: the calibration is not done again."""
    options = PipelineOptions(keep=0.5, quantization=ROUNDED, layers=(0, 1))
    place, measure = tmp_path / "out", co_calibration.measure_sensitivities

    def kill(*args, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr(co_calibration, "measure_sensitivities", kill)
    with pytest.raises(KeyboardInterrupt):
        build_variant("collaborative", source, place, options, samples=samples())
    assert [path.name for path in tmp_path.iterdir()] == ["out.unfinished"]
    other = dataclasses.replace(options, keep=0.25)
    with pytest.raises(QuotaError, match=r"begun with other settings \(keep is 0.5, not 0.25\)"):
        build_variant("collaborative", source, place, other, samples=samples())

    monkeypatch.setattr(co_calibration, "measure_sensitivities", measure)
    monkeypatch.setattr(pipeline, "calibrate", kill)
    build_variant("collaborative", source, place, options, samples=samples())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert open_checkpoint(place).recipe.stages[-1].keep == 0.5


def test_refusals(source, tmp_path):
    with pytest.raises(QuotaError, match="no variant 'quota'"):
        build_variant("quota", source, tmp_path / "x", PipelineOptions())
    with pytest.raises(QuotaError, match="keep must lie in"):
        PipelineOptions(keep=1.5)
    with pytest.raises(QuotaError, match="rounds must be at least 1"):
        PipelineOptions(rounds=0)
    plain = PipelineOptions(quantization=ROUNDED, layers=(0,))
    for name, options, given, message in (
        ("co-calibrated", plain, samples(), "blocks can be fed by quantized ones"),
        ("prune-then-quantize", plain, (), "is quantize-then-prune with method 'rtn'"),
        ("collaborative", plain, (), "it needs calibration samples"),
        ("prune-only", dataclasses.replace(plain, keep=1.0), (), "keep 1 prunes nothing"),
        (
            "quant-only",
            dataclasses.replace(plain, quantization=QuantizationConfig.none),
            (),
            "quantizes nothing",
        ),
    ):
        with pytest.raises(QuotaError, match=message):
            build_variant(name, source, tmp_path / "x", options, samples=given)
    rounded = build_variant("quant-only", source, tmp_path / "rounded", plain)
    with pytest.raises(QuotaError, match="is already quantized"):
        build_variant("quant-only", rounded, tmp_path / "x", plain)
    with pytest.raises(QuotaError, match="rounded already exists"):
        build_variant("quant-only", source, rounded, plain)
    assert [path.name for path in tmp_path.iterdir()] == ["rounded"]
    at_input = Stage(layer=0, keep=0.5, point="input", selector=Selector(name="div_prune"))
    with pytest.raises(QuotaError, match="stages inside layers"):
        check_graph(Recipe(num_layers=2, stages=(at_input,)))


def test_candidates_and_scores():
    """Five neighbors at the paper's depth; the residual only where inputs are quantized."""
    small = SMALL_MODELS["llava"]
    assert candidates(small) == (1, 2, 3, 4, 5)
    assert candidates(SMALL_MODELS["qwen2_5_vl"]) == (3, 4, 5, 6, 7)
    deep = TextConfig(
        vocab_size=32,
        hidden_size=8,
        intermediate_size=8,
        num_layers=32,
        num_heads=1,
        num_kv_heads=1,
        head_dim=8,
        max_position_embeddings=64,
    )
    assert candidates(dataclasses.replace(small, text=deep)) == (2, 3, 4, 5, 6)
    weight_only = QuantizationConfig.parse("W4A16")
    vision_only = QuantizationConfig.parse("W4A4KV4", modules=("vision",))
    for quantization in (weight_only, vision_only):
        assert selector(quantization, residual=True).weights.residual == 0
    assert selector(ROUNDED, residual=True).weights.residual == 0.2
    assert selector(ROUNDED, residual=False).weights.residual == 0
