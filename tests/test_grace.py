"""Fine-tuning with GRACE on tiny models: what learns, what is written, killed runs, refusals."""

from __future__ import annotations

import json
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
from quota_jax.models.params import build_model, flatten_params
from quota_jax.processing import Processor
from quota_jax.quant import grace
from quota_jax.quant.calibrate import calibrate
from quota_jax.quant.calibration_data import Sample
from quota_jax.quant.grace import GraceOptions, finetune
from quota_jax.quant.grace_data import Targets, make_training_batches
from quota_jax.quant.grace_step import Task
from quota_jax.quant.grace_student import FROZEN, Student, host
from quota_jax.quantization import QuantizationConfig
from quota_jax.recipe import Recipe
from tests.tiny_models import draw_picture, write_tiny_llava
from tests.tiny_qwen import write_tiny_qwen

WRITE = {"llava": write_tiny_llava, "qwen2_5_vl": write_tiny_qwen}
TURNS = (
    ("is there a red circle ?", "yes", "what color is the square ?", "green"),
    ("what is a car ?", "a big red car"),
    ("where is the cat ?", "top left", "how many ?", "two"),
)
FAST = {"learning_rate": 3e-3, "scale_learning_rate": 1e-2, "relational_warmup": 2, "warmup": 0.0}


