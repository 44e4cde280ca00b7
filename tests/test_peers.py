"""MMTok, QAPruner, SQAP, VisionZip, per-picture floors and budgets against slow numpy versions."""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slow_peers import slow_floor, slow_mmtok, slow_qapruner, slow_sqap, slow_visionzip

from quota_jax.config import PRESETS
from quota_jax.errors import QuotaError
from quota_jax.flops import paper_flops
from quota_jax.prune.mmtok import mmtok_ranks
from quota_jax.prune.options import MmtokOptions, QaprunerOptions, SqapOptions, VisionZipOptions
from quota_jax.prune.presets import PEERS, Protocol, candidates, llm_flops_ratio, peer_recipe
from quota_jax.prune.qapruner import qapruner_score, relevance
from quota_jax.prune.select import Sequence, keep_mask, picture_shares
from quota_jax.prune.sqap import sqap_ranks
from quota_jax.prune.visionzip import contextual_count, visionzip
from quota_jax.recipe import Recipe, Selector, Stage

LENGTH = 80
MASKS = np.zeros((5, LENGTH), bool)
MASKS[0, 3:33] = MASKS[1, [1, 2, 5, 6, 7, 20]] = MASKS[2, 9] = MASKS[4, 2:36] = True  # 3: none
TEXTS = ~MASKS & (np.arange(LENGTH) < [[40], [30], [20], [25], [36]])
TEXTS[4] = False  # pictures alone


mmtok: Any = jax.jit(mmtok_ranks, static_argnames=("count", "options"))


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def picked(ranks, count):
    order = np.argsort(ranks, kind="stable")
    return [int(i) for i in order if ranks[i] < len(ranks)][:count]


def alone(function, *arrays, cut=40):
    """What each sample is by itself, with less padding, and what it is in the batch."""
    whole = np.asarray(function(*arrays))
    for b in range(5):
        one = np.asarray(function(*(array[b : b + 1, :cut] for array in arrays)))[0]
        mask = MASKS[b, :cut]
        yield one[mask], whole[b, :cut][mask]


@pytest.mark.parametrize("count", [7, 60])
def test_mmtok_equals_greedy_maximum_coverage(count):
    hidden, vision = normal(5, LENGTH, 24), normal(5, LENGTH, 10, seed=1)
    # Doubles in both spaces are ties; text and padding must not count as pictures.
    hidden[0, 20:24], vision[0, 20:24] = hidden[0, 4:8], vision[0, 4:8]
    vision[~MASKS] = 1e3
    options = MmtokOptions(alpha=0.7, text_temperature=0.1, vision_temperature=0.3)
    arrays = [jnp.asarray(array) for array in (hidden, vision, MASKS, TEXTS)]
    ranks = np.asarray(mmtok(*arrays, count=count, options=options))
    for b, mask in enumerate(MASKS):
        places = np.flatnonzero(mask)
        slow = slow_mmtok(
            hidden[b, TEXTS[b]], hidden[b, mask], vision[b, mask], count, 0.7, (0.1, 0.3)
        )
        assert picked(ranks[b], count) == [int(places[i]) for i in slow]
        assert (ranks[b][~mask] == LENGTH).all()


def test_neither_padding_nor_neighbors_change_a_selection():
    hidden, vision = normal(5, LENGTH, 24), normal(5, LENGTH, 10, seed=1)
    arrays = [jnp.asarray(array) for array in (hidden, vision, MASKS, TEXTS)]
    pick = functools.partial(mmtok, count=12, options=MmtokOptions())
    for one, whole in alone(pick, *arrays):
        assert picked(one, 12) == picked(whole, 12)
    scores: Any = jax.jit(
        lambda x, visual, text: qapruner_score(
            x, relevance(x, text), visual, alpha=0.5, group_size=16
        )
    )
    for one, whole in alone(scores, arrays[0], *arrays[2:]):
        np.testing.assert_array_equal(one, whole)


