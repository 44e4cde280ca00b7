"""The peers inside the static programs of LLaVA and Qwen2.5-VL, against a slow numpy decoder."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slow_peers import (
    slow_floor,
    slow_mmtok,
    slow_qapruner,
    slow_sqap,
    slow_visionzip,
    softmax,
)
from test_pruning import CONFIG, assert_greedy, make_batch

import quota_jax as qj
from quota_jax.batch import Batch, Patches
from quota_jax.config import QwenVisionConfig, QwenVlConfig
from quota_jax.errors import QuotaError
from quota_jax.models.params import build_model, flatten_params, init_params
from quota_jax.prune.options import MmtokOptions, QaprunerOptions, SqapOptions, VisionZipOptions
from quota_jax.prune.vtw import find_withdrawal, withdrawal_recipe
from quota_jax.recipe import Recipe, Selector, Stage

TEXT = dataclasses.replace(CONFIG.text, num_layers=2)
LLAVA = dataclasses.replace(CONFIG, text=TEXT)
QWEN = QwenVlConfig(
    vision=QwenVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_layers=2,
        num_heads=2,
        full_attention_layers=(0, 1),
    ),
    text=dataclasses.replace(TEXT, mrope_section=(2, 3, 3), attention_bias=True),
    image_token_id=60,
    video_token_id=59,
    vision_start_token_id=58,
    vision_end_token_id=57,
)
GRIDS = [[(2, 3), (1, 4)], [(3, 2)], []]
"""Visual tokens (rows, columns) of the pictures of three Qwen2.5-VL prompts."""


def qwen_batch() -> Batch:
    """Text around and between the pictures, positions as Qwen2.5-VL lays them out."""
    rng = np.random.default_rng(5)
    width, slot = 8 + 12, 0
    tokens, index = np.zeros((3, width), np.int32), np.full((3, width), -1, np.int32)
    positions, lengths = np.zeros((3, width, 3), np.int32), []
    coordinates, counts = np.zeros((4, 24, 2), np.int32), np.zeros(4, np.int32)
    for b, pictures in enumerate(GRIDS):
        place = step = 0
        for grid in [*pictures, (0, 0)]:
            for _ in range(2 if any(grid) else 3 - b % 2):
                tokens[b, place], positions[b, place] = rng.integers(1, 57), step
                place, step = place + 1, step + 1
            for i in range(grid[0] * grid[1]):
                row, column = divmod(i, grid[1])
                tokens[b, place], index[b, place] = 60, slot * 6 + i
                positions[b, place] = step, step + row, step + column
                coordinates[slot, 4 * i : 4 * i + 4] = [
                    [2 * row + j, 2 * column + k] for j in (0, 1) for k in (0, 1)
                ]
                place += 1
            if any(grid):
                counts[slot], slot, step = 4 * grid[0] * grid[1], slot + 1, step + max(grid)
        lengths.append(place)
    patches = Patches(
        values=jnp.asarray(rng.standard_normal((4, 24, 3 * 2 * 14 * 14)), jnp.float32),
        coordinates=jnp.asarray(coordinates),
        lengths=jnp.asarray(counts),
        window_starts=jnp.zeros((4, 1), jnp.int32),
        window_lengths=jnp.asarray(counts[:, None]),
        window_slots=jnp.zeros((4, 24), jnp.int32),
    )
    return Batch(
        tokens=jnp.asarray(tokens),
        lengths=jnp.asarray(lengths),
        visual_index=jnp.asarray(index),
        positions=jnp.asarray(positions),
        pixels=patches,
        text_bucket=8,
        visual_bucket=12,
    )


@functools.partial(jax.jit, static_argnames="recipe")
def run(model, batch, recipe):
    """Logits at the last token, and input places after each layer's cache and in the end."""
    x, sequence, vision = model.decoder_input(batch, recipe.canonical())
    x, final, caches = model.decoder.prefill(x, sequence, recipe.canonical(), vision)
    last = jnp.maximum(final.lengths - 1, 0)[:, None, None]
    logits = model.decoder.logits(jnp.take_along_axis(x, last, axis=1)[:, 0])
    sequences = [*(cache.sequence for cache in caches), final]
    return logits, [(s.source, s.lengths, s.positions) for s in sequences]


@jax.jit
def embed(model, batch):
    """Decoder inputs; one program instead of one for each of its operations."""
    return model.embed(batch, model.visual_features(batch.pixels))


@functools.partial(jax.jit, static_argnames="layer")
def vision_states(model, pixels, layer):
    return model.vision(pixels, (layer,))


