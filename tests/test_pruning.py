"""Pruned prefill and decode against a slow reference that masks instead of gathering."""

from __future__ import annotations

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

import quota_jax as qj
from quota_jax.batch import Batch
from quota_jax.config import LlavaConfig, TextConfig, VisionConfig
from quota_jax.errors import QuotaError
from quota_jax.generation import begin, decode_chunk
from quota_jax.models.params import build_model, flatten_params, init_params
from quota_jax.models.vision_language import sequence_of
from quota_jax.nn.rope import rotary_angles, rotate
from quota_jax.prune.weights import QuotaWeights
from quota_jax.quant.calibrate import quantize_params
from quota_jax.quantization import QuantizationConfig
from quota_jax.recipe import Recipe, Selector, Stage, kept
from quota_jax.sampling import Sampling, sample

LAYERS = 4
CONFIG = LlavaConfig(
    vision=VisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_layers=2,
        num_heads=2,
        image_size=70,
        patch_size=14,
    ),
    text=TextConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_layers=LAYERS,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
    ),
    image_token_id=60,
)
PATCHES = CONFIG.tokens_per_image


@pytest.fixture(scope="module")
def model():
    import jax

    return build_model(CONFIG, None, init_params(CONFIG, jax.random.key(0)))


def make_batch(text_lengths, images, *, text_bucket=32, seed=0):
    """Text tokens with pictures after the second one; ``images`` per sample."""
    rng = np.random.default_rng(seed)
    visual_bucket = PATCHES * max(images)
    size, width = len(images), text_bucket + visual_bucket
    tokens = np.zeros((size, width), np.int32)
    index = np.full((size, width), -1, np.int32)
    lengths, row = [], 0
    for b, (text, count) in enumerate(zip(text_lengths, images, strict=True)):
        visual = count * PATCHES
        words = rng.integers(1, 60, text)
        line = [*words[:2], *[60] * visual, *words[2:]]
        tokens[b, : len(line)] = line
        index[b, 2 : 2 + visual] = row + np.arange(visual)
        row += visual
        lengths.append(len(line))
    return Batch(
        tokens=jnp.asarray(tokens),
        lengths=jnp.asarray(lengths),
        visual_index=jnp.asarray(index),
        positions=jnp.broadcast_to(jnp.arange(width), (size, width)),
        pixels=jnp.asarray(rng.standard_normal((sum(images), 3, 70, 70)), jnp.float32),
        text_bucket=text_bucket,
        visual_bucket=visual_bucket,
    )


