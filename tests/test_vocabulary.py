"""8-bit token embeddings and head: values by hand, logits against a slow reference, files, exports,
refusals."""

from __future__ import annotations

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import quota_jax as qj
from converters import convert, export_compressed_tensors, export_native
from quota_jax.checkpoint import open_checkpoint
from quota_jax.cli import main
from quota_jax.errors import QuotaError
from quota_jax.models.params import build_model, flatten_params
from quota_jax.nn.vocabulary import VocabularyTable, quantize_table
from quota_jax.quant.calibrate import calibrate
from quota_jax.quant.calibration_data import Sample, make_batches
from quota_jax.quant.rtn import quantize_params
from quota_jax.quant.streaming import Stream
from quota_jax.quantization import QuantizationConfig
from tests.tiny_models import draw_picture, write_tiny_llava
from tests.tiny_qwen import write_tiny_qwen
from tests.tiny_tensors import read_folder

BOTH = QuantizationConfig.parse("W16A16KV16E8H8")
EMBED, HEAD = "decoder.embed", "decoder.head"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_rows_and_products_by_hand(dtype) -> None:
    """An odd vocabulary of odd width; rows of very different size, one of zeros."""
    rng = np.random.default_rng(0)
    size = 10.0 ** rng.uniform(-3, 1, (13, 1))
    weight = (rng.standard_normal((13, 7)) * size).astype(ml_dtypes.finfo(dtype).dtype)
    weight[4] = 0
    codes, scale = quantize_table(weight)
    assert (codes.dtype, scale.dtype, scale.shape) == (np.int8, weight.dtype, (13,))
    for row, code, step in zip(weight.astype(np.float64), codes, scale, strict=True):
        largest = np.abs(row).max()
        assert step > 0
        if not largest:
            assert not code.any()
            continue
        exact = largest / 127
        info = ml_dtypes.finfo(dtype)
        error = max(exact * float(info.eps), float(info.smallest_subnormal))
        assert abs(float(step) - exact) <= error
        expected = np.clip(np.round(np.float32(row) * (1 / np.float32(step))), -128, 127)
        np.testing.assert_array_equal(code, expected)

    table = VocabularyTable({"codes": jnp.asarray(codes), "scale": jnp.asarray(scale)}, bits=8)
    assert table.dtype == weight.dtype
    tokens = jnp.asarray([[0, 4, 12], [-1, 13, 99]])
    product = codes.astype(np.float32) * scale.astype(np.float32)[:, None]
    expected = product.astype(weight.dtype)[[[0, 4, 12], [0, 12, 12]]]
    np.testing.assert_array_equal(np.asarray(table.rows(tokens)), expected)

    x = rng.standard_normal((3, 7)).astype(weight.dtype)
    slow = x.astype(np.float64) @ (codes.astype(np.float64) * scale.astype(np.float64)[:, None]).T
    found = table.products(jnp.asarray(x))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, slow, rtol=1e-5, atol=1e-5 * np.abs(slow).max())
    one = table.products(jnp.asarray(x[1:2]))
    np.testing.assert_array_equal(one[0], found[1])


def test_simulated_rows_equal_stored_ones_and_have_gradients() -> None:
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((9, 6)).astype(np.float32)
    codes, scale = quantize_table(weight)
    stored = VocabularyTable({"codes": jnp.asarray(codes), "scale": jnp.asarray(scale)}, bits=8)
    tokens, x = jnp.asarray([3, 3, 8]), jnp.asarray(rng.standard_normal((4, 6)), jnp.float32)

    def simulated(weight):
        return VocabularyTable({"weight": weight}, bits=8)

    w = jnp.asarray(weight)
    np.testing.assert_array_equal(simulated(w).rows(tokens), stored.rows(tokens))
    np.testing.assert_array_equal(simulated(w).products(x), stored.products(x))
    assert (simulated(w).rows(tokens) != w[tokens]).any()
    by_rows = jax.grad(lambda w: simulated(w).rows(tokens).sum())(w)
    np.testing.assert_array_equal(by_rows[:, 0], [0, 0, 0, 2, 0, 0, 0, 0, 1])
    by_products = jax.grad(lambda w: simulated(w).products(x).sum())(w)
    # The step counts as constant: the gradient of x W^T.
    np.testing.assert_allclose(by_products, np.tile(x.sum(0), (9, 1)), rtol=1e-5)