def samples_of(count: int) -> list[Sample]:
    return [
        Sample(turns=TURNS[i % 3], image=draw_picture(i) if i % 3 < 2 else None)
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("grace")
    found = {}
    for family, write in WRITE.items():
        hf = write(folder / f"{family}-hf", dtype="bfloat16")
        found[family] = folder / family
        convert(hf, found[family])
    return found


def grace_config(label: str, **options) -> QuantizationConfig:
    return QuantizationConfig.parse(label, method="grace", **options)


def floats(path: Path) -> dict[str, jax.Array]:
    return flatten_params(open_checkpoint(path).load_model(jnp.float32))


def blocks_of(path: Path) -> dict[str, np.ndarray]:
    checkpoint = open_checkpoint(path)
    return {
        f"{block} {name}": value
        for block in checkpoint.block_names
        for name, value in checkpoint.read_block(block).items()
    }


def task_of(checkpoint, quantization, options, recipe=None) -> Task:
    layers = checkpoint.config.text.num_layers
    return Task(
        config=checkpoint.config,
        student=Student(
            quantization=quantization,
            learned=options.modules(quantization),
            dtype=checkpoint.dtype.name,
        ),
        options=options,
        recipe=recipe or Recipe.none(layers),
    )


@pytest.mark.parametrize("family", list(WRITE))
def test_targets_are_the_answers(sources, family):
    checkpoint = open_checkpoint(sources[family])
    processor = Processor.from_folder(checkpoint.assets_dir, checkpoint.config)
    batches = make_training_batches(processor, samples_of(5), 2, "answers")
    assert len(batches) == 3
    end = {"llava": [], "qwen2_5_vl": [processor.tokenizer.convert_tokens_to_ids("<|im_end|>")]}
    row = 0
    for batch, targets in batches:
        for i in range(2):
            if row == 5:
                assert not targets.weights[i].any()
                continue
            expected = []
            for answer in TURNS[row % 3][1::2]:
                expected += processor.tokenizer.encode(answer, add_special_tokens=False)
                expected += end[family]
            used = targets.weights[i] > 0
            assert targets.labels[i, used].tolist() == expected
            places = targets.places[i, used]
            assert batch.tokens[i, places + 1].tolist() == expected
            assert not np.asarray(batch.is_visual)[i, places].any()
            row += 1
    (batch, targets), *_ = make_training_batches(processor, [Sample(text="a red car")], 1, "text")
    found = targets.labels[0][targets.weights[0] > 0].tolist()
    assert found == batch.tokens[0, 1 : batch.lengths[0]].tolist()


@pytest.mark.slow
def test_logits_are_those_of_prefill_whatever_is_pruned(sources):
    checkpoint = open_checkpoint(sources["llava"])
    processor = Processor.from_folder(checkpoint.assets_dir, checkpoint.config)
    batch = processor(
        images=[[draw_picture(1)], [draw_picture(2)]],
        prompts=["<image> what color is the car ?", "where is the <image> cat"],
    )
    last = np.asarray(batch.lengths)[:, None] - 1
    targets = Targets(places=last, labels=last, weights=np.ones(last.shape, np.float32))
    params = floats(sources["llava"])
    quantization = QuantizationConfig.parse("W4A4KV4")
    recipe = Recipe.uniform(num_layers=2, layers=[0], keep=0.3)
    task = task_of(checkpoint, quantization, GraceOptions())
    seen = jax.jit(lambda p, b: task.see(p, b, targets, quantization, recipe))(params, batch)
    model = build_model(checkpoint.config, quantization, params)
    expected, _ = qj.prefill(model, batch, recipe=recipe)
    np.testing.assert_allclose(seen.logits[:, 0], expected, rtol=1e-5, atol=1e-5)
    assert seen.inner is not None
    kept = seen.inner[1]
    total = np.asarray(batch.is_visual).sum(1)
    assert np.asarray(kept.is_visual).sum(1).tolist() == np.ceil(0.3 * total).tolist()


@pytest.fixture(scope="module")
def trained(sources, tmp_path_factory):
    """An uninterrupted run: its checkpoint, metrics and the simulated student at its end."""
    out = tmp_path_factory.mktemp("trained") / "out"
    kept = {}
    plain = grace.simulated_params

    def spy(learned, rest, *, task):
        kept["params"] = plain(learned, rest, task=task)
        kept["learned"] = learned
        return kept["params"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grace, "simulated_params", spy)
        history = finetune(
            sources["llava"], out, grace_config("W4A4KV4"), samples_of(6), options=OPTIONS
        )
    return out, history, kept


OPTIONS = GraceOptions(steps=12, batch_size=3, **FAST)


@pytest.mark.slow
def test_loss_falls(trained):
    _, history, _ = trained
    assert len(history) == 12
    first, last = (np.mean([step["loss"] for step in part]) for part in (history[:2], history[-2:]))
    assert last < 0.9 * first
    assert {step["beta"] for step in history[:1]} == {0.5}
    assert all(0 <= step["rcka"] <= 1 and 1 / np.e - 1e-6 < step["gate"] <= 1 for step in history)


@pytest.mark.slow
def test_everything_that_should_learn_does(trained, sources):
    _, _, kept = trained
    before = floats(sources["llava"])
    learned = kept["learned"]
    assert not any(name.startswith(FROZEN) for name in learned.weights)
    frozen = set(before) - set(learned.weights)
    assert all(name.startswith(FROZEN) for name in frozen)
    # Biases of keys shift all scores of a query alike; CLIP's last layer is read by nobody.
    idle = {"vision.post_norm.scale", "vision.post_norm.bias"}
    still = {name for name, value in learned.weights.items() if (value == before[name]).all()}
    assert still <= idle
    for stem, value in learned.scales.items():
        assert np.any(np.asarray(value) != 0), stem
    assert {f"{stem}.weight" for stem in learned.scales} == {
        name.replace(".packed", ".weight")
        for name in flatten_params(open_checkpoint(trained[0]).load_model())
        if name.endswith(".packed")
    }


@pytest.mark.slow
def test_packed_student_is_the_simulated_one(trained, sources):
    out, _, kept = trained
    checkpoint = open_checkpoint(out)
    assert checkpoint.quantization == grace_config("W4A4KV4")
    assert checkpoint.provenance["calibration"]["options"]["steps"] == 12
    same_bits(checkpoint, kept["params"])
    for name, value in floats(sources["llava"]).items():
        if name.startswith(FROZEN):
            np.testing.assert_array_equal(value, floats(out)[name])


def same_bits(checkpoint, params, **how):
    processor = Processor.from_folder(checkpoint.assets_dir, checkpoint.config)
    image = {"llava": "<image>", "qwen2_5_vl": "<|image_pad|>"}[checkpoint.config.model_type]
    batch = processor(
        images=[[draw_picture(7)], []], prompts=[f"{image} what is this ?", "a green bird"]
    )
    simulated = build_model(checkpoint.config, checkpoint.quantization, params)
    packed = checkpoint.load_model(jnp.float32)
    first, second = (qj.prefill(model, batch, **how) for model in (simulated, packed))
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.slow
def test_killed_run_ends_with_the_same_arrays(trained, sources, tmp_path):
    out = tmp_path / "out"

    def stop(done, total, metrics):
        if done == 8:
            raise KeyboardInterrupt

    arguments = sources["llava"], out, grace_config("W4A4KV4"), samples_of(6)
    with pytest.raises(KeyboardInterrupt):
        finetune(*arguments, options=OPTIONS, save_every=3, progress=stop)
    assert not out.exists()
    seen = []
    history = finetune(
        *arguments, options=OPTIONS, save_every=3, progress=lambda done, *_: seen.append(done)
    )
    assert seen == list(range(7, 13))
    assert history == trained[1]
    expected, found = blocks_of(trained[0]), blocks_of(out)
    assert set(found) == set(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    assert not any("training" in path.name for path in out.rglob("*"))


@pytest.mark.slow
def test_damaged_state_is_refused(sources, tmp_path):
    out = tmp_path / "out"

    def stop(done, total, metrics):
        raise KeyboardInterrupt

    arguments = sources["llava"], out, grace_config("W4A4KV4"), samples_of(6)
    with pytest.raises(KeyboardInterrupt):
        finetune(*arguments, options=OPTIONS, save_every=1, progress=stop)
    (state,) = tmp_path.rglob("training.npz")
    state.write_bytes(state.read_bytes()[:-500])
    with pytest.raises(QuotaError, match="damaged"):
        finetune(*arguments, options=OPTIONS)


def test_nearest_start_is_round_to_nearest(sources, tmp_path):
    checkpoint = open_checkpoint(sources["llava"])
    calibrate(sources["llava"], tmp_path / "rtn", QuantizationConfig.parse("W4A4KV4"))
    options = GraceOptions(start="nearest")
    task = task_of(checkpoint, grace_config("W4A4KV4"), options)
    learned, kept = task.student.begin(host(flatten_params(checkpoint.load_model())), "nearest")
    params = grace.simulated_params(learned, kept, task=task)
    same_bits(open_checkpoint(tmp_path / "rtn"), params)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "label", "keep", "options"),
    [
        ("qwen2_5_vl", "W4A4KV4E8H8", 0.5, {}),
        ("llava", "W4A16G16", None, {"relational_weight": 0.0, "learned": ("decoder",)}),
    ],
)
def test_other_students_pack_to_what_they_simulate(
    sources, tmp_path, monkeypatch, family, label, keep, options
):
    kept = {}
    plain = grace.simulated_params

    def spy(learned, rest, *, task):
        kept["params"] = plain(learned, rest, task=task)
        return kept["params"]

    monkeypatch.setattr(grace, "simulated_params", spy)
    recipe = keep and Recipe.uniform(num_layers=2, layers=[0], keep=keep)
    modules = ("vision", "projector", "decoder") if keep else ("decoder",)
    history = finetune(
        sources[family],
        tmp_path / "out",
        grace_config(label, modules=modules),
        samples_of(3),
        options=GraceOptions(steps=2, batch_size=3, **FAST | options),
        recipe=recipe,
    )
    assert all(np.isfinite(list(step.values())).all() for step in history)
    checkpoint = open_checkpoint(tmp_path / "out")
    assert checkpoint.recipe.is_none == (keep is None)
    same_bits(checkpoint, kept["params"], recipe=checkpoint.recipe)
    before, after = blocks_of(sources[family]), blocks_of(tmp_path / "out")
    for name, value in before.items():
        if keep is None and not name.split(" ")[1].startswith("decoder."):
            np.testing.assert_array_equal(after[name], value, err_msg=name)