def test_qapruner_by_its_formulas():
    x = normal(5, LENGTH, 40) * np.exp(normal(5, LENGTH, 1, seed=1))
    x[0, 5] = 0.0
    prior = normal(5, LENGTH, seed=2)
    arrays = [jnp.asarray(array) for array in (x, prior, MASKS)]
    run: Any = jax.jit(qapruner_score, static_argnames=("alpha", "group_size"))
    for alpha, group in ((0.3, 16), (0.0, 128)):  # 40 values: a shorter last group, one group
        found = np.asarray(run(*arrays, alpha=alpha, group_size=group))
        for b, mask in enumerate(MASKS):
            if mask.any():
                slow = slow_qapruner(x[b, mask], prior[b, mask], alpha, group)
                np.testing.assert_allclose(found[b, mask], slow, atol=2e-6)
        assert np.isfinite(found).all()
    # Largest magnitude 7 in each group: .25 and -.5 (to even: 0) are rounded off; range 7 - -.5.
    row = jnp.asarray([[[7.0, 0.25, 7.0, -0.5], [7.0, 1.0, 7.0, 2.0], [0.0, 0.0, 0.0, 0.0]]])
    found = run(row, jnp.zeros((1, 3)), jnp.ones((1, 3), bool), alpha=0.0, group_size=2)
    np.testing.assert_allclose(found[0], [1.0, (6 / 7.5) / 2, 0.0], rtol=1e-6)


def test_relevance_is_the_mean_cosine_to_the_text():
    x = normal(5, LENGTH, 24)
    found = np.asarray(relevance(jnp.asarray(x), jnp.asarray(TEXTS)))
    unit = x / np.linalg.norm(x, axis=-1, keepdims=True)
    for b in range(4):
        np.testing.assert_allclose(found[b], (unit[b] @ unit[b, TEXTS[b]].T).mean(1), atol=1e-6)
    np.testing.assert_array_equal(found[4], 0)