def places(stored, b):
    source, lengths, _ = stored
    return np.asarray(source)[b, : int(lengths[b])].tolist()


class SlowDecoder:
    """One sample through the decoder in float64, tokens removed by hand."""

    def __init__(self, model):
        self.text = model.config.text
        self.params = {
            name.removeprefix("decoder."): np.asarray(value, np.float64)
            for name, value in flatten_params(model).items()
            if name.startswith("decoder.")
        }

    def norm(self, x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + self.text.rms_norm_eps) * scale

    def rotate(self, x, positions):
        half = self.text.head_dim // 2
        step = self.text.rope_theta ** (-np.arange(half) / half)
        if self.text.mrope_section is None:
            angle = positions[:, None] * step
        else:
            angle = positions[:, np.repeat(np.arange(3), self.text.mrope_section)] * step
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        a, b = x[..., :half], x[..., half:]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    def attention(self, x, positions, layer):
        """The sublayer's output and its weights, mean over heads."""
        text, get = self.text, lambda name: self.params[f"layers.{name}"][layer]
        y = self.norm(x, get("norm1.scale")) @ get("attn.qkv.weight").T
        if "layers.attn.qkv.bias" in self.params:
            y = y + get("attn.qkv.bias")
        heads = y.reshape(len(x), -1, text.head_dim)
        q, k, v = np.split(heads, [text.num_heads, text.num_heads + text.num_kv_heads], axis=1)
        group = text.num_heads // text.num_kv_heads
        q, k = self.rotate(q, positions), self.rotate(k, positions)
        k, v = np.repeat(k, group, 1), np.repeat(v, group, 1)
        scores = np.einsum("tnh,snh->nts", q, k) * text.head_dim**-0.5
        weights = softmax(np.where(np.tri(len(x), dtype=bool), scores, -np.inf))
        out = np.einsum("nts,snh->tnh", weights, v).reshape(len(x), -1)
        return out @ get("attn.o.weight").T, weights.mean(0)

    def feed_forward(self, x, layer):
        get = lambda name: self.params[f"layers.{name}"][layer]  # noqa: E731
        gate, up = np.split(self.norm(x, get("norm2.scale")) @ get("mlp.gate_up.weight").T, 2, -1)
        return (gate / (1 + np.exp(-gate)) * up) @ get("mlp.down.weight").T

    def __call__(self, x, positions, choose):
        """Logits of the tokens left; ``choose(layer, x, weights)``: indices of those that stay
        after its attention."""
        for layer in range(self.text.num_layers):
            out, weights = self.attention(x, positions, layer)
            left = choose(layer, x, weights)
            x, positions = (x + out)[left], positions[left]
            x = x + self.feed_forward(x, layer)
        return self.norm(x, self.params["norm.scale"]) @ self.params["head.weight"].T


def inter_attention(weights, visual):
    """Mean attention that each visual token gets from the text after it."""
    text = np.flatnonzero(~visual)
    later = {i: text[text > i] for i in np.flatnonzero(visual)}
    return np.array([weights[t, i].mean() if len(t) else 0.0 for i, t in later.items()])


STAGED = Recipe(
    num_layers=2,
    stages=(
        Stage(
            layer=0,
            keep=0.8,
            point="input",
            selector=Selector(
                name="mmtok", options=MmtokOptions(text_temperature=0.2, vision_temperature=0.3)
            ),
        ),
        Stage(
            layer=0,
            keep=0.55,
            selector=Selector(name="sqap", options=SqapOptions(preserved=0.4)),
            trim_own_cache=False,
        ),
        Stage(
            layer=1,
            keep=0.3,
            selector=Selector(
                name="qapruner",
                options=QaprunerOptions(alpha=0.6, group_size=8, prior="text_attention"),
            ),
            trim_own_cache=False,
            min_keep_per_image=2,
        ),
    ),
)


