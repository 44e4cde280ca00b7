"""Transforms across heads and of keys, clipping of the cache, and keys by channel before rotation,
against full precision and against slow numpy."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quota_jax as qj
from pallas_kernels.stable import as_stored
from quota_jax.errors import QuotaError
from quota_jax.kv_cache import CacheGroup, ChannelKeys
from quota_jax.models.params import CACHE
from quota_jax.nn.attention_cache import CacheQuantizer
from quota_jax.nn.rope import rotary_angles
from quota_jax.quant.blocks import forward as run_block
from quota_jax.quant.calibrate import calibrate
from quota_jax.quant.calibrate_flatquant import FlatQuantOptions, block_sites
from quota_jax.quant.calibration_data import Sample, make_batches
from quota_jax.quant.flatquant import sigmoid
from quota_jax.quant.folding import fold, fold_exactly, start_cache
from quota_jax.quant.quantizers import quantize_kv
from quota_jax.quantization import QuantizationConfig
from quota_jax.recipe import Recipe
from tests.test_flatquant import assert_close, batch_of, random_learned, walk
from tests.tiny_checkpoints import tiny_checkpoint
from tests.tiny_models import draw_picture

WHOLE = QuantizationConfig.parse("W4A4KV4", method="flatquant")
WHOLE = dataclasses.replace(WHOLE, output_transform="heads", key_transform=True, cache_clip=True)
CHANNEL = dataclasses.replace(QuantizationConfig.parse("W4A8KV4"), key_quantization="channel")
PRUNED = Recipe.uniform(num_layers=2, layers=[0], keep=0.5)


@pytest.fixture(scope="module", params=["llava", pytest.param("qwen", marks=pytest.mark.slow)])
def source(request, tmp_path_factory):
    """Checkpoints with four query heads and two key/value heads."""
    root = tmp_path_factory.mktemp(f"cache_{request.param}")
    return tiny_checkpoint(root, request.param, num_kv_heads=2)


@pytest.fixture(scope="module")
def vlm(source):
    return qj.load(source, dtype="float32")


def learned_of(block, params, quantization, seed=0):
    """Transforms, of the cache too, that are far from the identity."""
    sites = block_sites(block, params, quantization)
    learned = random_learned(params, sites, quantization, seed)
    if block.kind == "decoder":
        width = block.config.text.head_dim
        learned |= start_cache(quantization, width, kind="random", seed=seed)
        draw = np.random.default_rng(seed)
        if "key" in learned[CACHE]:
            learned[CACHE]["key"]["lambda"] = draw.uniform(0.5, 2, width)
        learned[CACHE]["cache_clip"] = draw.uniform(1, 4, (2, 2))
    return sites, learned


def samples_of(count):
    return [Sample(text="is there a red circle ?", image=draw_picture(i)) for i in range(count)]


def test_heads_keys_and_values_change_nothing_while_nothing_is_quantized(vlm):
    """Every block alone within 1e-5, and folding in the loop as in float64."""
    batch = batch_of(vlm)
    kinds = set()
    for seed, (_, block, params, x, expected) in enumerate(walk(vlm, batch)):
        kinds.add(block.kind)
        mask = np.asarray(block.mask(batch, 2))
        sites, learned = learned_of(block, params, WHOLE, seed)
        for site in sites:
            if site.linear.endswith(".o"):
                heads = block.config.vision if block.kind == "vision" else block.config.text
                assert learned[site.linear]["left"]["u"].shape == (heads.num_heads,) * 2
                assert "right" not in learned[site.linear]
                assert learned[site.linear]["value"]["u"].shape == (heads.head_dim,) * 2
                # Alone: P_o and P_v.
                alone = fold_exactly(params, (site,), learned, clip=False)
                found = run_block(
                    {k: v for k, v in alone.items() if CACHE not in k}, x, batch, block=block
                )
                assert_close(np.asarray(found)[mask], expected[mask])
        if block.kind == "decoder":
            # Alone: P_k.
            alone = fold_exactly(params, (), {CACHE: learned[CACHE]}, clip=False)
            assert {k for k in alone if k not in params} == {
                f"{CACHE}.{part}" for part in ("key_transform", "query_transform", "clip")
            }
            found = run_block(alone, x, batch, block=block)
            assert_close(np.asarray(found)[mask], expected[mask])
            assert np.abs(alone[f"{CACHE}.key_transform"] - np.eye(16)).max() > 0.1
        narrow = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (params, learned))
        with jax.default_matmul_precision("highest"):
            before = fold(narrow[0], sites, narrow[1], jnp)
        after = fold_exactly(params, sites, learned)
        assert set(before) == set(after)
        for name, value in after.items():
            np.testing.assert_allclose(before[name], value, rtol=1e-3, atol=1e-4, err_msg=name)
    assert kinds == {"vision", "projector", "decoder"}


def test_the_output_projection_reads_p_o_kron_p_v(vlm):
    """The folded columns are those of the reference: ``W (P_o^-T kron P_v^-T)``."""
    from quota_jax.quant.flatquant import factor

    for _, block, params, _, _ in walk(vlm, batch_of(vlm)):
        if block.kind == "projector":
            continue
        sites, learned = learned_of(block, params, WHOLE)
        (site,) = (site for site in sites if site.linear.endswith(".o"))
        only = {site.linear: {k: learned[site.linear][k] for k in ("left", "value")}}
        found = fold_exactly(params, (site,), only)
        inverses = (factor(only[site.linear][k], np)[1] for k in ("left", "value"))
        expected = params[f"{site.linear}.weight"].astype(np.float64) @ np.kron(*inverses)
        np.testing.assert_allclose(found[f"{site.linear}.weight"], expected, rtol=1e-5, atol=1e-6)


def channel_vlm(vlm, source, tmp_path, quantization=CHANNEL):
    out = tmp_path / "channel"
    if not out.exists():
        calibrate(source, out, quantization, samples=samples_of(3))
    return qj.load(out, dtype="float32")


def slow_heads(query, group: CacheGroup, row, layer, key_range, angle, groups):
    """One query's attention over a cached row, written out in float64."""
    head_dim = query.shape[-1]
    high, low = np.asarray(key_range, np.float64)
    step = (high - low) / 15
    out = []
    count = int(group.lengths[row])
    for n in range(len(query)):
        kv = n // groups
        packed = np.asarray(group.key[0][layer, row, kv, :count])
        codes = np.stack([packed & 15, packed >> 4], -1).reshape(count, head_dim)
        keys = low[kv] + step[kv] * codes
        scores = []
        for s in range(count):
            turned = np.empty(head_dim)
            for i in range(head_dim // 2):
                a, b = keys[s, i], keys[s, i + head_dim // 2]
                t = angle(np.asarray(group.positions)[row, s], i)
                turned[i] = a * np.cos(t) - b * np.sin(t)
                turned[i + head_dim // 2] = b * np.cos(t) + a * np.sin(t)
            scores.append(turned @ query[n] / np.sqrt(head_dim))
        weights = np.exp(np.array(scores) - max(scores))
        packed, scale, zero = (np.asarray(a[layer, row, kv, :count]) for a in group.value)
        values = np.stack([packed & 15, packed >> 4], -1).reshape(count, head_dim).astype(float)
        values = (values - zero.astype(float)[:, None]) * scale.astype(np.float64)[:, None]
        out.append(weights / weights.sum() @ values)
    return np.stack(out)


@pytest.mark.slow
def test_a_cache_of_unrotated_keys_against_slow_numpy(vlm, source, tmp_path):
    """Codes of prefill and of a decoded token, and attention over them, in a pruned group."""
    found = channel_vlm(vlm, source, tmp_path)
    text = found.config.text
    batch = make_batches(vlm.processor, samples_of(2), 2).batches[0]
    _, cache = qj.prefill(found.model, batch, recipe=PRUNED)
    decoder = found.model.decoder
    first, second = cache.groups
    assert [group.key[0].dtype for group in cache.groups] == [jnp.uint8] * 2
    assert len(first.key) == 1  # no scale and no zero point for each token
    assert int(second.lengths[0]) < int(batch.lengths[0])
    ranges = np.asarray(decoder.layers.cache.key_range[...], np.float64)
    # Layer 0 caches the kept tokens of the prompt: its codes are those of its unpruned keys.
    x = found.model.embed(batch, found.model.visual_features(batch.pixels))
    _, keys, _ = decoder.layers.attn.project(decoder.layers.norm1(x, 0), 0)
    keys = np.asarray(keys, np.float64)
    high, low = ranges[0]
    codes = np.clip(np.round((keys - low) / ((high - low) / 15)), 0, 15)
    kept = np.asarray(cache.kept_source)
    for row in range(2):
        count = int(first.lengths[row])
        packed = np.asarray(first.key[0][0, row])[:, :count]
        stored = np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:2], -1)
        wanted = codes[row, kept[row, :count]].swapaxes(0, 1)
        # A value halfway between two codes may fall to either side of it in float32.
        assert (stored != wanted).mean() < 2e-3
        assert np.abs(stored - wanted).max() <= 1
        np.testing.assert_array_equal(
            np.asarray(first.positions)[row, :count],
            np.asarray(batch.positions)[row, kept[row, :count]],
        )

    theta, sections = text.rope_theta, text.mrope_section

    def angle(position, i):
        if sections is not None:
            position = position[np.repeat(np.arange(3), sections)[i]]
        return float(position) / theta ** (2 * i / text.head_dim)

    draw = np.random.default_rng(0)
    query = draw.standard_normal((2, text.num_heads, text.head_dim)).astype(np.float32)
    assert second.positions is not None
    angles = rotary_angles(text, second.positions)
    got = second.attend(
        jnp.int32(0),
        jnp.asarray(query),
        second.lengths,
        text.head_dim**-0.5,
        decoder.layers.cache.reading(jnp.int32(1), angles),
    )
    groups = text.num_heads // text.num_kv_heads
    for row in range(2):
        expected = slow_heads(query[row], second, row, 0, ranges[1], angle, groups)
        np.testing.assert_allclose(got[row], expected, rtol=2e-4, atol=2e-5)


@pytest.mark.slow
def test_renumbered_positions_do_not_turn_keys_that_were_made_before(vlm, source, tmp_path):
    """The trimmed layer's own keys keep their first positions, later layers have the new ones."""
    found = channel_vlm(vlm, source, tmp_path)
    batch = make_batches(vlm.processor, samples_of(1), 1).batches[0]
    recipe = dataclasses.replace(PRUNED, positions="renumber")
    _, cache = qj.prefill(found.model, batch, recipe=recipe)
    own, later = cache.groups
    count = int(own.lengths[0])
    kept = np.asarray(cache.kept_source)[0, :count]
    np.testing.assert_array_equal(
        np.asarray(own.positions)[0, :count], np.asarray(batch.positions)[0, kept]
    )
    renumbered = np.asarray(later.positions)[0, :count].reshape(count, -1)
    assert (renumbered == np.arange(count)[:, None]).all()


def test_clipped_ranges_of_keys_and_values():
    x = jnp.array([[1.0, -2.0, 4.0], [-1.0, -3.0, -2.0]])
    codes, scale, zero = quantize_kv(x, 4, jnp.array([0.5, 1.0]))
    np.testing.assert_allclose(np.asarray(scale, np.float32), [4 / 15, 3 / 15], rtol=4e-3)
    assert zero.tolist() == [7, 15]
    assert codes[0].tolist() == [11, 0, 15]  # 4 is cut to 2
    for whole, part in zip(quantize_kv(x, 4), quantize_kv(x, 4, jnp.ones(2)), strict=True):
        np.testing.assert_array_equal(whole, part)
    np.testing.assert_allclose(sigmoid(np.float64(4.0), np), 0.98201379)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_a_stored_scale_is_the_cast_that_no_compiler_leaves_out(dtype):
    """A pair of casts would be left out where excess precision is allowed, as XLA does on a GPU."""
    x = np.exp(np.random.default_rng(2).uniform(-8, 8, 5000)).astype(np.float32)
    function = jax.jit(lambda x: as_stored(x, dtype))
    np.testing.assert_array_equal(function(x), x.astype(dtype).astype(np.float32))
    lowered = jax.jit(lambda x: quantize_kv(x, 8)).lower(jnp.ones((3, 8)))
    assert "reduce_precision" in lowered.as_text()


def test_refusals():
    with pytest.raises(QuotaError, match="keys by channel need a cache of 4 or 8 bits"):
        QuantizationConfig(method="rtn", weight_bits=4, key_quantization="channel")
    with pytest.raises(QuotaError, match="give one of them"):
        dataclasses.replace(WHOLE, key_quantization="channel")
    with pytest.raises(QuotaError, match="key_transform belongs to method 'flatquant'"):
        dataclasses.replace(CHANNEL, key_quantization="token", key_transform=True)
    with pytest.raises(QuotaError, match="key_quantization 'head' is unknown"):
        dataclasses.replace(CHANNEL, key_quantization="head")
    with pytest.raises(QuotaError, match="output_transform 'all' is unknown"):
        FlatQuantOptions(output_transform="all")
    with pytest.raises(QuotaError, match="keys by channel need their ranges"):
        CacheQuantizer({}, CHANNEL)
    group = CacheGroup(
        key=(jnp.zeros((1, 1, 1, 128, 4), jnp.uint8),),
        value=(jnp.zeros((1, 1, 1, 128, 4), jnp.uint8),) * 3,
        lengths=jnp.ones(1, jnp.int32),
        shift=jnp.zeros(1, jnp.int32),
        positions=jnp.zeros((1, 128), jnp.int32),
        bits=4,
    )
    with pytest.raises(ValueError, match="channels belong to a cache that keeps positions"):
        group.attend(jnp.int32(0), jnp.zeros((1, 1, 8)), group.lengths, 1.0)
    assert ChannelKeys._fields == ("low", "step", "cos", "sin")