def grids():
    """Sample 0: two pictures of 5 x 3, sample 1: 2 x 2 and one row of two; 4: one of 34."""
    grid = np.zeros((5, LENGTH, 3), np.int32)
    for i, place in enumerate(np.flatnonzero(MASKS[0])):
        grid[0, place] = i // 15, 7 + i % 15 // 3, 7 + i % 3  # starts differ, as rotary positions
    grid[1, MASKS[1]] = [[2, 0, 0], [2, 0, 1], [2, 1, 0], [2, 1, 1], [3, 0, 0], [3, 0, 1]]
    grid[2, MASKS[2]] = [4, 0, 0]
    grid[4, MASKS[4]] = [[5, i // 6, i % 6] for i in range(34)]
    return grid


def test_sqap_preserves_attention_then_spreads_over_the_pictures():
    attention, grid = np.abs(normal(5, LENGTH)), grids()
    attention[0, 10:14] = attention[0, 9]
    run: Any = jax.jit(sqap_ranks, static_argnames=("count", "preserved"))
    for preserved in (0.0, 0.3, 1.0):
        target = np.array([9, 4, 1, 0, 20])
        ranks = np.asarray(run(attention, grid, MASKS, target, count=20, preserved=preserved))
        for b, mask in enumerate(MASKS):
            places = np.flatnonzero(mask)
            slow = slow_sqap(attention[b, mask], grid[b, mask].tolist(), target[b], preserved)
            assert picked(ranks[b], target[b]) == [int(places[i]) for i in slow]
    # Two opposite corners of a 3 x 3 picture, then the other two, then the middle.
    board = np.array([[[0, i // 3, i % 3] for i in range(9)]])
    ranks = sqap_ranks(
        jnp.zeros((1, 9)),
        jnp.asarray(board),
        jnp.ones((1, 9), bool),
        jnp.asarray([5]),
        5,
        preserved=0.2,
    )
    np.testing.assert_array_equal(ranks, [[0, 9, 2, 9, 4, 9, 3, 9, 1]])


def sequence(masks, texts, grid):
    size, length = masks.shape
    return Sequence(
        lengths=jnp.asarray((masks | texts).sum(1)),
        positions=jnp.zeros((size, length), jnp.int32),
        next_position=jnp.zeros(size, jnp.int32),
        is_visual=jnp.asarray(masks),
        visual_count=jnp.asarray(masks.sum(1)),
        source=jnp.zeros((size, length), jnp.int32),
        grid=jnp.asarray(grid),
        text_bucket=30,
        visual_bucket=34,
        original_bucket=34,
    )


def test_every_picture_keeps_its_share_of_the_budget():
    rng = np.random.default_rng(0)
    for seed in range(6):
        # Up to five pictures in a sample, some pruned before: scattered, of any size.
        masks = rng.random((4, LENGTH)) < 0.6
        masks[3] = False
        grid = np.zeros((4, LENGTH, 3), np.int32)
        grid[..., 0] = np.sort(rng.integers(0, 1 + seed, (4, LENGTH)), axis=1)
        scores = rng.integers(0, 12, (4, LENGTH)).astype(np.float32)  # many ties
        target = np.array([3, 12, 25, 0])  # the first below images * m, the third nearly all
        for least in (0, 1, 4, 50):
            found = keep_mask(
                sequence(masks, np.zeros_like(masks), grid),
                jnp.asarray(scores),
                jnp.asarray(target),
                least,
            )
            for b in range(4):
                places = np.flatnonzero(masks[b])
                slow = slow_floor(scores[b, places], grid[b, places, 0], target[b], least)
                kept = np.flatnonzero(np.asarray(found)[b] & masks[b])
                np.testing.assert_array_equal(kept, places[slow])
    # By hand: picture 1 has the best tokens, picture 0 gets its two all the same.
    grid = np.array([[[0, 0, 0]] * 3 + [[1, 0, 0]] * 3])
    whole = sequence(np.ones((1, 6), bool), np.zeros((1, 6), bool), grid)
    for least, kept in ((0, [3, 4, 5]), (1, [2, 4, 5]), (2, [2, 4, 5]), (3, [2, 4, 5])):
        scores, target = jnp.asarray([[0.0, 1, 2, 7, 8, 9]]), jnp.asarray([3])
        np.testing.assert_array_equal(np.flatnonzero(keep_mask(whole, scores, target, least)), kept)
    four = keep_mask(whole, jnp.asarray([[0.0, 1, 2, 7, 8, 9]]), jnp.asarray([4]), 2)
    np.testing.assert_array_equal(np.flatnonzero(four), [1, 2, 4, 5])


def test_shares_of_the_pictures_add_up_to_the_budget():
    place, share = picture_shares(sequence(MASKS, TEXTS, grids()), jnp.asarray([7, 5, 1, 0, 20]))
    first = np.asarray(share)[MASKS & (np.asarray(place) == 0)]
    np.testing.assert_array_equal(first, [3, 4, 2, 3, 1, 20])
    np.testing.assert_array_equal(np.asarray(place)[0, MASKS[0]], [*range(15), *range(15)])


@pytest.mark.parametrize("contextual", [0.0, 10 / 64, 0.6])
def test_visionzip_merges_as_the_slow_version(contextual):
    states, attention, keys = normal(6, 26, 8), normal(6, 26, seed=1), normal(6, 26, 4, seed=2)
    attention[1, 5:9] = attention[1, 4]
    keys[2, 10:20] = keys[2, 3]  # equally similar targets
    keys[3] = 0.0
    budget = np.array([13, 6, 20, 1, 0, 25])
    options = VisionZipOptions(contextual=contextual)
    arrays = [jnp.asarray(array) for array in (states, attention, keys, budget)]
    run: Any = jax.jit(visionzip, static_argnames=("limit", "options"))
    fixed = {"limit": 25, "options": options}
    found, behind = (np.asarray(part) for part in run(*arrays, **fixed))
    for b, count in enumerate(budget):
        slow, places = slow_visionzip(states[b], attention[b], keys[b], count, contextual)
        np.testing.assert_allclose(found[b, :count], slow, atol=1e-5)
        np.testing.assert_array_equal(behind[b, :count], places)
    one, _ = run(*(array[2:3] for array in arrays), **fixed)
    np.testing.assert_array_equal(one[0, :20], found[2, :20])


def test_visionzip_has_the_published_counts():
    options = VisionZipOptions()
    assert [contextual_count(k, options) for k in (0, 1, 64, 128, 192)] == [0, 0, 10, 20, 30]


def test_a_reference_budget_counts_the_stored_tokens():
    stages = tuple(Stage(layer=i, keep=r) for i, r in enumerate((0.7, 0.3)))
    literal = Recipe(num_layers=2, stages=stages, budget="reference", reference_tokens=576)
    sample = Recipe(num_layers=2, stages=stages)
    for stage in stages:
        assert literal.target(576, stage.keep) == sample.target(576, stage.keep)
    assert [literal.target(n, 0.3) for n in (0, 100, 173, 174, 1152)] == [0, 100, 173, 173, 173]
    assert sample.target(1152, 0.3) == 346
    assert literal.tokens_per_layer(1152) == (1152, 404)
    nothing = Recipe(
        num_layers=2, stages=(Stage(layer=0, keep=1.0),), budget="reference", reference_tokens=9
    )
    assert nothing.canonical() == Recipe.none(2)


def test_new_fields_survive_json_and_old_files_still_load():
    selectors = [
        Selector(name="mmtok", options=MmtokOptions(alpha=0.25)),
        Selector(name="visionzip"),
        Selector(name="qapruner", options=QaprunerOptions(group_size=64)),
    ]
    for selector in selectors:
        recipe = Recipe(
            num_layers=3,
            stages=(
                Stage(layer=0, keep=0.6, point="input", selector=selector),
                Stage(layer=1, keep=0.3, selector=Selector(name="sqap")),
                Stage(layer=2, keep=0.2, min_keep_per_image=4),
            ),
            positions="renumber",
            budget="reference",
            reference_tokens=64,
        )
        again = Recipe.from_json(json.loads(json.dumps(recipe.to_json())))
        assert again == recipe
        assert hash(again) == hash(recipe)
    assert Selector(name="sqap") == Selector(name="sqap", options=SqapOptions())
    old = {
        "num_layers": 4,
        "stages": [
            {
                "layer": 1,
                "keep": 0.5,
                "point": "after_attention",
                "selector": {"name": "fastv", "seed": 0, "redistribute": False},
                "trim_own_cache": False,
            }
        ],
        "positions": "keep",
    }
    stage = Stage(layer=1, keep=0.5, selector=Selector(name="fastv"), trim_own_cache=False)
    assert Recipe.from_json(old) == Recipe(num_layers=4, stages=(stage,))


def stage(selector: Any, **fields: Any) -> Any:
    return lambda: Recipe.from_json(
        {"num_layers": 4, "stages": [{"layer": 0, "keep": 0.5, "selector": selector, **fields}]}
    )


LLAVA, QWEN = PRESETS["llava_1_5_7b"], PRESETS["qwen2_5_vl_7b"]


def with_layers(count: int) -> Any:
    return dataclasses.replace(LLAVA, text=dataclasses.replace(LLAVA.text, num_layers=count))


SHALLOW = with_layers(2)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (stage({"name": "mmtok", "options": {"beta": 1}}, point="input"), "'mmtok': unknown field"),
        (stage({"name": "mmtok", "options": {"alpha": -1}}, point="input"), "alpha .* got -1"),
        (stage({"name": "fastv", "options": {"alpha": 1}}), "'fastv' has no options"),
        (stage({"name": "qapruner", "options": {"prior": "x"}}, point="input"), "prior 'x'"),
        (stage({"name": "qapruner", "options": {"group_size": 0}}), "group_size must be positive"),
        (stage("qapruner"), "'qapruner' cannot stand at 'after_attention'"),
        (stage("mmtok"), "'mmtok' cannot stand at 'after_attention'"),
        (stage("visionzip", point="input"), "positions 'renumber', got 'keep'"),
        (stage("random", min_keep_per_image=-1), "non-negative integer, got -1"),
        (stage("sqap", min_keep_per_image=1), "not for 'sqap'"),
        (lambda: Recipe(num_layers=2, budget="all"), "budget 'all' is unknown"),
        (lambda: Recipe(num_layers=2, budget="reference"), "needs reference_tokens .* got None"),
        (lambda: Recipe(num_layers=2, reference_tokens=9), "belong to budget 'reference'"),
        (lambda: peer_recipe("magic", LLAVA, keep=0.5), "unknown peer 'magic'; known: quota"),
        (lambda: peer_recipe("fastv", LLAVA), "'fastv' needs keep or target_flops_ratio"),
        (lambda: peer_recipe("vtw", LLAVA, keep=0.5), "vtw drops every visual token"),
        (lambda: peer_recipe("visionzip", QWEN, keep=0.5), "qwen2_5_vl has none"),
        (lambda: peer_recipe("mmtok", QWEN, keep=0.5, layers=(1,)), "it takes no layers"),
        (lambda: peer_recipe("pyramid_drop", SHALLOW, keep=0.5), "has only 2 layers"),
        (lambda: candidates(with_layers(1)), "has only 1 layers"),
        (
            lambda: peer_recipe("quota", QWEN, target_flops_ratio=0.1),
            r"quota cannot cost 0.1 of the unpruned model: the least is 0.33",
        ),
    ],
)
def test_bad_recipes_are_named(call: Any, words: str):
    with pytest.raises(QuotaError, match=words):
        call()


@pytest.mark.parametrize("config", [LLAVA, QWEN], ids=["llava", "qwen"])
def test_every_peer_costs_what_quota_costs(config):
    protocol = Protocol(visual_tokens=576)
    for rho in (0.5, 0.4, 0.3, 0.2, 0.1, 0.05):
        quota = peer_recipe("quota", config, keep=rho, protocol=protocol)
        wanted = llm_flops_ratio(config, quota, protocol=protocol)
        for name in PEERS:
            if name == "visionzip" and config is QWEN:
                continue
            recipe = peer_recipe(name, config, target_flops_ratio=wanted, protocol=protocol)
            exit_counted = "exit" if name in ("fastv", "sqap") else "entry"
            found = llm_flops_ratio(config, recipe, counted=exit_counted, protocol=protocol)
            # Within a token of all layers, or a layer of all tokens.
            step = 0.5 / config.text.num_layers if name == "vtw" else 0.5 / 576
            assert abs(found - wanted) <= 1.1 * step, (name, rho)
            assert {s.selector.name for s in recipe.stages} == {"stride" if name == "vtw" else name}


def test_published_settings_and_their_formulas():
    fastv = peer_recipe("fastv", LLAVA, keep=0.5)
    d, m, depth, n = 4096, 11008, 32, 576 + 25

    def layer(tokens):
        return 4 * tokens * d * d + 2 * tokens * tokens * d + 3 * tokens * d * m

    expected = (2 * layer(n) + (depth - 2) * layer(288 + 25)) / (depth * layer(n))
    assert llm_flops_ratio(LLAVA, fastv, counted="exit") == pytest.approx(expected, rel=1e-12)
    assert (fastv.stages[0].layer, fastv.stages[0].trim_own_cache) == (1, False)

    pyramid = peer_recipe("pyramid_drop", LLAVA, keep=0.125)
    assert [s.layer for s in pyramid.stages] == [8, 16, 24]
    assert np.mean(pyramid.tokens_per_layer(576)) == 270
    cost = paper_flops(LLAVA.text, pyramid, visual_tokens=576, text_tokens=0)
    assert cost.total / 1e12 == pytest.approx(1.777, abs=1e-3)
    assert pyramid.positions == "renumber"

    vtw = peer_recipe("vtw", LLAVA)
    assert vtw.tokens_per_layer(576) == (576,) * 15 + (0,) * 17
    for name in ("div_prune", "mmtok", "visionzip", "qapruner"):
        recipe = peer_recipe(name, LLAVA, keep=64 / 576)
        assert recipe.tokens_per_layer(576) == (64,) * 32
        assert recipe.positions == "renumber"
    options: Any = peer_recipe("mmtok", QWEN, keep=0.2).stages[0].selector.options
    assert options.text_temperature == 0.01
    assert peer_recipe("mmtok", QWEN, keep=0.2).positions == "keep"
    control = peer_recipe("random", LLAVA, keep=0.3, layers=(2, 3, 4, 5, 6))
    assert [control.target(576, s.keep) for s in control.stages] == [496, 415, 335, 254, 173]