def test_library_refusals(sources, tmp_path):
    def run(label="W4A4KV4", samples=None, recipe=None, method="grace", **options):
        finetune(
            sources["llava"],
            tmp_path / "out",
            QuantizationConfig.parse(label, method=method),
            samples_of(2) if samples is None else samples,
            options=GraceOptions(**options),
            recipe=recipe,
        )

    with pytest.raises(QuotaError, match="needs samples"):
        run(samples=[])
    with pytest.raises(QuotaError, match="not one that fine-tunes"):
        run(method="rtn")
    with pytest.raises(QuotaError, match="prunes in the last layer"):
        run(recipe=Recipe.uniform(num_layers=2, layers=[1], keep=0.5))
    with pytest.raises(QuotaError, match="for 3 decoder layers"):
        run(recipe=Recipe.uniform(num_layers=3, layers=[1], keep=0.5))
    for options, message in (
        ({"steps": 0}, "steps must be at least 1"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"beta_bounds": (1.0, 0.1)}, "beta_bounds must be in order"),
        ({"start": "zero"}, "start 'zero' is unknown"),
        ({"learned": ("tower",)}, "unknown module 'tower'"),
    ):
        with pytest.raises(QuotaError, match=message):
            run(**options)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def lists(tmp_path) -> dict[str, str]:
    found = {}
    for name, entries in {
        "good": [{"turns": ["is it red ?", "yes"]}],
        "plain": [{"text": "is it red ?"}],
        "asked": [{"turns": ["is it red ?"]}],
    }.items():
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(entries))
        found[name] = str(path)
    return found


