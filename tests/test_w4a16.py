"""Group scales: codes by hand, simulated equal to packed, the command, what is refused."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from converters import convert
from pallas_kernels.packing import pack_int4
from quota_jax.checkpoint import open_checkpoint
from quota_jax.cli import main
from quota_jax.errors import QuotaError
from quota_jax.models.params import abstract_params, flatten_params
from quota_jax.nn.linear import Linear
from quota_jax.quant.groups import Groups
from quota_jax.quant.rtn import quantize_params
from quota_jax.quantization import QuantizationConfig
from tests.tiny_qwen import write_tiny_qwen

STORED = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def slow_groups(
    weight: np.ndarray, grid: Groups, found: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, scales and zeros of one weight after another. XLA may divide by a constant with an
    error of one ulp: so near to ours the scales ``found`` count."""
    rows, columns = weight.shape
    size = grid.size or columns
    count = -(-columns // size)
    dtype = STORED[grid.scale_dtype or "float32"]
    codes = np.zeros((rows, columns), int)
    scales, zeros = np.zeros((rows, count), dtype), np.zeros((rows, count), int)
    top = 2 ** (grid.bits - 1) - 1 if grid.symmetric else 2**grid.bits - 1
    for n in range(rows):
        for g in range(count):
            part = weight[n, g * size : (g + 1) * size].astype(np.float32)
            low, high = min(part.min(), np.float32(0)), max(part.max(), np.float32(0))
            span = max(high, -low) if grid.symmetric else high - low
            scale = np.float32(max(span, np.float32(1e-8)) / np.float32(top))
            tiny = ml_dtypes.finfo(dtype).smallest_normal
            scale = np.float32(max(scale, np.float32(tiny)).astype(dtype))
            if np.isclose(scale, np.float32(found[n, g]), rtol=2e-7, atol=0):
                scale = np.float32(found[n, g])
            bottom = -top - 1 if grid.symmetric else 0
            if not grid.symmetric:
                zeros[n, g] = min(max(np.round(-low / scale), 0), top)
            scales[n, g] = scale
            for j, value in enumerate(part):
                code = np.round(value / scale) + zeros[n, g]
                codes[n, g * size + j] = min(max(code, bottom), top)
    return codes, scales, zeros


@pytest.mark.parametrize(
    ("size", "kind", "symmetric"),
    [(0, "float32", False), (8, "float16", True), (16, "bfloat16", False)],
)
def test_codes_scales_and_zeros_are_those_worked_out_one_by_one(size, kind, symmetric) -> None:
    rng = np.random.default_rng(3)
    weight = rng.standard_normal((6, 42)).astype(np.float32)
    weight[1] = 0
    weight[2] = np.abs(weight[2]) + 1
    weight[3] *= 1e-9
    weight[4, :9] *= 100
    grid = Groups(bits=4, size=size, symmetric=symmetric, scale_dtype=kind)
    codes, scale, zeros = grid.quantize(jnp.asarray(weight))
    expected = slow_groups(weight, grid, np.asarray(scale))
    np.testing.assert_array_equal(codes, expected[0])
    assert scale.dtype == jnp.dtype(kind)
    np.testing.assert_array_equal(scale, expected[1])
    assert (zeros is None) == symmetric
    if zeros is not None:
        np.testing.assert_array_equal(zeros, expected[2])
    found = grid.dequantize(codes, scale, zeros)
    group = np.arange(42) // (size or 42)
    steps = expected[1].astype(np.float32)[:, group]
    np.testing.assert_array_equal(
        found, (expected[0] - expected[2][:, group]).astype(np.float32) * steps
    )
    # Nothing is further away than half a step, but for the scale's own rounding.
    assert (np.abs(found - weight) <= 0.5 * steps * (1 + 2**-4) + 1e-12).all()


@pytest.mark.parametrize(("symmetric", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_a_layer_of_a_stack_simulated_packed_and_by_hand(symmetric, dtype) -> None:
    """Short last group, input scale, 8-bit codes; a row's bits do not depend on its neighbors."""
    rng = np.random.default_rng(0)
    weight = jnp.asarray(rng.standard_normal((3, 10, 44)), dtype)
    inputs = jnp.asarray(rng.random(44) + 0.5, jnp.float32)
    bias = jnp.asarray(rng.standard_normal((3, 10)), jnp.float32)
    x = jnp.asarray(rng.standard_normal((5, 44)), dtype)
    for bits in (4, 8) if symmetric else (4,):
        grid = Groups(bits=bits, size=16, symmetric=symmetric)
        codes, scale, zeros = grid.quantize(weight)
        packed = {"packed": pack_int4(codes)} if bits == 4 else {"codes": codes}
        stored = {**packed, "scale": scale} | ({} if symmetric else {"zeros": zeros})
        more = {"bias": bias, "input_scale": jnp.tile(inputs, (3, 1))}
        run = jax.jit(lambda module, x, layer: module(x, layer))
        simulated, real = (
            Linear({**part, **more}, weight_bits=bits, groups=grid)
            for part in ({"weight": weight}, stored)
        )
        found = run(real, x, jnp.int32(2))
        np.testing.assert_array_equal(found, run(simulated, x, jnp.int32(2)))
        np.testing.assert_array_equal(found[:1], run(real, x[:1], jnp.int32(2)))
        third = None if zeros is None else zeros[2]
        whole = np.asarray(grid.dequantize(codes[2], scale[2], third))
        whole = whole.astype(x.dtype).astype(np.float64)
        scaled = np.asarray((x.astype(jnp.float32) * inputs).astype(x.dtype), np.float64)
        expected = scaled @ whole.T + np.asarray(bias[2], np.float64)
        tolerance = 1e-5 if dtype == "float32" else 2**-7
        np.testing.assert_allclose(
            np.asarray(found, np.float64), expected, rtol=tolerance, atol=tolerance
        )


def test_groups_that_are_named_by_an_index_for_each_part_of_the_rows() -> None:
    rng = np.random.default_rng(1)
    parts = (4, 2, 2)
    codes = rng.integers(0, 16, (8, 12))
    scale, zeros = rng.random((8, 3)).astype(np.float32), rng.integers(0, 17, (8, 3))
    index = np.stack([rng.permutation(np.arange(12) // 4) for _ in parts])
    module = Linear(
        {
            "packed": pack_int4(jnp.asarray(codes)),
            "scale": jnp.asarray(scale),
            "zeros": jnp.asarray(zeros, jnp.uint8),
            "group_index": jnp.asarray(index, jnp.int32),
        },
        weight_bits=4,
        groups=Groups(bits=4, size=4, symmetric=False),
        parts=parts,
    )
    found = np.asarray(module(jnp.eye(12, dtype=jnp.float32))).T
    for n in range(8):
        which = index[0 if n < 4 else 1 if n < 6 else 2]
        for k in range(12):
            g = which[k]
            assert found[n, k] == np.float32(codes[n, k] - zeros[n, g]) * scale[n, g]


def test_a_checkpoint_of_groups_by_the_command(tmp_path, capsys) -> None:
    convert(write_tiny_qwen(tmp_path / "hf", dtype="bfloat16"), tmp_path / "full")
    out = tmp_path / "w4"
    command = ["calibrate", str(tmp_path / "full"), "--out", str(out), "--bits", "W4A16KV4"]
    assert main([*command, "--group", "20", "--asymmetric"]) == 0
    assert main(["inspect", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "W4A16KV4G20 by rtn" in shown
    assert "groups of 20, with zero points, bfloat16 scales" in shown
    assert main(["inspect", str(tmp_path / "full")]) == 0
    line = next(line for line in shown.splitlines() if line.startswith("parameters"))
    assert line in capsys.readouterr().out
    checkpoint = open_checkpoint(out)
    params = flatten_params(checkpoint.load_model())
    specs = abstract_params(checkpoint.config, checkpoint.quantization)
    assert {n: (v.shape, v.dtype) for n, v in params.items() if "attn" in n} == {
        n: (s.shape, jnp.bfloat16 if n.endswith("bias") else s.dtype)
        for n, s in specs.items()
        if "attn" in n
    }
    block = open_checkpoint(tmp_path / "full").read_block("decoder_layer_001")
    found = checkpoint.read_block("decoder_layer_001")
    for name, value in quantize_params(block, checkpoint.quantization).items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_configurations() -> None:
    parse = QuantizationConfig.parse
    config = parse("w4a16g128", symmetric=False)
    assert (config.group, config.label) == (128, "W4A16KV16G128")
    assert QuantizationConfig.from_json(config.to_json()) == config
    assert parse(config.label, symmetric=False) == config
    # Checkpoints from before groups existed.
    old = {k: v for k, v in parse("W4A4").to_json().items() if k in ("method", "weight_bits")}
    assert QuantizationConfig.from_json(old) == parse("W4A16")
    cases: tuple[tuple[str, dict[str, Any], str], ...] = (
        ("W4A8G128", {}, "W4A8 has one symmetric scale"),
        ("W4A4", {"symmetric": False}, "W4A4 has one symmetric scale"),
        ("W8A16", {"symmetric": False}, "4-bit weights only"),
        ("W4A16G128", {"method": "flatquant"}, "no group scales"),
        ("W4A8", {"method": "awq"}, "quantizes weights only"),
        ("W4A16G", {}, "do not read like"),
    )
    for label, options, match in cases:
        with pytest.raises(QuotaError, match=match):
            parse(label, **options)
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"group": -1}, "got -1"),
        ({"scale_dtype": "float16"}, "needs groups"),
        ({"group": 4, "scale_dtype": "int8"}, "'int8' is unknown"),
        ({"act_order": True}, "act_order needs groups"),
        ({"input_scales": ("projector.linear_1",)}, "belong to method 'awq'"),
    )
    for fields, match in wrong:
        with pytest.raises(QuotaError, match=match):
            QuantizationConfig(method="rtn", weight_bits=4, **fields)