def test_a_lookup_never_makes_the_whole_table_in_floats() -> None:
    """StableHLO for a GPU: rows are gathered as int8, and no float array has 4096 rows."""
    table = VocabularyTable(
        {"codes": jnp.zeros((4096, 24), jnp.int8), "scale": jnp.ones(4096, jnp.bfloat16)}, bits=8
    )

    def look(codes, scale, tokens):
        return VocabularyTable({"codes": codes, "scale": scale}, bits=8).rows(tokens)

    arrays = (table.codes[...], table.scale[...], jnp.zeros((2, 5), jnp.int32))
    text = jax.jit(look).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert re.search(r'"stablehlo.gather".*tensor<4096x24xi8>', text)
    assert not re.search(r"tensor<4096x24x(f32|bf16|f16)>", text)


@pytest.fixture(
    scope="module", params=[pytest.param("llava", marks=pytest.mark.slow), "qwen", "tied"]
)
def full(request, tmp_path_factory):
    """Full-precision checkpoints; the embeddings of the last are its head."""
    root = tmp_path_factory.mktemp("vocabulary")
    if request.param == "llava":
        write_tiny_llava(root / "hf", dtype="bfloat16")
    else:
        write_tiny_qwen(root / "hf", tie_word_embeddings=request.param == "tied")
    convert(root / "hf", root / "full")
    return root


def test_a_checkpoint_and_its_logits(full, tmp_path) -> None:
    """Equal to the full-precision model over the tables that a slow reference makes."""
    out = calibrate(full / "full", tmp_path / "ckpt", BOTH)
    before, after = open_checkpoint(full / "full"), open_checkpoint(out)
    tied = before.config.text.tie_word_embeddings
    assert after.quantization.label == "W16A16KV16E8H8"
    specs = after.block_specs("embeddings")
    assert {name: spec.dtype for name, spec in specs.items()} == {
        f"{EMBED}.codes": np.int8,
        f"{EMBED}.scale": before.dtype,
    }
    assert (f"{HEAD}.codes" in after.block_specs("head")) == (not tied)
    saved = before.sizes()["logical"] - after.sizes()["logical"]
    vocabulary, width = specs[f"{EMBED}.codes"].shape
    item = before.dtype.itemsize
    per_table = vocabulary * width * (item - 1) - vocabulary * item
    assert saved == per_table * (1 if tied else 2)

    params = flatten_params(qj.load(full / "full", dtype="float32").model)
    for stem in (EMBED,) if tied else (EMBED, HEAD):
        rows = []
        for row in np.asarray(params[f"{stem}.weight"], np.float64):
            step = np.float32(np.float32(np.abs(row).max() / 127).astype(before.dtype))
            rows.append(np.clip(np.round(np.float32(row) * (1 / step)), -128, 127) * step)
        params[f"{stem}.weight"] = jnp.asarray(np.stack(rows), jnp.float32)
    reference = build_model(before.config, None, params)
    vlm = qj.load(out, dtype="float32")
    assert vlm.model.dtype == jnp.float32
    picture = vlm.processor.placeholders["image"]
    prompts = [f"{picture}\nis there a red circle ?", "what is a car ?"]
    batch = vlm.processor(images=[[draw_picture(0)], []], prompts=prompts)
    logits, _ = qj.prefill(vlm.model, batch, recipe=vlm.recipe)
    expected, _ = qj.prefill(reference, batch, recipe=vlm.recipe)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
    if tied:
        tokens = qj.generate(vlm.model, batch, recipe=vlm.recipe, max_new_tokens=6).tokens
        again = qj.generate(reference, batch, recipe=vlm.recipe, max_new_tokens=6).tokens
        np.testing.assert_array_equal(tokens, again)
    if before.dtype != np.float32:
        stored = qj.load(out)
        assert stored.model.dtype == before.dtype
        short, _ = qj.prefill(stored.model, batch, recipe=vlm.recipe)
        np.testing.assert_allclose(short, expected, atol=0.2)


def test_the_quantized_feed_starts_from_quantized_embeddings(tmp_path) -> None:
    convert(write_tiny_llava(tmp_path / "hf"), tmp_path / "full")
    checkpoint, vlm = open_checkpoint(tmp_path / "full"), qj.load(tmp_path / "full")
    data = make_batches(vlm.processor, [Sample(text="what is a car ?")], 1)
    params = checkpoint.read_block("embeddings")
    stream = Stream(checkpoint.config, list(data.batches), BOTH)
    stream.inputs = [np.zeros((1, 0, checkpoint.config.text.hidden_size), np.float32)]
    stream.prepare("embeddings", quantize_params(params, BOTH))
    codes, scale = quantize_table(params[f"{EMBED}.weight"])
    rows = codes[data.batches[0].tokens] * scale[data.batches[0].tokens][..., None]
    np.testing.assert_array_equal(stream.inputs[0], rows)