def llava_places(batch):
    """Picture, row and column of each visual token; 5 x 5 in a picture."""
    index = np.asarray(batch.visual_index)
    return np.stack([index // 25, index % 25 // 5, index % 5], -1)


def qwen_places(batch):
    index = np.asarray(batch.visual_index)
    flat = [grid for pictures in GRIDS for grid in pictures]
    found = np.zeros((*index.shape, 3), int)
    for at in np.argwhere(index >= 0):
        slot, i = divmod(int(index[tuple(at)]), 6)
        found[tuple(at)] = slot, *divmod(i, flat[slot][1])
    return found


CASES = {
    "llava": (LLAVA, lambda: make_batch([9, 20, 5], [1, 2, 0]), llava_places),
    "qwen": (QWEN, qwen_batch, qwen_places),
}


@pytest.mark.parametrize("name", ["llava", pytest.param("qwen", marks=pytest.mark.slow)])
def test_stages_of_peers_equal_a_decoder_that_removes_tokens_by_hand(name):
    config, make, places_of = CASES[name]
    model: Any = build_model(config, None, init_params(config, jax.random.key(0)))
    batch = make()
    logits, stored = run(model, batch, STAGED)
    embedded = np.asarray(embed(model, batch), np.float64)
    tower = np.asarray(jax.jit(lambda model: model.tower_states(batch.pixels))(model))
    slow = SlowDecoder(model)
    for b in range(3):
        length = int(batch.lengths[b])
        visual, grid = np.asarray(batch.is_visual)[b, :length], places_of(batch)[b, :length]
        index, n = np.asarray(batch.visual_index)[b, :length], int(visual.sum())
        budget = [int(np.ceil(keep * n - 1e-9)) for keep in (0.8, 0.55, 0.3)]
        x = embedded[b, :length]
        rows = tower.reshape(-1, tower.shape[-1] * (1 if name == "llava" else 4))[index[visual]]
        first = slow_mmtok(x[~visual], x[visual], rows, budget[0], 0.5, (0.2, 0.3))
        left = np.flatnonzero(~visual | np.isin(np.arange(length), np.flatnonzero(visual)[first]))
        assert places(stored[0], b) == left.tolist()

        kept = [left]
        choose = functools.partial(by_hand, kept, visual, grid, budget)
        expected = slow(x[left], np.asarray(batch.positions)[b, left], choose)[-1]
        np.testing.assert_allclose(logits[b], expected, atol=2e-5 * np.abs(expected).max())
        for layer in (0, 1):
            assert places(stored[layer + 1], b) == kept[layer + 1].tolist()
        pictures = set(grid[visual, 0].tolist())  # the floor: none of them is lost
        assert {int(p) for p in grid[kept[-1], 0][visual[kept[-1]]]} == pictures


def by_hand(kept, visual, grid, budget, layer, x, weights):
    """Which of a sample's tokens stay after the attention of a layer; adds their places."""
    here = kept[-1]
    mine = visual[here]
    attention, picture = inter_attention(weights, mine), grid[here][mine].tolist()
    if layer == 0:
        picked = slow_sqap(attention, picture, budget[1], 0.4)
    else:
        scores = slow_qapruner(x[mine], attention, 0.6, 8) if mine.any() else attention
        picked = slow_floor(scores, [p for p, _, _ in picture], budget[2], 2)
    stays = np.concatenate([np.flatnonzero(~mine), np.flatnonzero(mine)[picked]])
    stays = np.sort(stays.astype(int))
    kept.append(here[stays])
    return stays


def class_attention(model, x):
    """Of each picture: attention of the class token, summed over heads, and mean keys."""
    params = {
        name.removeprefix("vision.layers."): np.asarray(value, np.float64)[0]
        for name, value in flatten_params(model).items()
        if name.startswith("vision.layers.")
    }
    config, x = model.config.vision, np.asarray(x, np.float64)
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + config.layer_norm_eps)
    x = x * params["norm1.scale"] + params["norm1.bias"]
    qkv = x @ params["attn.qkv.weight"].T + params["attn.qkv.bias"]
    q, k, _ = np.split(qkv.reshape(*x.shape[:2], 3, config.num_heads, -1), 3, axis=2)
    q, k = q[:, :, 0], k[:, :, 0]
    scores = np.einsum("pnh,psnh->pns", q[:, 0], k) * config.head_dim**-0.5
    return softmax(scores).sum(1), k.mean(2)


@pytest.mark.parametrize("strategy", ["default", "full"])
def test_visionzip_equals_a_sequence_rebuilt_by_hand(strategy, monkeypatch):
    per = 25 + (strategy == "full")
    monkeypatch.setattr("test_pruning.PATCHES", per)
    config = dataclasses.replace(LLAVA, vision_feature_select_strategy=strategy)
    model: Any = build_model(config, None, init_params(config, jax.random.key(1)))
    selector = Selector(name="visionzip", options=VisionZipOptions(contextual=0.3))
    first = Stage(layer=0, keep=0.3, point="input", selector=selector)
    recipe = Recipe(num_layers=2, stages=(first,), positions="renumber")
    batch = make_batch([9, 20, 5], [1, 2, 0])
    logits, stored = run(model, batch, recipe)
    steps = 16 if strategy == "default" else 1
    generated = np.asarray(logits).argmax(-1)[:, None]
    if steps > 1:
        generated = qj.generate(model, batch, recipe=recipe, max_new_tokens=steps).tokens
    entry, states = (np.asarray(vision_states(model, batch.pixels, i)) for i in (0, 1))
    attention, keys = class_attention(model, entry)
    # 25 or 26 and 50 or 52 tokens at .3, two pictures share theirs: the second takes the odd one.
    shares = [[8], [7, 8] if strategy == "default" else [8, 8], []]
    embedded = np.asarray(embed(model, batch), np.float64)
    picture, slow = 0, SlowDecoder(model)
    for b, budgets in enumerate(shares):
        length, images = int(batch.lengths[b]), len(budgets)
        tokens, source = [*embedded[b, :2]], [0, 1]
        for i, budget in enumerate(budgets):
            one = states[picture], attention[picture], keys[picture]
            new, behind = slow_visionzip(*one, budget, 0.3)
            projected = model.project(jnp.asarray(new, jnp.float32)[None])
            tokens += [*np.asarray(projected, np.float64)]
            start = 2 + i * per
            source += [start + p - (strategy == "default") if p else start for p in behind]
            if strategy == "default":
                source[-budget] = -1  # the class token was none of the visual tokens
            picture += 1
        tokens += [*embedded[b, 2 + images * per : length]]
        source += list(range(2 + images * per, length))
        assert places(stored[-1], b) == source
        count = len(tokens)
        np.testing.assert_array_equal(np.asarray(stored[-1][2])[b, :count], np.arange(count))
        tokens += [*np.asarray(model.decoder.embed.weight[...])[generated[b, :-1]]]
        everything = np.arange(count + steps - 1)
        expected = slow(np.stack(tokens), everything, lambda *_, all=everything: all)[count - 1 :]
        np.testing.assert_allclose(logits[b], expected[0], atol=2e-5 * np.abs(expected[0]).max())
        assert_greedy(expected, generated[b])
    if strategy == "default":
        alone = dataclasses.replace(
            batch,
            pixels=batch.pixels[1:3],
            **{name: getattr(batch, name)[1:2] for name in ("tokens", "lengths", "positions")},
            visual_index=jnp.where(batch.is_visual, batch.visual_index - per, -1)[1:2],
        )
        np.testing.assert_array_equal(run(model, alone, recipe)[0][0], logits[1])


def test_what_a_recipe_needs_and_does_not_find_is_named():
    model: Any = build_model(QWEN, None, init_params(QWEN, jax.random.key(0)))
    first = Stage(layer=0, keep=0.3, point="input", selector=Selector(name="visionzip"))
    zipped = Recipe(num_layers=2, stages=(first,), positions="renumber")
    with pytest.raises(QuotaError, match=r"'visionzip' needs .* class token: qwen2_5_vl has none"):
        model.decoder_input(qwen_batch(), zipped)


@pytest.mark.slow
def test_the_withdrawal_layer_comes_from_the_models_own_divergences():
    model: Any = build_model(LLAVA, None, init_params(LLAVA, jax.random.key(0)))
    batches = [make_batch([9, 20, 5], [1, 2, 0], seed=seed) for seed in (0, 1)]
    expected = np.zeros(2)
    for batch in batches:
        full = np.asarray(qj.prefill(model, batch)[0], np.float64)
        for layer in range(2):
            recipe = withdrawal_recipe(2, layer)
            gone = np.asarray(qj.prefill(model, batch, recipe=recipe)[0], np.float64)
            p, q = softmax(full), softmax(gone)
            expected[layer] += (p * np.log(p / q))[:2].sum() / 4  # the third has no picture
    assert expected[0] > 0 < expected[1]
    search = functools.partial(find_withdrawal, model, batches, start=0)
    found = search(eta=float(expected.max()) * 1.01)
    np.testing.assert_allclose(found.divergences, expected, rtol=1e-3)
    assert (found.layer, found.recipe) == (0, withdrawal_recipe(2, 0))
    last = find_withdrawal(model, batches, eta=float(expected[1]) * 1.01)
    assert (last.layer, last.layers) == (1, (1,))
    with pytest.raises(QuotaError, match=r"no layer of \[0, 1\] has mean KL <= 0.0"):
        search(eta=0.0)
    with pytest.raises(QuotaError, match=r"start must be a layer .* got 2"):
        find_withdrawal(model, batches, start=2)
    with pytest.raises(QuotaError, match="no sample with a picture"):
        find_withdrawal(model, [])