@pytest.mark.parametrize(
    ("data", "arguments", "message"),
    [
        ("plain", [], "sample 0 has no answer to learn"),
        ("asked", [], "sample 0 has no answer to learn"),
        ("good", ["--bits", "W16A16KV4"], "method grace needs quantized weights"),
        ("good", ["--bits", "W5A4"], "weight_bits must be"),
        ("good", ["--method", "rtn"], "rtn"),
        ("good", ["--samples", "2"], "holds 1 samples, 2 were asked for"),
        ("good", ["--own-recipe"], "prunes nothing"),
        ("good", ["--layers", "1"], "--layers needs --keep"),
        ("good", ["--steps", "0"], "steps must be at least 1"),
        ("good", ["--modules", "decoder", "decoder"], "must name each module once"),
    ],
)
def test_command_refusals(sources, tmp_path, lists, capsys, data, arguments, message):
    out = tmp_path / "out"
    command = ["finetune", str(sources["llava"]), "--out", str(out), "--data", lists[data]]
    assert main([*command, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists()


@pytest.mark.slow
def test_a_quantized_teacher_is_refused(trained, tmp_path, lists, capsys):
    command = ["finetune", str(trained[0]), "--out", str(tmp_path / "out")]
    assert main([*command, "--data", lists["good"]]) == 2
    assert "already quantized (W4A4KV4)" in capsys.readouterr().err


@pytest.mark.slow
def test_command_trains_and_writes(sources, tmp_path, lists, capsys):
    out = tmp_path / "out"
    command = ["finetune", str(sources["llava"]), "--out", str(out), "--data", lists["good"]]
    more = ["--modules", "projector", "--steps", "2", "--batch-size", "1", "--bits", "W8A8"]
    assert main([*command, *more, "--relational-weight", "0", "--ungated"]) == 0
    printed = capsys.readouterr().out
    assert "distillation" in printed
    assert f"wrote {out}" in printed
    assert open_checkpoint(out).quantization == grace_config("W8A8", modules=("projector",))