def slow_forward(model, x, alive):
    """Full-length decoder over ``x [S, D]`` in which dropped tokens are masked, never removed.

    ``alive[l]`` is (keys of layer l for prompt queries, keys for decode queries, which queries are
    decode queries), each bool [S]: prompt queries of a pruning layer still see what it drops.
    """
    config = CONFIG.text
    decoder, count = model.decoder, x.shape[0]
    for layer in range(config.num_layers):
        before, after, late = alive[layer]
        index = jnp.int32(layer)
        cos, sin = rotary_angles(config, jnp.arange(count))
        q, k, v = decoder.layers.attn.project(decoder.layers.norm1(x, index), index)
        q, k = np.asarray(rotate(q, cos, sin), np.float64), np.asarray(rotate(k, cos, sin))
        k, v = (np.repeat(np.asarray(a, np.float64), 2, 1) for a in (k, v))
        allowed = np.tril(np.ones((count, count), bool)) & before[None, :]
        allowed[late] &= after[None, :]
        allowed |= np.eye(count, dtype=bool)
        scores = np.einsum("tnh,snh->nts", q, k) * config.head_dim**-0.5
        scores = np.where(allowed, scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        heads = np.einsum("nts,snh->tnh", weights, v)
        x = x + decoder.layers.attn.output(jnp.asarray(heads, jnp.float32), index)
        x = x + decoder.layers.mlp(decoder.layers.norm2(x, index), index)
    return decoder.logits(x)


RECIPES = {
    "text_attention": Recipe.uniform(num_layers=LAYERS, layers=[1, 2], keep=0.3),
    "quota": Recipe.uniform(
        num_layers=LAYERS,
        layers=[1, 2],
        keep=0.3,
        selector=Selector(name="quota", redistribute=True, causal_intra=True),
    ),
    "fastv": Recipe.uniform(
        num_layers=LAYERS, layers=[1], keep=0.5, selector="fastv", trim_own_cache=False
    ),
    "pyramid_drop": Recipe.uniform(
        num_layers=LAYERS, layers=[1, 3], keep=0.25, selector="pyramid_drop"
    ),
    "div_prune": Recipe.uniform(num_layers=LAYERS, layers=[0], keep=0.4, selector="div_prune"),
    "mmtok_then_a_floor_per_picture": Recipe(
        num_layers=LAYERS,
        stages=(
            Stage(layer=0, keep=0.7, point="input", selector=Selector(name="mmtok")),
            Stage(layer=2, keep=0.2, min_keep_per_image=4),
        ),
    ),
    "renumber": Recipe.uniform(
        num_layers=LAYERS, layers=[0, 2], keep=0.2, selector="random", positions="renumber"
    ),
    "entry_none_left": Recipe(
        num_layers=LAYERS,
        stages=(
            Stage(layer=1, keep=0.5, point="before_attention", selector=Selector(name="stride")),
            Stage(layer=2, keep=0.0, point="before_attention", selector=Selector(name="stride")),
        ),
    ),
    "input": Recipe(
        num_layers=LAYERS,
        stages=(
            Stage(layer=0, keep=0.4, point="input", selector=Selector(name="random", seed=3)),
            Stage(layer=3, keep=0.1, trim_own_cache=True),
        ),
    ),
    "untrimmed": Recipe(
        num_layers=LAYERS, stages=(Stage(layer=1, keep=0.25, trim_own_cache=False),)
    ),
}


LONG = (
    *("fastv", "input", "mmtok_then_a_floor_per_picture", "pyramid_drop", "text_attention"),
    *("div_prune", "untrimmed"),
)
"""Left to CI."""


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in LONG)) for name in sorted(RECIPES)],
)
def test_pruned_decoding_equals_masking_the_dropped_tokens(model, name):
    recipe = RECIPES[name]
    batch = make_batch([9, 20, 5], [1, 2, 0])
    steps = 16
    state = begin(model, batch, recipe=recipe, max_new_tokens=steps)
    state = decode_chunk(model, state, jnp.int32(steps))
    generated = np.asarray(state.tokens)[:, :steps]
    survivors = kept_sets(model, batch, recipe)
    embedded = model.embed(batch, model.visual_features(batch.pixels))
    for b in range(3):
        length = int(batch.lengths[b])
        new = model.decoder.embed.weight[...][generated[b, :-1]]
        x = jnp.concatenate([embedded[b, :length], new])
        count = x.shape[0]
        late = np.arange(count) >= length
        if recipe.positions == "renumber":
            check_renumbered_positions(state, b)
            continue
        alive, current = [], np.ones(count, bool)
        for layer in range(LAYERS):
            before = own = current
            for stage in (stage for stage in recipe.stages if stage.layer == layer):
                remains = survivors[stage][b][:length]
                current = np.concatenate([remains, np.ones(count - length, bool)])
                if stage.point != "after_attention":
                    before = current
                own = current if stage.trim_own_cache else before
            alive.append((before, own, late))
        logits = np.asarray(slow_forward(model, x, alive))[length - 1 :]
        assert_greedy(logits, generated[b])


def assert_greedy(logits, tokens):
    """Every generated token is the arg-max of the slow logits up to 1e-5 of their range."""
    chosen = logits[np.arange(len(tokens)), tokens]
    assert (logits.max(-1) - chosen <= 1e-5 * np.abs(logits).max()).all()


def check_renumbered_positions(state, b):
    """Each group's next position equals the number of tokens it holds: no gaps."""
    for group in state.groups:
        assert int(state.position[b] - group.shift[b]) == int(group.lengths[b])


