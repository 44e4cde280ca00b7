"""Co-calibration: divergences, the search for a recipe, and the round that is kept."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quota_jax as qj
from quota_jax import co_calibration, pipeline
from quota_jax.checkpoint import open_checkpoint
from quota_jax.co_calibration import search
from quota_jax.errors import QuotaError
from quota_jax.pipeline import PipelineOptions, build_variant
from quota_jax.prune import divergence as divergence_module
from quota_jax.prune.divergence import (
    ANSWER,
    divergence,
    measure_divergences,
    questions,
    with_weights,
)
from quota_jax.prune.weights import METRICS, QuotaWeights
from quota_jax.quant.calibration_data import Sample, make_batches
from quota_jax.quant.gptq import GptqOptions
from quota_jax.quantization import QuantizationConfig
from quota_jax.recipe import Recipe, Selector, Stage
from tests.tiny_checkpoints import tiny_checkpoint
from tests.tiny_models import draw_picture

QUANTIZATION = QuantizationConfig.parse("W4A4KV4", method="gptq")


def recipe_of(depth: int, *keeps: float, **weights: float) -> Recipe:
    """One stage a layer from layer 0 on."""
    chosen = Selector(name="quota", weights=QuotaWeights(**weights))
    stages = tuple(
        Stage(layer=layer, keep=keep, point="after_attention", selector=chosen)
        for layer, keep in enumerate(keeps)
    )
    return Recipe(num_layers=depth, stages=stages)


def samples(count: int = 3, answers: bool = False) -> list[Sample]:
    found = []
    for i in range(count):
        text = ("what is a car ?", "car", "is there a red circle ?")[i % 3]
        turns = (text, ("no", "yes", "no")[i % 3]) if answers else (text,)
        found.append(Sample(turns=turns, image=draw_picture(i)))
    return found


@pytest.fixture(scope="module", params=["llava", pytest.param("qwen", marks=pytest.mark.slow)])
def source(request, tmp_path_factory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def built(source, tmp_path_factory) -> Path:
    """A co-calibrated checkpoint."""
    options = PipelineOptions(
        keep=0.25, quantization=QUANTIZATION, options=GptqOptions(batch_size=2), layers=(0, 1)
    )
    out = tmp_path_factory.mktemp("built") / "out"
    return build_variant("co-calibrated", source, out, options, samples=samples())


def measure_of(table: dict[Recipe, float], asked: list[list[Recipe]], spread: float = 0.0):
    """A measure that looks up a table; recipes that are not in it diverge by 9. ``spread``: of 16
    prompts, drawn anew for each recipe."""
    rng = np.random.default_rng(0)

    def measure(step, recipes):
        assert step == len(asked)
        asked.append(list(recipes))
        means = np.array([table.get(recipe, 9.0) for recipe in recipes])
        noise = rng.normal(size=(16, len(recipes)))
        return means + spread * (noise - noise.mean(0))

    return measure


def test_search_follows_the_divergence():
    """Metrics and schedules are changed one at a time, each recipe is measured once, and the search
    ends where no neighbour is better."""
    default = QuotaWeights()
    derived, equal = recipe_of(2, 0.9, 0.3), recipe_of(2, 0.6, 0.3)
    without = default.without("magnitude")
    fewer = without.without("intra")
    asked: list[list[Recipe]] = []
    table = {
        derived: 3.0,
        with_weights(derived, without): 2.0,
        with_weights(equal, without): 1.0,
        with_weights(equal, fewer): 0.5,
    }
    schedules = {"sensitivity": derived, "equal": equal}
    best, tried = search(schedules, measure_of(table, asked))
    assert best.recipe == with_weights(equal, fewer)
    told = {"schedule": "equal", "weights": dataclasses.asdict(fewer), "divergence": 0.5}
    assert best.told == told
    measured = [recipe for step in asked for recipe in step]
    assert measured == [each.recipe for each in tried]
    assert len(set(measured)) == len(measured)
    assert asked[0] == [derived]
    neighbours = {with_weights(derived, default.without(metric)) for metric in METRICS}
    assert set(asked[1]) == {equal, *neighbours}
    # Where nothing is better, the start is what comes out.
    assert search(schedules, measure_of({derived: 1.0}, []))[0].recipe == derived


@pytest.mark.parametrize(("spread", "moves"), [(0.2, True), (4.0, False)])
def test_search_does_not_follow_noise(spread, moves):
    """A mean that is lower by 1 wins where prompts differ by 0.2, not where they differ by 4."""
    derived, equal = recipe_of(2, 0.9, 0.3), recipe_of(2, 0.6, 0.3)
    table = {derived: 3.0, equal: 2.0}
    best, _ = search({"sensitivity": derived, "equal": equal}, measure_of(table, [], spread))
    assert best.recipe == (equal if moves else derived)


def test_search_keeps_at_least_one_metric():
    alone = recipe_of(2, 0.5, inter=1.0, magnitude=0.0, intra=0.0, residual=0.0)
    _, tried = search({"sensitivity": alone, "equal": alone}, measure_of({alone: 1.0}, []))
    assert [each.recipe for each in tried] == [alone]


def test_divergence_is_the_mean_kl():
    rng = np.random.default_rng(0)
    expected, found = rng.normal(size=(2, 2, 3, 7)) * 3
    given = np.array([[1, 1, 0], [1, 0, 0]], bool)

    def softmax(x):
        x = np.exp(x - x.max(-1, keepdims=True))
        return x / x.sum(-1, keepdims=True)

    p, q = softmax(expected), softmax(found)
    each = (p * np.log(p / q)).sum(-1)
    result = divergence(*map(jnp.asarray, (expected, found, given)))
    np.testing.assert_allclose(result, [each[0, :2].mean(), each[1, 0]], rtol=1e-5)
    np.testing.assert_allclose(divergence(expected, expected, given), 0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("answers", [False, True])
def test_divergences_are_those_of_the_deployed_execution(source, tmp_path, answers):
    """Against generation step by step, one sample after the other."""
    options = PipelineOptions(quantization=QuantizationConfig.parse("W4A8KV4"))
    low = open_checkpoint(build_variant("quant-only", source, tmp_path / "low", options))
    full, data = open_checkpoint(source), samples(answers=answers)
    depth = full.config.text.num_layers
    recipe = recipe_of(depth, 0.5, 0.25)
    found = measure_divergences(
        low, full, data, [recipe], tmp_path / "journal", batch_size=2, dtype="float32"
    )
    exact, deployed = (qj.load(each.path, dtype="float32") for each in (full, low))
    values = []
    for sample in data:
        asked = dataclasses.replace(sample, turns=sample.turns[:1])
        batch = make_batches(exact.processor, [asked], 1).batches[0]
        answer = qj.generate(
            exact.model, batch, max_new_tokens=ANSWER, stop_ids=exact.processor.stop_ids
        )
        given = answer.tokens[0, : answer.lengths[0]]
        seen = []
        for vlm, graph in ((exact, None), (deployed, recipe)):
            logits, cache = qj.prefill(vlm.model, batch, recipe=graph)
            position, groups, rows = cache.position, cache.groups, [logits]
            for token in given[:-1]:
                logits, groups = vlm.model.decoder.step(
                    jnp.asarray([token]), position, groups, jnp.ones((1,), bool)
                )
                position = position + 1
                rows.append(logits)
            seen.append(jax.nn.log_softmax(jnp.concatenate(rows), axis=-1))
        p, q = seen
        values.append(float((jnp.exp(p) * (p - q)).sum(-1).mean()))
    np.testing.assert_allclose(found[:, 0], values, rtol=1e-3, atol=1e-6)
    assert (found > 0).all()
    with pytest.raises(QuotaError, match="need calibration samples"):
        measure_divergences(low, full, [], [recipe], tmp_path / "other")
    with pytest.raises(QuotaError, match="other data or options"):
        measure_divergences(low, full, data, [recipe, recipe], tmp_path / "journal")


def test_questions_are_prompts_of_their_own():
    """Answers and other questions are not in the prompt; first questions come first."""
    talk = Sample(turns=("a ?", "yes", "b ?", "no"), image=1)
    text = Sample(text="c ?", image=2)
    a, b = (Sample(turns=(asked,), image=1) for asked in ("a ?", "b ?"))
    assert questions([talk, text, talk]) == [a, text, a, b, b]
    assert questions([talk, text, talk], 4) == [a, text, a, b]
    assert questions([Sample(turns=("a ?",), image=1)]) == [a]


@pytest.mark.slow
def test_the_best_round_is_what_comes_out(source, built, tmp_path):
    """The recipe and the blocks are those of the divergence that is told, measured again here."""
    checkpoint = open_checkpoint(built)
    derivation = checkpoint.provenance["derivation"]
    number, values = derivation["round"], derivation["divergences"]
    assert len(values) == 2
    assert values[number] == derivation["chosen"]["divergence"] <= values[0]
    assert derivation["chosen"] in derivation["tried"]
    again = measure_divergences(
        checkpoint,
        open_checkpoint(source),
        samples(),
        [checkpoint.recipe],
        tmp_path / "journal",
        dtype="float32",
    )
    assert again.mean() == pytest.approx(values[number], rel=1e-6)
    told = checkpoint.provenance["calibration"]
    assert ("recipe" in told) == (number > 0)
    assert checkpoint.provenance["variant"] == "co-calibrated"
    assert checkpoint.recipe.stages[-1].keep == 0.25
    assert [path.name for path in built.parent.iterdir()] == ["out"]


@pytest.mark.slow
def test_a_first_round_that_is_there_is_not_made_again(source, built, tmp_path, monkeypatch):
    options = PipelineOptions(
        keep=0.25, quantization=QUANTIZATION, options=GptqOptions(batch_size=2), layers=(0, 1)
    )
    plain, reference = tmp_path / "plain", open_checkpoint(source)
    pipeline.calibrate(
        source, plain, QUANTIZATION, samples=samples(), options=GptqOptions(batch_size=2)
    )
    measured = co_calibration.deployed_sensitivities(open_checkpoint(plain), reference, samples())
    made: list[str] = []
    calibrate = pipeline.calibrate

    def watched(source, out, *args, **more):
        made.append(out.name)
        return calibrate(source, out, *args, **more)

    monkeypatch.setattr(pipeline, "calibrate", watched)
    first = co_calibration.FirstRound(checkpoint=plain, sensitivities=measured)
    out = tmp_path / "out"
    build_variant("co-calibrated", source, out, options, samples=samples(), first=first)
    assert made == ["round-1"]
    one, other = open_checkpoint(built), open_checkpoint(out)
    assert one.recipe == other.recipe
    assert one.provenance["derivation"] == other.provenance["derivation"]
    assert open_checkpoint(plain).provenance.get("derivation") is None


@pytest.mark.slow
def test_a_killed_call_measures_nothing_twice(source, built, tmp_path, monkeypatch):
    """Killed in the second round's search; what was calibrated and measured before is kept, and the
    result is the same."""
    options = PipelineOptions(
        keep=0.25, quantization=QUANTIZATION, options=GptqOptions(batch_size=2), layers=(0, 1)
    )
    measure = co_calibration.measure_divergences

    def killed(quantized, *args, **more):
        if quantized.path.name == "round-1":
            raise KeyboardInterrupt
        return measure(quantized, *args, **more)

    monkeypatch.setattr(co_calibration, "measure_divergences", killed)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        build_variant("co-calibrated", source, out, options, samples=samples())
    assert [path.name for path in tmp_path.iterdir()] == ["out.unfinished"]

    def forbidden(*args, **more):
        raise AssertionError("measured or calibrated again")

    def resumed(quantized, *args, **more):
        with monkeypatch.context() as patch:
            if quantized.path.name == "round-0":
                patch.setattr(divergence_module, "answer_logits", forbidden)
            return measure(quantized, *args, **more)

    monkeypatch.setattr(co_calibration, "measure_divergences", resumed)
    monkeypatch.setattr(co_calibration, "measure_sensitivities", forbidden)
    monkeypatch.setattr(pipeline, "calibrate", forbidden)
    build_variant("co-calibrated", source, out, options, samples=samples())
    one, other = open_checkpoint(built), open_checkpoint(out)
    assert one.recipe == other.recipe
    assert one.provenance["derivation"] == other.provenance["derivation"]
    for name in one.block_names:
        first, second = one.read_block(name), other.read_block(name)
        assert all(np.array_equal(first[key], second[key]) for key in first)