def test_the_command_inspect_and_both_exports(tmp_path, capsys) -> None:
    convert(write_tiny_llava(tmp_path / "hf", dtype="float16"), tmp_path / "full")
    command = ["calibrate", str(tmp_path / "full"), "--bits", "W4A16", "--embedding-bits", "8"]
    assert main([*command, "--head-bits", "8", "--out", str(tmp_path / "ckpt")]) == 0
    assert "W4A16KV16E8H8" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "ckpt")]) == 0
    shown = capsys.readouterr().out
    full = open_checkpoint(tmp_path / "full")
    count = sum(
        int(np.prod(s.shape)) for b in full.block_names for s in full.block_specs(b).values()
    )
    assert "W4A16KV16E8H8 by rtn" in shown
    assert f"{count:,}" in shown

    checkpoint = open_checkpoint(tmp_path / "ckpt")
    stored = checkpoint.read_block("embeddings") | checkpoint.read_block("head")
    names = {"model.embed_tokens": EMBED, "lm_head": HEAD}
    export_native(tmp_path / "ckpt", tmp_path / "native")
    tensors = read_folder(tmp_path / "native")
    export_compressed_tensors(tmp_path / "ckpt", tmp_path / "ct")
    plain = read_folder(tmp_path / "ct")
    for name, stem in names.items():
        prefix = f"language_model.{name}."
        codes, scale = stored[f"{stem}.codes"], stored[f"{stem}.scale"]
        np.testing.assert_array_equal(tensors[prefix + "weight"], codes)
        np.testing.assert_array_equal(tensors[prefix + "weight_scale"], scale[:, None])
        values = (codes.astype(np.float32) * scale.astype(np.float32)[:, None]).astype(np.float16)
        np.testing.assert_array_equal(plain[prefix + "weight"], values)
        assert not any(key.startswith(prefix) and key != prefix + "weight" for key in plain)
    section = json.loads((tmp_path / "native" / "config.json").read_text())["quantization_config"]
    assert section["quota_jax"]["head_bits"] == 8
    assert main(["export", str(tmp_path / "ckpt"), "--out", str(tmp_path / "no")]) == 2
    assert "W4A16KV16E8H8" in capsys.readouterr().err


def test_a_tied_head_that_the_file_repeats_is_exported_with_its_scales(tmp_path) -> None:
    write_tiny_qwen(tmp_path / "hf", tie_word_embeddings=True, stored_head="copy")
    convert(tmp_path / "hf", tmp_path / "full")
    calibrate(tmp_path / "full", tmp_path / "ckpt", QuantizationConfig.parse("W8A8E8H8"))
    export_native(tmp_path / "ckpt", tmp_path / "native")
    tensors = read_folder(tmp_path / "native")
    for part in ("weight", "weight_scale", "weight_shape"):
        (embedding,) = [value for key, value in tensors.items() if key.endswith(f"tokens.{part}")]
        (head,) = [value for key, value in tensors.items() if key.endswith(f"lm_head.{part}")]
        np.testing.assert_array_equal(head, embedding)


def test_labels_and_what_is_refused(tmp_path) -> None:
    for label in ("W4A4KV4E8", "W4A4KV4H8", "W4A16KV16G128E8H8", "W16A16KV16E8"):
        config = QuantizationConfig.parse(label)
        assert config.label == label
        assert QuantizationConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
        assert config.has_integers
    assert not QuantizationConfig.parse("W16A16KV4").has_integers
    old = QuantizationConfig.parse("W4A4KV4").to_json()
    del old["embedding_bits"], old["head_bits"], old["layer_bits"]
    assert QuantizationConfig.from_json(old) == QuantizationConfig.parse("W4A4KV4")
    with pytest.raises(QuotaError, match="embedding_bits must be 8 or 16, got 4"):
        QuantizationConfig.parse("W4A4KV4E4")
    with pytest.raises(QuotaError, match="method 'none' cannot carry W16A16KV16H8"):
        QuantizationConfig(head_bits=8)
    with pytest.raises(QuotaError, match="needs quantized weights"):
        QuantizationConfig.parse("W16A16KV16E8H8", method="gptq")

    write_tiny_qwen(tmp_path / "hf", tie_word_embeddings=True)
    convert(tmp_path / "hf", tmp_path / "full")
    with pytest.raises(QuotaError, match="this model's head is its token embedding"):
        calibrate(tmp_path / "full", tmp_path / "no", dataclasses.replace(BOTH, head_bits=16))
    assert not list(tmp_path.glob("no*"))
    calibrate(tmp_path / "full", tmp_path / "e8h8", BOTH)
    with pytest.raises(QuotaError, match="no export holds 8-bit embeddings"):
        export_native(tmp_path / "e8h8", tmp_path / "native")