def kept_sets(model, batch, recipe):
    """Which input places survive each stage, read from prefills of the truncated recipes."""
    out = {}
    for i, stage in enumerate(recipe.stages):
        head = dataclasses.replace(recipe, stages=recipe.stages[: i + 1])
        _, cache = qj.prefill(model, batch, recipe=head)
        masks = np.zeros(batch.tokens.shape, bool)
        for b in range(batch.batch_size):
            masks[b, np.asarray(cache.kept_source)[b, : int(cache.kept_length[b])]] = True
            visual = np.asarray(batch.is_visual)[b]
            assert masks[b][visual].sum() == kept(int(visual.sum()), stage.keep)
            text = np.asarray(batch.is_real)[b] & ~visual
            assert masks[b][text].all()
        out[stage] = masks
    return out


def test_stride_keeps_evenly_and_random_is_nested_and_seeded(model):
    batch = make_batch([9, 20], [1, 2])

    def survivors(selector, keep):
        stage = Stage(layer=0, keep=keep, point="input", selector=selector)
        recipe = Recipe(num_layers=LAYERS, stages=(stage,))
        return kept_sets(model, batch, recipe)[stage]

    stride = survivors(Selector(name="stride"), 0.2)
    gaps = np.diff(np.flatnonzero(stride[0, 2 : 2 + PATCHES]))
    assert set(gaps) == {5}
    half, tenth = (survivors(Selector(name="random", seed=1), keep) for keep in (0.5, 0.1))
    assert (half | ~tenth).all()
    assert (half != survivors(Selector(name="random", seed=2), 0.5)).any()


def by_hand(scores: np.ndarray, visual: np.ndarray, count: int) -> set[int]:
    """Places of the best visual tokens; ties to the lowest."""
    places = np.flatnonzero(visual)
    order = sorted(places, key=lambda place: (-scores[place], place))
    return {int(place) for place in order[:count]}


