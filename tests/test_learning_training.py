"""Training of the small models: losses fall, the plan follows the clock, a killed run goes on as if
nothing had happened, and what comes out says what it is."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from converters import convert
from quota_jax.errors import QuotaError
from quota_jax.testbed import optimizer, small_qwen_path
from quota_jax.testbed.learning import flops
from quota_jax.testbed.learning.card import write_card
from quota_jax.testbed.learning.data import QUESTION_TYPES, Text
from quota_jax.testbed.learning.models import SMALL_MODELS, init_params, tiny_model
from quota_jax.testbed.learning.start import read_start
from quota_jax.testbed.learning.state import INDEX, Saved, load_state, save_state
from quota_jax.testbed.learning.step import TrainingConfig, TrainState, init_state, loss_fn, plan
from quota_jax.testbed.learning.trainer import (
    Clock,
    Programs,
    Trainer,
    accuracy,
    by_topic,
    majority,
)
from quota_jax.testbed.optimizer import init_optimizer, orthogonalise, uses_muon
from quota_jax.testbed.world.layout import EASY, Difficulty
from quota_jax.testbed.world.questions import draw_requests
from quota_jax.testbed.world.topics import HINT_TOPICS, TOPICS

FULL = Difficulty()


def tiny(family: str = "qwen2_5_vl", **changes: Any) -> TrainingConfig:
    sizes = ((336, 336),) if family == "llava" else ((112, 140), (140, 112))
    given: dict[str, Any] = {"sizes": sizes, "attention": "xla", "dtype": "float32"}
    return TrainingConfig(model=tiny_model(family), **(given | {"warmup_steps": 1} | changes))


@pytest.mark.parametrize("family", ["llava", pytest.param("qwen2_5_vl", marks=pytest.mark.slow)])
def test_steps_lower_both_losses_and_move_every_parameter(family):
    """On one batch of noise, which has to be learned by heart."""
    config, rng = tiny(family), np.random.default_rng(0)
    if family == "llava":
        model: Any = config.model
        vision = dataclasses.replace(model.vision, image_size=70)
        model = dataclasses.replace(model, vision=vision)
        config = dataclasses.replace(config, model=model, sizes=((70, 70),))
    size = config.sizes[0]
    pixels = rng.normal(size=(2, 3, *size)).astype(np.float32)
    tokens = rng.integers(5, 200, (2, 12)).astype(np.int32)
    weights = (np.arange(12) > 5).astype(np.float32) * np.ones((2, 1), np.float32)
    patches = size[0] * size[1] // 14**2
    labels = tuple(rng.integers(0, 8, (2, patches)).astype(np.int32) for _ in range(3))

    @partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def step(state):
        grad = jax.grad(loss_fn, has_aux=True)
        grads, losses = grad(state.params, config, pixels, Text(tokens, weights), labels, 1.0)
        params, moments, _ = optimizer.update(
            config.model, state.params, grads, state.optimizer, learning_rate=1e-2
        )
        return TrainState(params, moments), losses

    state = init_state(config)
    before, losses = state.params, []
    for _ in range(16):
        state, values = step(state)
        losses.append(np.asarray(values))
    assert losses[0][0] > 4
    assert losses[0][1] > 4
    assert (losses[-1] < 0.6 * losses[0]).all()
    unseen = set()
    for name, value in state.params.items():
        moved = np.abs(np.asarray(value) - np.asarray(before[name]))
        axes = tuple(range(1, moved.ndim))
        layers = moved.max(axes) if ".layers." in name else moved.max(keepdims=True)
        unseen |= {f"{name} {i}" for i in np.flatnonzero(layers.reshape(-1) == 0)}
    if family == "qwen2_5_vl":
        assert not unseen
    else:  # what lies behind the feature layer, but for the matrices' decay
        assert unseen
        assert all("post_norm" in name or name.endswith(" 2") for name in unseen)


def test_joined_rows_of_grouped_heads_move_apart():
    """Muon's step of the queries must not depend on how large the keys' gradient is."""
    model = tiny_model("qwen2_5_vl")
    name, rng = "decoder.layers.attn.qkv.weight", np.random.default_rng(0)
    shape = init_params(model, 0)[name].shape
    queries = model.text.num_heads * model.text.head_dim
    grad = rng.normal(size=shape).astype(np.float32)
    larger = grad.copy()
    larger[:, queries:] *= 30
    params = {name: jnp.zeros(shape)}
    moved = []
    for values in (grad, larger):
        new, _, _ = optimizer.update(
            model, params, {name: jnp.asarray(values)}, init_optimizer(params), learning_rate=1.0
        )
        moved.append(np.asarray(new[name]))
    # Bfloat16 inside: equal up to its rounding of values of about 0.4.
    np.testing.assert_allclose(moved[0][:, :queries], moved[1][:, :queries], atol=0.06)
    scale = 0.2 * np.sqrt(max(queries, shape[2]))
    expected = -np.asarray(orthogonalise(jnp.asarray(grad[:, :queries]))) * scale
    np.testing.assert_allclose(moved[0][:, :queries], expected, atol=0.06)
    assert uses_muon("projector.linear_1.weight")
    assert uses_muon("vision.layers.mlp.gate_up.weight")
    assert not uses_muon("decoder.embed.weight")


def test_muon_orthogonalises_and_adam_takes_the_rest():
    rng = np.random.default_rng(0)
    for shape in ((2, 24, 40), (2, 40, 24)):
        values = jnp.asarray(rng.normal(size=shape).astype(np.float32))
        singular = np.linalg.svd(np.asarray(orthogonalise(values, jnp.float32)))[1]
        # The quintic iteration settles in about 0.7 .. 1.2, not at 1.
        assert singular.min() > 0.4
        assert singular.max() < 1.3
    params = {"decoder.norm.scale": jnp.ones(8), "projector.linear_1.weight": jnp.zeros((4, 8))}
    grads = {"decoder.norm.scale": jnp.ones(8), "projector.linear_1.weight": jnp.ones((4, 8))}
    state = init_optimizer(params)
    assert state.second.keys() == {"decoder.norm.scale"}
    new, _, norm = optimizer.update(tiny_model("llava"), params, grads, state, learning_rate=0.1)
    assert float(norm) == pytest.approx(np.sqrt(40), rel=1e-5)
    # The first step of Adam is the sign times the rate.
    np.testing.assert_allclose(new["decoder.norm.scale"], 0.9, atol=1e-3)


def test_the_plan():
    config = tiny("llava", learning_rate=1e-2, warmup_steps=100, anneal_share=0.5)
    rates = [plan(config, 200, p).learning_rate for p in (0, 0.5, 0.75, 0.999, 1)]
    np.testing.assert_allclose(rates, [1e-2, 1e-2, 5e-3, 2e-4, 2e-4], rtol=1e-5)
    assert plan(config, 49, 0.0).learning_rate == pytest.approx(5e-3)
    assert plan(config, 0, 0.0).difficulty == EASY
    assert plan(config, 0, 0.2).difficulty == FULL
    middle = plan(config, 0, 0.06).difficulty
    assert EASY.min_size > middle.min_size > FULL.min_size


def test_settings_are_checked():
    wrong: Any = (
        ({"attention": "flash"}, "flash"),
        ({"anneal_share": 1.5}, r"1\.5"),
        ({"batch_size": 0}, "batch_size"),
        ({"sizes": ()}, "at least one"),
        ({"sizes": ((336, 350),)}, "multiples of 28"),
    )
    for changes, message in wrong:
        with pytest.raises(QuotaError, match=message):
            tiny(**changes)
    with pytest.raises(QuotaError, match="336 x 336"):
        tiny("llava", sizes=((224, 224),))


class World:
    """Stand-ins for the programs, and a clock that a step moves on by a second.

    A step adds to one parameter what depends on everything that a step is given.
    """

    def __init__(self, config: TrainingConfig) -> None:
        self.time, self.steps, self.config = 100.0, [], config
        types = len(QUESTION_TYPES)
        quiz = SimpleNamespace(
            text=None, asked=np.ones((1, types), bool), answers=np.zeros((1, types, 2), int)
        )
        self.programs = Programs(
            draw=lambda index, size, difficulty: ((int(index), tuple(size)), None),
            train={size: partial(self._train, size) for size in config.sizes},
            draw_evaluation=lambda index, held_out: (None, quiz),
            answer=lambda params, layout, text, seeing: np.full((1, types), seeing > 0),
        )

    def now(self) -> float:
        return self.time

    def _train(self, size, state, drawn, text, knobs):
        index, shape = drawn
        assert shape == size
        self.time += 1.0
        self.steps.append((index, size, float(knobs.learning_rate)))
        name = "decoder.norm.scale"
        value = state.params[name] * 0.9 + index + size[0] / 100
        moments = state.optimizer._replace(step=state.optimizer.step + 1)
        return TrainState(state.params | {name: value}, moments), np.ones(3, np.float32)

    def trainer(self, saved: Saved | None = None) -> Trainer:
        if saved is None:
            return Trainer(self.config, self.programs)
        return Trainer(
            self.config, self.programs, state=saved.state, steps=saved.steps, curve=saved.curve
        )

    def clock(self, budget: float, saved: Saved | None = None) -> Clock:
        used, trained = (saved.used, saved.trained) if saved else (0.0, 0.0)
        return Clock(
            budget=budget, reserve=10.0, started=self.time - 5, now=self.now,
            used_before=used, trained_before=trained,
        )  # fmt: skip


def test_a_stopped_run_goes_on_as_if_nothing_had_happened(tmp_path):
    config = tiny(learning_rate=1.0)
    names = ("seconds", "step", *QUESTION_TYPES)

    def go(folder, world, budget, saved=None, **limits):
        trainer, clock = world.trainer(saved), world.clock(budget, saved)

        def save():
            state, steps = trainer.state, trainer.steps
            times = {"used": clock.used, "trained": clock.trained}
            save_state(
                folder, config, Saved(state=state, steps=steps, curve=trainer.curve, **times)
            )

        done = trainer.run(clock, log=lambda line: None, save=save, save_seconds=7.0, **limits)
        return done, trainer

    whole = World(config)
    done, reference = go(tmp_path / "whole", whole, 115.0)
    assert done
    assert reference.steps == 100
    assert [size for _, size, _ in whole.steps[:3]] == [(112, 140), (140, 112), (112, 140)]
    rates = [rate for *_, rate in whole.steps]
    assert rates[0] == 1.0
    assert rates[-1] == pytest.approx(0.02 + 0.01, abs=0.02)
    assert [set(point) for point in reference.curve] == [set(names)]

    # Interrupted twice, each process paying five seconds for its start: the budget grows by those.
    folder = tmp_path / "parts"
    first = World(config)
    done, _ = go(folder, first, 125.0, stop_after=45.0)
    assert not done
    saved = load_state(folder, config)
    assert saved is not None
    assert saved.steps == 40
    second = World(config)
    done, _ = go(folder, second, 125.0, load_state(folder, config), max_steps=47)
    assert not done
    # A kill: everything behind the last save is lost, and done again.
    third = World(config)
    done, last = go(folder, third, 125.0, load_state(folder, config))
    assert done
    steps = first.steps + second.steps + third.steps
    assert [s[:2] for s in steps] == [s[:2] for s in whole.steps]
    assert steps[-1][2] == pytest.approx(rates[-1], abs=0.01)
    for name, value in reference.state.params.items():
        np.testing.assert_array_equal(value, last.state.params[name])
    assert int(last.state.optimizer.step) == 100
    files = sorted(path.name for path in folder.iterdir())
    assert files == ["state-00000100.safetensors", INDEX]


def test_saved_runs_are_read_back_or_refused(tmp_path):
    config = tiny()
    assert load_state(tmp_path, config) is None
    state = init_state(config)
    save_state(tmp_path, config, Saved(state=state, steps=3, used=1.5, trained=1.0))
    (tmp_path / "state-00000009.safetensors.partial").write_bytes(b"half")
    saved = load_state(tmp_path, config)
    assert saved is not None
    assert (saved.steps, saved.used, saved.trained, saved.curve) == (3, 1.5, 1.0, [])
    jax.tree.map(np.testing.assert_array_equal, saved.state, state)
    assert load_state(tmp_path, dataclasses.replace(config, attention="cudnn")) is not None
    with pytest.raises(QuotaError, match="seed 0, not 1"):
        load_state(tmp_path, dataclasses.replace(config, seed=1))
    with pytest.raises(QuotaError, match="another model"):
        load_state(tmp_path, tiny("llava", sizes=((336, 336),)))
    index = json.loads((tmp_path / INDEX).read_text())
    tensors = tmp_path / index["tensors"]
    tensors.write_bytes(tensors.read_bytes()[:-100])
    with pytest.raises(QuotaError, match="cannot be read"):
        load_state(tmp_path, config)
    for name in ("../state.safetensors", 7):
        (tmp_path / INDEX).write_text(json.dumps(index | {"tensors": name}))
        with pytest.raises(QuotaError, match="not a file's name"):
            load_state(tmp_path, config)
    (tmp_path / INDEX).write_text("{")
    with pytest.raises(QuotaError, match="cannot be read"):
        load_state(tmp_path, config)


def test_a_broken_loss_stops_the_run(tmp_path):
    world = World(tiny())
    size = world.config.sizes[1]
    world.programs.train[size] = lambda state, *rest: (state, np.array([np.nan, 1, 1]))
    with pytest.raises(FloatingPointError, match="nan"):
        world.trainer().run(world.clock(60.0), log=print, save=lambda: None)


def test_scores():
    types = len(QUESTION_TYPES)
    asked, correct = np.ones((4, types), bool), np.zeros((4, types), bool)
    asked[0, 0], correct[:2, 0], correct[:, 1] = False, True, True
    asked[:, 2] = False
    answers = np.zeros((4, types, 2), int)
    answers[:, 0, 0] = [1, 2, 3, 3]
    scores = accuracy(correct, asked)
    assert scores[QUESTION_TYPES[0]] == pytest.approx(100 / 3)
    assert scores[QUESTION_TYPES[1]] == 100
    assert QUESTION_TYPES[2] not in scores
    assert majority(answers, asked)[QUESTION_TYPES[0]] == pytest.approx(200 / 3)
    assert by_topic({"a/x": 1.0, "a/y": 3.0, "b/x": 5.0}) == {"a": 2.0, "b": 5.0}


def test_flops_against_a_count_by_hand():
    config = TrainingConfig(model=tiny_model("llava"), text_length=22)
    # Two used tower layers of width 32 (feed-forward 64), 576 patches; two decoder layers of width
    # 64 (feed-forward 96), 2 + 576 + 22 tokens; grouped heads there are not.
    tower = 2 * (4 * 32 * 32 + 2 * 32 * 64) + 32 * 588
    decoder = 2 * (4 * 64 * 64 + 3 * 64 * 96)
    linear = tower * 576 + (32 * 64 + 64 * 64) * 576 + decoder * 600 + 2 * 320 * 64 * 22
    scores = 2 * 4 * 576**2 * 32 + 2 * 2 * 600**2 * 64
    expected = 6 * linear + 3.5 * scores
    assert flops.flops_per_picture(config, (336, 336)) == pytest.approx(expected)


def test_the_card_is_made_of_json_files(tmp_path):
    scores = {name: float(i) for i, name in enumerate(QUESTION_TYPES)}
    report = {
        "family": "llava", "parameters": 12_000_000, "decoder_layers": 12, "sizes": [[280, 448]],
        "num_questions": 6, "batch_size": 64, "learning_rate": 1e-3, "anneal_share": 0.35,
        "seed": 0, "steps": 10, "pictures": 640, "train_seconds": 9.0, "process_seconds": 20.0,
        "device": "a device", "jax": "1", "dtype": "float32", "command": "python x",
        "eval_scenes": 5, "seeing": scores, "blind": scores, "majority": scores, "held_out": scores,
    }  # fmt: skip
    (tmp_path / "training.json").write_text(json.dumps(report))
    table = tmp_path / "table.json"
    table.write_text(json.dumps({"title": "Benchmarks", "rows": {"all tokens": {"pope": 91.25}}}))
    card = write_card(tmp_path, [table])
    assert (tmp_path / "README.md").read_text() == card
    for part in (
        "448 x 280",
        "## Benchmarks",
        "| all tokens | 91.2 |",
        f"- {QUESTION_TYPES[0]}:",
        "float32",
    ):
        assert part in card, part
    table.write_text("[]")
    with pytest.raises(QuotaError, match=r"table\.json"):
        write_card(tmp_path, [table])
    (tmp_path / "training.json").write_text("{}")
    with pytest.raises(QuotaError, match=r"training\.json"):
        write_card(tmp_path)


def test_training_starts_from_a_trained_model(tmp_path):
    """The shipped weights, bit for bit, and fresh auxiliary heads."""
    converted = convert(small_qwen_path(), tmp_path / "start")
    start = read_start(small_qwen_path(), converted, SMALL_MODELS["qwen2_5_vl"])
    params = {name: np.asarray(value) for name, value in start.params.items()}
    seen = set()
    for path in small_qwen_path().glob("*.safetensors"):
        with safe_open(path, "np") as file:
            for key in file.keys():  # noqa: SIM118
                if "visual" in key or not key.endswith("down_proj.weight"):
                    continue
                layer = int(key.split("layers.")[-1].split(".")[0])
                stored = file.get_tensor(key).astype(np.float32)
                found = params["decoder.layers.mlp.down.weight"][layer]
                np.testing.assert_array_equal(found, stored)
                seen.add(layer)
    assert seen == set(range(12))
    assert not params["aux.kind.weight"].any()
    assert {value.dtype for value in params.values()} == {np.dtype("float32")}
    assert start.reports[-1]["family"] == "qwen2_5_vl"
    state = init_state(tiny(), start.params)
    for name, value in state.params.items():
        np.testing.assert_array_equal(value, params[name])
    with pytest.raises(QuotaError, match="other sizes"):
        read_start(small_qwen_path(), converted, tiny_model("qwen2_5_vl"))


def test_the_share_of_hints():
    uniforms = np.random.default_rng(0).random((64, 200))
    for share, expected in ((None, 0.118), (0.5, 0.5), (0.0, 0.0)):
        topics, _ = draw_requests(uniforms, np, share)
        hinted = np.isin(topics, [TOPICS.index(name) for name in HINT_TOPICS])
        assert abs(hinted.mean() - expected) < 0.02
    with pytest.raises(QuotaError, match="hint_share"):
        tiny(hint_share=1.0)


@pytest.mark.slow
def test_the_script_trains_and_goes_on(tmp_path, root, monkeypatch, capsys):
    """The real programs, compiled, on a reduced model: 2 steps, then 2 more in a second run."""
    monkeypatch.syspath_prepend(str(root / "examples"))
    script = importlib.import_module("train_small_vlm")
    arguments = ["--family", "qwen2_5_vl", "--tiny", "--out", str(tmp_path)]
    script.main([*arguments, "--steps", "2"])
    report = script.main([*arguments, "--steps", "4", "--resume"])
    assert "goes on at step 2" in capsys.readouterr().out
    assert report["steps"] == 4
    assert set(QUESTION_TYPES) >= set(report["seeing"]) == set(report["blind"])
    assert len(report["seeing"]) > 30
    model = tmp_path / "model"
    assert json.loads((model / "training.json").read_text())["pictures"] == 8
    assert "| seeing |" in (model / "README.md").read_text()
    with pytest.raises(QuotaError, match="seed"):
        script.main([*arguments, "--seed", "1"])
    sys.modules.pop("train_small_vlm")
