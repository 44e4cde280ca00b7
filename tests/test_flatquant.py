"""FlatQuant's mathematics, and that transforms change nothing until something is quantized."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quota_jax as qj
from pallas_kernels.int4_matmul import integer_matmul
from quota_jax.generation import forward
from quota_jax.models.params import abstract_params, blocks, build_model, flatten_params
from quota_jax.nn.linear import kronecker as online_kronecker
from quota_jax.quant.blocks import Block, observe
from quota_jax.quant.blocks import forward as run_block
from quota_jax.quant.calibration_data import Sample, make_batches
from quota_jax.quant.flatquant import (
    cayley,
    clip_rows,
    factor,
    factor_pair,
    kronecker,
    start_diagonal,
    start_factor,
)
from quota_jax.quant.folding import Learned, find_sites, fold, fold_exactly
from quota_jax.quant.folding import start as start_learning
from quota_jax.quant.quantizers import quantize_activation, quantize_weight
from quota_jax.quant.rtn import quantize_params
from quota_jax.quant.straight_through import pass_through, round_through, simulated_product
from quota_jax.quant.streaming import Stream
from quota_jax.quantization import QuantizationConfig
from quota_jax.recipe import Recipe
from tests.tiny_checkpoints import tiny_checkpoint
from tests.tiny_models import draw_picture

W4A4 = QuantizationConfig.parse("W4A4KV4", method="flatquant")
SITES = {
    "llava": {
        "vision.layers": {"attn.qkv": "norm", "attn.o": "", "mlp.up": "norm", "mlp.down": ""},
        "projector": {"linear_1": "", "linear_2": ""},
    },
    "qwen": {
        "vision.layers": {
            **{"attn.qkv": "norm", "attn.o": "", "mlp.gate_up": "norm", "mlp.down": "gated"}
        },
        "projector": {"linear_1": "norm", "linear_2": ""},
    },
}
DECODER = {"attn.qkv": "norm", "attn.o": "", "mlp.gate_up": "norm", "mlp.down": "gated"}


@pytest.mark.parametrize(
    ("width", "pair"),
    [
        (1024, (32, 32)),
        (1280, (32, 40)),
        (3420, (38, 90)),
        (3584, (56, 64)),
        (4096, (64, 64)),
        (5120, (64, 80)),
        (11008, (86, 128)),
        (18944, (128, 148)),
        (6, (2, 3)),
        (1, (1, 1)),
        (13, (1, 13)),
        (26, (2, 13)),
    ],
)
def test_factor_pairs(width, pair):
    assert factor_pair(width) == pair


def test_factor_pairs_exist_for_every_width():
    assert all(a * b == n and a <= b for n in range(1, 3000) for a, b in [factor_pair(n)])


def test_the_kronecker_product_is_never_formed_but_meant():
    draw = np.random.default_rng(0)
    x, left, right = (draw.standard_normal(s) for s in ((7, 15), (3, 3), (5, 5)))
    expected = x @ np.kron(left, right)
    np.testing.assert_allclose(kronecker(x, left, right), expected, rtol=1e-12)
    narrow = [jnp.asarray(a, jnp.float32) for a in (x, left, right)]
    np.testing.assert_allclose(online_kronecker(*narrow), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("start", ["random", "identity"])
def test_a_factor_and_its_inverse_transpose(start):
    draw = np.random.default_rng(1)
    params = start_factor(6, start, draw)
    matrix, inverse = factor(params, np)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(6), atol=1e-12)
    assert np.allclose(matrix, np.eye(6)) == (start == "identity")
    params = {name: value + draw.standard_normal(value.shape) / 4 for name, value in params.items()}
    rotation = cayley(params["u"], np)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(6), atol=1e-12)
    matrix, inverse = factor(params, np)
    np.testing.assert_allclose(inverse, np.linalg.inv(matrix).T, atol=1e-10)
    narrow = factor(jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params), jnp)
    np.testing.assert_allclose(narrow[0], matrix, atol=1e-5)
    with pytest.raises(ValueError, match="'hadamard' is not one of"):
        start_factor(4, "hadamard", draw)


def test_the_first_diagonal_and_clipping_of_rows():
    d = np.exp(start_diagonal(np.array([0.5, 0.0]), np.array([32.0, 0.0])))
    np.testing.assert_allclose(d, [0.5**0.7 / 32**0.3, 1e-5**0.7 / 1e-5**0.3], rtol=1e-12)
    weight = np.array([[4.0, -2.0, 1.0], [-1.0, -3.0, -2.0]])
    cut = clip_rows(weight, np.array([[0.0, 0.0], [0.0, 4.0]]), np)
    low = -3 / (1 + np.exp(-4.0))
    np.testing.assert_allclose(cut, [[2.0, -1.0, 1.0], [-1.0, low, -2.0]])


def test_clipped_activations():
    x = jnp.array([[1.2, -4.0, 2.0], [-1.0, -2.0, -3.0], [0.0, 0.0, 0.0]])
    _, scale = quantize_activation(x, 4, jnp.array([1.0, 0.25]))
    np.testing.assert_allclose(scale[:2], [2 / 7, 0.75 / 7], rtol=1e-6)
    codes, _ = quantize_activation(x, 4, jnp.array([1.0, 0.25]))
    assert codes[0].tolist() == [4, -8, 7]
    assert codes[2].tolist() == [0, 0, 0]
    for whole, part in zip(
        quantize_activation(x, 4), quantize_activation(x, 4, jnp.ones(2)), strict=True
    ):
        np.testing.assert_array_equal(whole, part)


@pytest.mark.parametrize("bits", [(4, 4), (4, 8), (8, 8)])
def test_a_simulated_product_is_the_integer_one_with_a_gradient(bits):
    keys = jax.random.split(jax.random.key(0), 3)
    x, weight = (jax.random.normal(k, s) for k, s in zip(keys, ((5, 24), (6, 24)), strict=False))
    clip = jnp.array([0.9, 0.8])
    values, row = quantize_activation(x, bits[1], clip)
    codes, scale = quantize_weight(weight, bits[0])
    expected = integer_matmul(values, row, codes, scale)
    np.testing.assert_array_equal(simulated_product(x, weight, clip, *bits), expected)
    target = jax.random.normal(keys[2], expected.shape)

    def loss(x, weight, clip, product):
        return (product(x, weight, clip) * target).sum()

    simulated = functools.partial(loss, product=lambda *a: simulated_product(*a, *bits))
    exact = functools.partial(loss, product=lambda x, weight, clip: x @ weight.T)
    found = jax.grad(simulated, (0, 1, 2))(x, weight, clip)
    wanted = jax.grad(exact, (0, 1))(x, weight, clip)
    # Straight through: where nothing is clipped, close to the gradient of the exact product.
    for a, b in zip(found[:2], wanted, strict=True):
        assert np.corrcoef(np.ravel(a), np.ravel(b))[0, 1] > 0.9
    assert np.abs(found[2]).max() > 0


def test_rounding_and_reading_back_pass_gradients():
    x = jnp.array([0.4, 2.5, -1.6])
    np.testing.assert_array_equal(round_through(x), [0.0, 2.0, -2.0])
    np.testing.assert_array_equal(jax.grad(lambda x: round_through(x).sum())(x), [1.0, 1.0, 1.0])
    read = jax.grad(lambda x: (pass_through(x, jnp.round(x)) ** 2).sum())(x)
    np.testing.assert_array_equal(read, [0.0, 4.0, -4.0])


@pytest.fixture(scope="module", params=["llava", pytest.param("qwen", marks=pytest.mark.slow)])
def family(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("flatquant")
    path = tiny_checkpoint(root, request.param, num_kv_heads=2, intermediate_size=90)
    return request.param, qj.load(path, dtype="float32")


def by_block(vlm) -> dict[str, dict[str, np.ndarray]]:
    """Parameters as a checkpoint holds them."""
    params = {name: np.array(value) for name, value in flatten_params(vlm.model).items()}
    out = {}
    for block, specs in blocks(vlm.config).items():
        layer = int(block.rpartition("_")[2]) if "_layer_" in block else None
        out[block] = {n: params[n] if layer is None else params[n][layer] for n in specs}
    return out


def stacked(parts: dict[str, dict[str, np.ndarray]]) -> dict[str, jax.Array]:
    """The inverse of ``by_block``."""
    found: dict[str, list[np.ndarray]] = {}
    for params in parts.values():
        for name, value in params.items():
            found.setdefault(name, []).append(value)
    return {
        name: jnp.asarray(np.stack(values) if ".layers." in name else values[0])
        for name, values in found.items()
    }


def random_learned(params, sites, quantization=W4A4, seed=0) -> Learned:
    """Transforms far from the identity, as after long training."""
    draw = np.random.default_rng(seed)
    learned = start_learning(params, sites, {}, quantization, kind="random", seed=seed)

    def move(path, value):
        name = path[-1].key
        if name == "lambda":
            return value * draw.uniform(0.5, 2, value.shape) * draw.choice([-1, 1], value.shape)
        width = {"diagonal": 1.0, "weight_clip": 2.0, "input_clip": 2.0}.get(name, 0.2)
        return value + width * draw.standard_normal(value.shape)

    return jax.tree_util.tree_map_with_path(move, learned)


def folded(parts, quantization, *, clip) -> dict[str, dict[str, np.ndarray]]:
    """All blocks with random transforms folded in."""
    out = {}
    for seed, (block, params) in enumerate(parts.items()):
        sites = find_sites(params, quantization)
        learned = random_learned(params, sites, quantization, seed)
        out[block] = fold_exactly(params, sites, learned, clip=clip)
    return out


def batch_of(vlm, count=2):
    samples = [Sample(text="is there a red circle ?", image=draw_picture(i)) for i in range(count)]
    return make_batches(vlm.processor, samples, count).batches[0]


def assert_close(found, expected, bound=1e-5):
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert np.linalg.norm(found - expected) <= bound * np.linalg.norm(expected)


def walk(vlm, batch):
    """Every block with layers, its parameters and its inputs."""
    stream = Stream(vlm.config, [batch])
    for name, params in by_block(vlm).items():
        block = Block.named(vlm.config, name)
        if block is None:
            stream.prepare(name, params)
        elif inputs := stream.pass_through(name, block, params):
            yield name, block, params, inputs[0], stream.inputs[0]


def test_every_site_alone_changes_nothing_while_nothing_is_quantized(family):
    kind, vlm = family
    batch = batch_of(vlm)
    seen: dict[str, dict[str, str]] = {}
    done = set()
    for _, block, params, x, expected in walk(vlm, batch):
        if block.kind in done:
            continue
        done.add(block.kind)
        mask = np.asarray(block.mask(batch, 2))
        for site in find_sites(params, W4A4):
            path, _, _ = site.linear.rpartition(".")
            base = ".".join(site.linear.split(".")[: 1 if block.kind == "projector" else 2])
            place = "gated" if site.gated else "norm" if site.norm else ""
            seen.setdefault(base, {})[site.linear.removeprefix(f"{base}.")] = place
            learned = random_learned(params, (site,))
            changed = fold_exactly(params, (site,), learned, clip=False)
            found = run_block(changed, x, batch, block=block)
            assert_close(np.asarray(found)[mask], expected[mask])
            assert path
    assert seen == {**SITES[kind], "decoder.layers": DECODER}


def test_all_transforms_together_give_the_full_precision_logits(family):
    _, vlm = family
    batch = batch_of(vlm)
    changed = stacked(folded(by_block(vlm), W4A4, clip=False))
    model = build_model(vlm.config, QuantizationConfig.none, changed)
    real = np.asarray(batch.is_real)
    found, expected = forward(model, batch), forward(vlm.model, batch)
    # Several ill-conditioned transforms in a row: an order above the bound of a single block.
    assert_close(np.asarray(found)[real], np.asarray(expected)[real], 1e-4)


def test_before_folding_equals_after_folding(family):
    """In the loop float32 transforms act on unfolded parameters inside the program."""
    _, vlm = family
    batch = batch_of(vlm)
    for seed, (_, block, params, x, expected) in enumerate(walk(vlm, batch)):
        mask = np.asarray(block.mask(batch, 2))
        sites = find_sites(params, W4A4)
        learned = random_learned(params, sites, W4A4, seed)
        narrow = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (params, learned))
        with jax.default_matmul_precision("highest"):
            before = fold(narrow[0], sites, narrow[1], jnp, clip=False)
            exact = run_block(before, x, batch, block=block)
            before = fold(narrow[0], sites, narrow[1], jnp)
        after = fold_exactly(params, sites, learned)
        assert_close(np.asarray(exact)[mask], expected[mask], 2e-5)
        assert set(before) == set(after)
        for name, value in after.items():
            np.testing.assert_allclose(before[name], value, rtol=1e-3, atol=1e-4, err_msg=name)
            if name.endswith("weight"):
                a, b = (
                    np.asarray(quantize_weight(jnp.asarray(v), 4)[0], int)
                    for v in (before[name], value)
                )
                assert np.abs(a - b).max() <= 1
                assert (a != b).mean() < 2e-3
        # What the deployed linears read is what the formula says: ((x d) P) of the unfolded norm.
        names = tuple(site.linear for site in sites)
        plain = observe(params, x, batch, mask, block=block, linears=names)
        uncut = fold_exactly(params, sites, learned, clip=False)
        moved = observe(uncut, x, batch, mask, block=block, linears=names)
        for site in sites:
            if site.norm:
                d = np.exp(learned[site.linear]["diagonal"])
                wide = np.tile(d, plain[site.linear].size // d.size)
                np.testing.assert_allclose(moved[site.linear], plain[site.linear] * wide, rtol=1e-3)


@pytest.mark.parametrize(
    ("family", "label"),
    [("llava", "W4A4KV4"), pytest.param("qwen", "W4A4KV4", marks=pytest.mark.slow)]
    + [
        pytest.param("llava", label, marks=pytest.mark.slow)
        for label in ("W4A8KV4", "W8A8KV8", "W4A16KV16")
    ],
    indirect=["family"],
)
def test_simulated_equals_packed_bit_for_bit(family, label):
    _, vlm = family
    quantization = QuantizationConfig.parse(label, method="flatquant")
    floats = stacked(folded(by_block(vlm), quantization, clip=True))
    packed = quantize_params({n: np.asarray(a) for n, a in floats.items()}, quantization)
    specs = abstract_params(vlm.config, quantization)
    assert {n: (a.shape, a.dtype) for n, a in packed.items()} == {
        n: (s.shape, s.dtype) for n, s in specs.items()
    }
    assert ("decoder.layers.attn.o.clip" in specs) == (label != "W4A16KV16")
    models = [
        build_model(vlm.config, quantization, {n: jnp.asarray(a) for n, a in params.items()})
        for params in (floats, packed)
    ]
    batch = batch_of(vlm)
    pruned = Recipe.uniform(num_layers=2, layers=[0], keep=0.5)
    left, right = (qj.prefill(model, batch, recipe=pruned)[0] for model in models)
    np.testing.assert_array_equal(left, right)
    left, right = (
        qj.generate(model, batch, recipe=pruned, max_new_tokens=8).tokens for model in models
    )
    np.testing.assert_array_equal(left, right)


def test_a_sample_alone_equals_itself_in_a_batch(family):
    _, vlm = family
    parts = folded(by_block(vlm), W4A4, clip=True)
    packed = stacked({block: quantize_params(params, W4A4) for block, params in parts.items()})
    model = build_model(vlm.config, W4A4, packed)

    def chat(rows, **shape):
        return vlm.processor.chat(
            [
                [
                    {
                        "role": "user",
                        "content": [
                            {"type": "image", "image": draw_picture(row)},
                            {"type": "text", "text": "what color is the square " * (row + 1)},
                        ],
                    }
                ]
                for row in rows
            ],
            **shape,
        )

    whole, _ = qj.prefill(model, chat([0, 1, 2]))
    tokens = qj.generate(model, chat([0, 1, 2]), max_new_tokens=6).tokens
    for row in range(3):
        alone, _ = qj.prefill(model, chat([row], text_bucket=128))
        np.testing.assert_array_equal(alone[0], whole[row])
        one = qj.generate(model, chat([row], text_bucket=128), max_new_tokens=6).tokens
        np.testing.assert_array_equal(one[0], tokens[row])


def test_other_methods_have_no_transforms(family):
    _, vlm = family
    for quantization in (QuantizationConfig.none, QuantizationConfig.parse("W4A4KV4")):
        names = abstract_params(vlm.config, quantization)
        assert not [n for n in names if n.rsplit(".", 1)[-1] in ("left", "right", "clip")]
    projector = QuantizationConfig.parse("W4A4", method="flatquant", modules=("projector",))
    names = [n for n in abstract_params(vlm.config, projector) if n.endswith(".left")]
    assert names == ["projector.linear_1.left", "projector.linear_2.left"]