def quota_by_hand(parts, visual, text, head_dim) -> np.ndarray:
    """Eq. 6-8 in float64 from a layer's input, queries, deployed keys and qkv input."""
    x, q, keys, normed, bits = parts
    n, group = len(x), q.shape[1] // keys.shape[1]
    keys = np.repeat(keys, group, 1)
    logits = np.einsum("tnh,snh->nts", q, keys) * head_dim**-0.5
    logits = np.where(np.tril(np.ones((n, n), bool)), logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights = (weights / weights.sum(-1, keepdims=True)).mean(0)
    inter, intra = np.zeros(n), np.zeros(n)
    for i in range(n):
        later = [t for t in np.flatnonzero(text) if t > i]
        inter[i] = weights[later, i].mean() if later else 0.0
        intra[i] = weights[np.flatnonzero(visual), i].sum() / visual.sum()
    metrics = {"inter": inter, "magnitude": np.linalg.norm(x, axis=-1), "intra": intra}
    if bits < 16:
        step = np.abs(normed).max(-1, keepdims=True) / (2 ** (bits - 1) - 1)
        metrics["residual"] = np.linalg.norm(np.round(normed / step) * step - normed, axis=-1)
    share = {"inter": 0.45, "magnitude": 0.25, "intra": 0.1, "residual": 0.2}
    if bits == 16:
        share = {name: share[name] + 0.2 / 3 for name in metrics}
    total = np.zeros(n)
    for name, value in metrics.items():
        low, high = np.percentile(value[visual], [5, 95])
        total += share[name] * (np.clip(value, low, high) - low) / (high - low)
    return total


@pytest.mark.parametrize(
    "label", ["W16A16KV16", pytest.param("W4A8KV4", marks=pytest.mark.slow), "W4A4KV4"]
)
def test_quota_keeps_the_tokens_of_equations_6_to_9(model, label):
    quantization = QuantizationConfig.parse(label)
    params = {name: np.asarray(array) for name, array in flatten_params(model).items()}
    arrays = quantize_params(params, quantization)
    model = build_model(
        model.config, quantization, {name: jnp.asarray(array) for name, array in arrays.items()}
    )
    bits = quantization.activation_bits
    selector = Selector(name="quota", redistribute=bits == 16)
    recipe = Recipe(num_layers=LAYERS, stages=(Stage(layer=1, keep=0.4, selector=selector),))
    batch = make_batch([9, 20], [1, 2])
    _, cache = qj.prefill(model, batch, recipe=recipe)
    decoder, sequence = model.decoder, sequence_of(batch)
    x = model.embed(batch, model.visual_features(batch.pixels))
    x, _ = decoder.layer(x, sequence, jnp.int32(0))
    inner = decoder.project(x, sequence, jnp.int32(1))
    for b in range(2):
        n = int(batch.lengths[b])
        visual = np.asarray(batch.is_visual)[b, :n]
        arrays = (x, inner.query, inner.key, inner.normed)
        parts = [np.asarray(array, np.float64)[b, :n] for array in arrays]
        scores = quota_by_hand((*parts, bits), visual, ~visual, model.config.text.head_dim)
        count = kept(int(visual.sum()), 0.4)
        source = np.asarray(cache.kept_source)[b, : int(cache.kept_length[b])]
        assert set(source[visual[source]]) == by_hand(scores, visual, count)


def test_unquantized_inputs_have_no_residual_to_score_by(model):
    recipe = Recipe.uniform(num_layers=LAYERS, layers=[1], keep=0.5, selector="quota")
    with pytest.raises(QuotaError, match="redistribute=True"):
        qj.prefill(model, make_batch([9], [1]), recipe=recipe)


def test_selector_parameters_survive_json_and_belong_to_quota():
    weights = QuotaWeights().without("residual")
    selector = Selector(name="quota", weights=weights, causal_intra=True)
    recipe = Recipe(num_layers=4, stages=(Stage(layer=1, keep=0.5, selector=selector),))
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe
    with pytest.raises(QuotaError, match="belong to the selector 'quota'"):
        Selector(name="random", redistribute=True)
    with pytest.raises(QuotaError, match="weights of the score"):
        Selector(name="quota", weights={"color": 1.0})  # pyrefly: ignore


def test_recipe_counts_equal_the_reference_vectors():
    recipe = Recipe.uniform(num_layers=32, layers=[2, 3, 4, 5, 6], keep=0.3)
    budgets = [kept(576, stage.keep) for stage in recipe.stages]
    assert budgets == [496, 415, 335, 254, 173]
    assert recipe.tokens_per_layer(576)[:8] == (576, 576, 576, 496, 415, 335, 254, 173)
    assert Recipe.from_json(recipe.to_json()) == recipe
    tenth = Recipe.uniform(num_layers=32, layers=[2, 3, 4, 5, 6], keep=0.1)
    assert [kept(576, stage.keep) for stage in tenth.stages] == [473, 369, 265, 162, 58]


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ([{"layer": 9, "keep": 0.5}], "4 layers"),
        ([{"layer": 1, "keep": 0.5}, {"layer": 2, "keep": 0.6}], "grows at layer 2"),
        ([{"layer": 1, "keep": 0.5, "selector": "magic"}], "unknown selector 'magic'"),
        ([{"layer": 1, "keep": 1.5}], r"keep must lie in \[0, 1\], got 1.5"),
        ([{"layer": 2, "keep": 0.5}, {"layer": 1, "keep": 0.4}], "not in order at layer 1"),
        ([{"layer": 1, "keep": 0.5, "colour": 3}], "unknown field 'colour'"),
        ([{"layer": 1, "keep": 0.5, "point": "input"}], "layer is 0, got 1"),
        ("many", "stages must be a list"),
    ],
)
def test_bad_recipes_are_refused_by_name(stages, words):
    with pytest.raises(QuotaError, match=words):
        Recipe.from_json({"num_layers": 4, "stages": stages})


def test_a_recipe_of_another_model_is_refused(model):
    with pytest.raises(QuotaError, match="recipe is for 7 layers, the decoder has 4"):
        qj.prefill(model, make_batch([9], [1]), recipe=Recipe.none(7))


def test_sampling_respects_top_k_top_p_and_seeds():
    logits = jnp.log(jnp.asarray([[0.5, 0.3, 0.15, 0.05]] * 64))
    seeds = list(range(64))

    def draws(**options):
        return set(
            np.asarray(
                sample(logits, Sampling.make(64, seed=seeds, **options), jnp.zeros(64, jnp.int32))
            ).tolist()
        )

    assert draws(temperature=0.0) == {0}
    assert draws(temperature=1.0, top_k=2) == {0, 1}
    assert draws(temperature=1.0, top_p=0.79) == {0, 1}
    assert draws(temperature=5.0) == {0, 1, 2, 3}
    with pytest.raises(QuotaError, match="top_p"):
        Sampling.make(1, top_p=0.0)
