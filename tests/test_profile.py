"""Concentration, redundancy and the proposal of candidate layers against numpy by hand."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention_mass import attention_mass
from quota_jax.models.vision_language import sequence_of
from quota_jax.prune.profile import (
    COMPARED,
    Spread,
    compared_tokens,
    layer_statistics,
    propose_candidates,
)
from quota_jax.prune.select import Sequence
from quota_jax.prune.token_statistics import median_cosine, top_text_attention
from tests.tiny_models import draw_picture, write_tiny_llava
from tests.tiny_params import random_model, read_tiny

HEADS, GROUPS, WIDTH = 6, 2, 5
# T text, V visual, . padding. The text in front of the first picture sees none of it.
ROWS = (
    "TT" + 14 * "V" + "TTT" + 2 * "V" + "T" + 71 * "T",  # two pictures, more text than one block
    "T" + 4 * "V" + "TT" + 86 * ".",  # fewer visual tokens than the top ten
    "TTT" + 90 * ".",  # no picture
    "TT" + 20 * "V" + 71 * ".",  # no text behind it
)


def make_sequence() -> Sequence:
    lines = np.array([list(row) for row in ROWS])
    places = jnp.broadcast_to(jnp.arange(lines.shape[1]), lines.shape)
    visual = lines == "V"
    return Sequence(
        lengths=jnp.asarray((lines != ".").sum(1)),
        positions=places,
        next_position=jnp.zeros(len(ROWS), jnp.int32),
        is_visual=jnp.asarray(visual),
        visual_count=jnp.asarray(visual.sum(1)),
        source=places,
        text_bucket=77,
        visual_bucket=20,
        original_bucket=20,
    )


def test_concentration_by_hand():
    sequence, rng = make_sequence(), np.random.default_rng(0)
    length = len(ROWS[0])
    query = rng.standard_normal((len(ROWS), length, HEADS, WIDTH)).astype(np.float32)
    key = rng.standard_normal((len(ROWS), length, GROUPS, WIDTH)).astype(np.float32)
    run = jax.jit(lambda q, k, s: top_text_attention(q, k, s, top=10, sm_scale=0.7))
    mass, share = map(np.asarray, run(query, key, sequence))

    for row, line in enumerate(ROWS):
        best, parts = [], []
        for t in range(length):
            seen = [i for i in range(t) if line[i] == "V"]
            if line[t] != "T" or not seen:
                continue
            attention = np.zeros(t + 1)
            for head in range(HEADS):
                scores = 0.7 * key[row, : t + 1, head // (HEADS // GROUPS)] @ query[row, t, head]
                weights = np.exp(scores - scores.max())
                attention += weights / weights.sum() / HEADS
            largest = np.sort(attention[seen])[-10:].sum()
            best.append(largest)
            parts.append(largest / attention[seen].sum())
        if not best:
            assert np.isnan(mass[row])
            assert np.isnan(share[row])
            continue
        np.testing.assert_allclose(mass[row], np.mean(best), rtol=1e-5)
        np.testing.assert_allclose(share[row], np.mean(parts), rtol=1e-5)
    assert np.isnan(mass).tolist() == [False, False, True, True]
    assert share[0] < 0.99  # more than ten tokens: the top ten are not all
    assert share[1] == pytest.approx(1, rel=1e-6)


def test_redundancy_by_hand():
    rng = np.random.default_rng(1)
    x = rng.standard_normal((5, 9, 4)).astype(np.float32)
    x[0, 2] = 0  # cosine 0 with everything
    # 5 tokens: 10 pairs; 3 tokens: 3 pairs; two, one and none.
    tokens = np.full((5, 5), -1, np.int32)
    for row, places in enumerate(([0, 2, 3, 5, 8], [1, 2, 7], [4, 6], [3], [])):
        tokens[row, : len(places)] = places
    found = np.asarray(jax.jit(median_cosine)(x, tokens))
    for row in range(3):
        chosen = x[row, tokens[row][tokens[row] >= 0]].astype(np.float64)
        unit = chosen / np.maximum(np.linalg.norm(chosen, axis=1, keepdims=True), 1e-12)
        pairs = [unit[i] @ unit[j] for i in range(len(unit)) for j in range(i)]
        np.testing.assert_allclose(found[row], np.median(pairs), rtol=1e-5)
    assert np.isnan(found[3:]).all()
    assert np.isnan(median_cosine(jnp.asarray(x), jnp.zeros((5, 0), jnp.int32))).all()


def test_many_tokens_are_sampled_by_seed_whatever_stands_beside_them():
    class Rows:
        def __init__(self, *counts: int):
            self.visual_bucket = max(counts)
            self.is_visual = np.arange(self.visual_bucket + 3)[None] < np.array(counts)[:, None]

    together = compared_tokens(Rows(COMPARED + 200, 7), seed=3)  # type: ignore[arg-type]
    alone = compared_tokens(Rows(COMPARED + 200), seed=3)  # type: ignore[arg-type]
    np.testing.assert_array_equal(together[0], alone[0])
    assert len(set(alone[0])) == COMPARED
    assert (np.diff(alone[0]) > 0).all()
    assert alone.max() >= COMPARED
    assert together[1][:7].tolist() == list(range(7))
    assert (together[1][7:] == -1).all()
    other = compared_tokens(Rows(COMPARED + 200), seed=4)  # type: ignore[arg-type]
    assert (other != alone).any()


def test_a_models_layers_are_read_at_the_right_place(tmp_path: Path):
    # 4 visual tokens: the top ten are all, so that the concentration is the whole mass.
    folder = write_tiny_llava(tmp_path / "hf", num_layers=3)
    config, processor = read_tiny(folder)
    prompts = ["USER: <image>\nis there a red circle ? ASSISTANT:", "USER: car"]
    batch = processor(images=[[draw_picture(0)], []], prompts=prompts)
    model = random_model(config, 3)
    compared = compared_tokens(batch, 0)
    mass, share, cosine = map(np.asarray, layer_statistics(model, batch, compared))
    assert mass.shape == share.shape == cosine.shape == (batch.batch_size, 3)
    assert all(np.isnan(part[1]).all() for part in (mass, share, cosine))
    np.testing.assert_allclose(share[0], 1, rtol=1e-6)

    @jax.jit
    def slow(x, index):
        inner = model.decoder.project(x, sequence, index)
        scale = config.text.head_dim**-0.5
        received = attention_mass(
            inner.query, inner.key, sequence.lengths, sequence.is_visual, sm_scale=scale
        )
        return model.decoder.layer(x, sequence, index)[0], received[0]

    sequence = sequence_of(batch)
    x = jax.jit(lambda: model.embed(batch, model.visual_features(batch.pixels)))()
    visual = np.flatnonzero(np.asarray(batch.is_visual)[0])
    behind = int(batch.lengths[0]) - 1 - visual[-1]
    for layer in range(3):
        x, received = slow(x, jnp.int32(layer))
        np.testing.assert_allclose(
            mass[0, layer], np.asarray(received)[0, visual].sum() / behind, rtol=1e-5
        )
        rows = np.asarray(x, np.float64)[0, visual]
        unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        pairs = (unit @ unit.T)[np.triu_indices(len(visual), 1)]
        np.testing.assert_allclose(cosine[0, layer], np.median(pairs), rtol=1e-4)


def test_quartiles_leave_out_samples_without_a_value():
    values = np.array([[1.0, 4.0], [np.nan, np.nan], [2.0, 6.0], [3.0, 8.0], [4.0, 1.0]])
    assert Spread.of(values) == Spread(lower=(1.75, 3.25), median=(2.5, 5.0), upper=(3.25, 6.5))


def test_candidates_start_where_concentration_rises_and_stay_where_tokens_differ():
    rising = [0.3] * 10 + [0.35, 0.4] + [0.6 + 0.01 * i for i in range(20)]
    # LLaVA as the paper tells it: low in two layers, then a sharp rise.
    llava = [0.05, 0.06] + [0.3] * 30
    found = propose_candidates(llava, rising)
    assert (found.layers, found.rule_met) == ((2, 3, 4, 5, 6), True)
    assert found.threshold == pytest.approx((0.05 + 0.3) / 2)
    assert found.limit == pytest.approx((0.3 + 0.79) / 2)
    # Qwen: weak and unstable before layer 7 of 28; a peak at 2 alone is no start.
    qwen = [0.05, 0.1, 0.3, 0.06, 0.1, 0.12, 0.1] + [0.25] * 21
    assert propose_candidates(qwen, rising[:28]).layers == (7, 8, 9, 10, 11)
    # Tokens of layers 2 to 4 are as alike as those of the end: the run starts behind them.
    alike = [0.3, 0.3, 0.7, 0.7, 0.7, *rising[5:]]
    assert propose_candidates(llava, alike).layers == (5, 6, 7, 8, 9)
    # Redundancy that falls says nothing about the end.
    falling = [0.9 - 0.01 * i for i in range(32)]
    found = propose_candidates(llava, falling)
    assert (found.layers, found.limit) == ((2, 3, 4, 5, 6), None)


def test_candidates_of_shallow_decoders_and_without_a_run_that_fits():
    # Peaks everywhere, no five layers in a row above the middle: the run of the best weakest one.
    peaks = [0.1, 0.9, 0.1, 0.9, 0.2, 0.9, 0.3, 0.9, 0.3, 0.9, 0.3, 0.9] + [0.9] * 12
    found = propose_candidates(peaks, [0.5] * 24)
    assert (found.layers, found.rule_met) == ((5, 6, 7, 8, 9), False)
    assert propose_candidates([0.1, 0.3, 0.3, 0.3], [0.1] * 4).layers == (1,)
    assert propose_candidates([0.1, 0.3], [0.1] * 2).layers == (1,)
    assert propose_candidates([0.1], [0.1]).layers == (0,)
