"""LUQ: entropies and bits worked out by hand, and whole runs on both families."""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import pytest

import quota_jax as qj
from converters import convert, export_compressed_tensors
from pallas_kernels.packing import unpack_int4, unpack_uint4
from quota_jax.checkpoint import Checkpoint, open_checkpoint
from quota_jax.cli import main
from quota_jax.errors import QuotaError
from quota_jax.models.params import abstract_params, blocks, build_model
from quota_jax.quant.calibrate import calibrate
from quota_jax.quant.calibrate_luq import layer_entropies
from quota_jax.quant.calibration_data import Sample, make_batches
from quota_jax.quant.gptq import GptqOptions
from quota_jax.quant.luq import LuqOptions, allocate, entropy
from quota_jax.quantization import QuantizationConfig
from tests.tiny_models import draw_picture, write_tiny_llava
from tests.tiny_qwen import write_tiny_qwen

OPTIONS = LuqOptions(gptq=GptqOptions(batch_size=2))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([7.0] * 5, 0.0),  # no spread at all
        ([1.0, 3.0], 1.0),  # two values: z = -1 and 1
        ([-1.0, -1.0, -1.0, 5.0], 2 - 0.75 * np.log2(3)),  # three quarters and one
        ([0.0, 1.0, 2.0, 3.0] * 3, 2.0),  # z = -1.34, -0.45, 0.45, 1.34: four bins
        # One of a thousand lies far out, in the outermost bin.
        ([0.0] * 999 + [1e6], -0.999 * np.log2(0.999) - 0.001 * np.log2(0.001)),
    ],
)
def test_entropies_by_hand(values, expected) -> None:
    assert entropy([np.array(values, np.float32)]) == pytest.approx(expected, abs=1e-12)
    # Neither how values are cut up, nor scale, nor an offset matters.
    parts = [np.array(values[:1], np.float32), np.array(values[1:], np.float32)]
    assert entropy(parts) == pytest.approx(expected, abs=1e-12)
    scaled = np.array(values, np.float64) * 64 - 512
    assert entropy([scaled]) == pytest.approx(expected, abs=1e-12)


def test_the_entropy_of_known_densities() -> None:
    """Differential entropy of the standardized density, less log2 of the bins' width 8/256."""
    rng = np.random.default_rng(0)
    normal = rng.standard_normal((20, 10000)).astype(np.float32)
    expected = 0.5 * np.log2(2 * np.pi * np.e)
    assert entropy([normal]) == pytest.approx(expected + 5, abs=0.01)
    assert entropy([normal], bins=16) == pytest.approx(expected + 1, abs=0.05)
    flat = rng.random(200000)
    assert entropy([flat * 3 + 1e4]) == pytest.approx(np.log2(np.sqrt(12)) + 5, abs=0.02)
    # Two huge channels: the rest shares a few bins around zero.
    outliers = normal.copy()
    outliers[:, :2] *= 1000
    assert entropy([outliers]) < 3.5
    for bad in ([], [np.zeros((0, 4))]):
        with pytest.raises(QuotaError, match="no values"):
            entropy(bad)
    with pytest.raises(QuotaError, match="not finite"):
        entropy([np.array([1, np.nan])])


@pytest.mark.parametrize(
    ("entropies", "mean", "low", "expected"),
    [
        ([3.0, 1.0, 2.0, 4.0], 3.0, 2, (4, 2, 2, 4)),
        ([3.0, 1.0, 2.0, 4.0], 4.0, 2, (4, 4, 4, 4)),
        ([3.0, 1.0, 2.0, 4.0], 2.0, 2, (2, 2, 2, 2)),
        ([3.0, 1.0, 2.0, 4.0], 3.4, 3, (3, 3, 3, 4)),  # 2.4 layers: three, so that 3.4 holds
        ([1.0, 1.0, 1.0], 3.4, 2, (2, 4, 4)),  # ties: the first
        ([float(i) for i in range(10)], 3.2, 2, (2,) * 4 + (4,) * 6),  # not five
    ],
)
def test_bits_of_layers(entropies, mean, low, expected) -> None:
    assert allocate(entropies, mean, low) == expected
    assert sum(expected) / len(expected) <= mean


def test_what_options_and_configurations_refuse() -> None:
    with pytest.raises(QuotaError, match="low_bits must be 2 or 3, got 1"):
        LuqOptions(low_bits=1)
    with pytest.raises(QuotaError, match=r"between low_bits \(3\) and 4, got 2.5"):
        LuqOptions(low_bits=3, mean_bits=2.5)
    with pytest.raises(QuotaError, match="bins"):
        LuqOptions(bins=1)
    with pytest.raises(QuotaError, match="belong to method 'luq', not 'gptq'"):
        QuantizationConfig(method="gptq", weight_bits=4, layer_bits=(4, 2))
    with pytest.raises(QuotaError, match="2, 3 or 4 bits, not 8"):
        QuantizationConfig(method="luq", weight_bits=4, layer_bits=(4, 8))
    with pytest.raises(QuotaError, match="needs 4-bit weights"):
        QuantizationConfig(method="luq", weight_bits=8)
    with pytest.raises(QuotaError, match="needs 4-bit weights, of the decoder"):
        QuantizationConfig(method="luq", weight_bits=4, modules=("vision",))


def samples(count: int) -> list[Sample]:
    texts = ("is there a red circle ?", "what is a car ?")
    return [
        Sample(text=texts[i % 2], image=draw_picture(i) if i % 3 else None) for i in range(count)
    ]


def largest_code(checkpoint: Checkpoint, block: str) -> tuple[int, int]:
    """The smallest and largest code of all packed matrices of a block."""
    unpack = unpack_int4 if checkpoint.quantization.symmetric else unpack_uint4
    codes = [
        np.asarray(unpack(jnp.asarray(value)))
        for name, value in checkpoint.read_block(block).items()
        if name.endswith(".packed")
    ]
    return min(int(c.min()) for c in codes), max(int(c.max()) for c in codes)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llava", "qwen"])
def test_a_model_end_to_end_and_a_killed_run(family, tmp_path, capsys) -> None:
    """LLaVA weight-only by the command, with zero points; Qwen with 4-bit activations."""
    write = write_tiny_llava if family == "llava" else write_tiny_qwen
    convert(write(tmp_path / "hf", num_layers=3), tmp_path / "full")
    full, vlm = open_checkpoint(tmp_path / "full"), qj.load(tmp_path / "full")
    given = samples(3)
    data = make_batches(vlm.processor, given, 2)
    found = layer_entropies(full, data, OPTIONS)
    low = int(np.argmin(found))
    expected = tuple(2 if layer == low else 4 for layer in range(3))
    config = QuantizationConfig.parse(
        "W4A16G16" if family == "llava" else "W4A4KV4",
        method="luq",
        modules=("decoder",),
        symmetric=family != "llava",
    )
    options = LuqOptions(mean_bits=3.34, gptq=OPTIONS.gptq)

    class Killed(Exception):
        pass

    def kill(name: str, done: int, total: int) -> None:
        if name == "decoder_layer_001":
            raise Killed

    out = tmp_path / "luq"
    with pytest.raises(Killed):
        calibrate(full.path, out, config, samples=given, options=options, progress=kill)
    done = sorted(path.name for path in (tmp_path / "luq.partial" / "state").iterdir())
    assert "decoder_layer_001" in done
    assert "decoder_layer_002" not in done
    seen: list[str] = []
    calibrate(
        full.path,
        out,
        config,
        samples=given,
        options=options,
        report=lambda block: seen.append(block.name),
    )
    assert seen == ["decoder_layer_002"]
    first = open_checkpoint(out)
    assert first.quantization.layer_bits == expected
    assert first.provenance["calibration"]["entropies"] == found
    if family == "qwen":
        calibrate(full.path, tmp_path / "whole", config, samples=given, options=options)
        whole = open_checkpoint(tmp_path / "whole")
        for block in first.block_names:
            mine, other = first.read_block(block), whole.read_block(block)
            for name, value in mine.items():
                np.testing.assert_array_equal(value, other[name], err_msg=name)

    for layer, bits in enumerate(expected):
        lowest, highest = largest_code(first, f"decoder_layer_{layer:03d}")
        top = 2**bits - 1 if family == "llava" else 2 ** (bits - 1) - 1
        assert highest == top
        assert lowest >= (0 if family == "llava" else -top - 1)
    sizes = first.sizes()
    packed = sum(
        spec.size
        for name, spec in first.block_specs(f"decoder_layer_{low:03d}").items()
        if name.endswith(".packed")
    )
    assert sizes["logical"] - sizes["effective"] == packed // 2
    assert main(["inspect", str(out)]) == 0
    shown = capsys.readouterr().out
    assert f"2 bits in decoder layers {low}; 4 bits in" in shown
    assert "(mean 3.33)" in shown
    assert "stored in 4" in shown

    model = qj.load(out)
    batch = model.processor(images=[[]], prompts=["what is a car ?"])
    tokens = qj.generate(model.model, batch, recipe=model.recipe, max_new_tokens=4).tokens
    assert tokens.shape == (1, 4)
    if family == "llava":
        export_compressed_tensors(out, tmp_path / "ct")
        again = open_checkpoint(convert(tmp_path / "ct", tmp_path / "again"))
        name = f"decoder_layer_{low:03d}"
        for key, value in again.read_block(name).items():
            np.testing.assert_array_equal(value, first.read_block(name)[key], err_msg=key)


def test_entropies_are_those_of_the_models_own_states(tmp_path) -> None:
    """Layer by layer through the stacked model; padding and copies that fill a batch are left
    out."""
    convert(write_tiny_llava(tmp_path / "hf"), tmp_path / "full")
    vlm = qj.load(tmp_path / "full")
    data = make_batches(vlm.processor, samples(3), 2)
    found = layer_entropies(open_checkpoint(tmp_path / "full"), data, OPTIONS)
    states: list[list[np.ndarray]] = [[], []]
    for batch, count in zip(data.batches, data.counts, strict=True):
        x, sequence, _ = vlm.model.decoder_input(batch, vlm.recipe)
        for layer in range(2):
            x = vlm.model.decoder.layer(x, sequence, jnp.int32(layer))[0]
            states[layer] += [np.asarray(x[b, : batch.lengths[b]]) for b in range(count)]
    np.testing.assert_allclose(found, [entropy(part) for part in states], atol=2e-3)


@pytest.mark.slow
def test_the_command_and_bits_given_beforehand(tmp_path, capsys) -> None:
    convert(write_tiny_llava(tmp_path / "hf"), tmp_path / "full")
    data = tmp_path / "calib.json"
    data.write_text(json.dumps([{"text": sample.text} for sample in samples(2)]))
    command = ["calibrate", str(tmp_path / "full"), "--method", "luq", "--group", "16"]
    assert (
        main(
            [
                *command,
                "--data",
                str(data),
                "--mean-bits",
                "3.5",
                "--low-bits",
                "3",
                "--modules",
                "decoder",
                "--out",
                str(tmp_path / "a"),
            ]
        )
        == 0
    )
    stored = open_checkpoint(tmp_path / "a").quantization
    assert sorted(stored.layer_bits) == [3, 4] or stored.layer_bits == (3, 3)
    assert (stored.label, stored.symmetric) == ("W4A16KV16G16", False)
    capsys.readouterr()
    assert main([*command[:2], "--mean-bits", "2.5", "--out", str(tmp_path / "no")]) == 2
    assert "--mean-bits is of no use to --method rtn" in capsys.readouterr().err

    fixed = QuantizationConfig(method="luq", weight_bits=4, modules=("decoder",), layer_bits=(3, 2))
    calibrate(tmp_path / "full", tmp_path / "b", fixed, samples=samples(1), options=OPTIONS)
    checkpoint = open_checkpoint(tmp_path / "b")
    assert checkpoint.quantization.layer_bits == (3, 2)
    assert "entropies" not in checkpoint.provenance["calibration"]
    short = QuantizationConfig(method="luq", weight_bits=4, layer_bits=(3,))
    with pytest.raises(QuotaError, match="of 1 layers: the decoder has 2"):
        blocks(checkpoint.config, short)
    params = abstract_params(checkpoint.config)
    with pytest.raises(QuotaError, match="stored integers only"):
        build_model(checkpoint.config, fixed, params)


@pytest.mark.parametrize(("bits", "lowest", "highest"), [(2, -2, 1), (3, -4, 3)])
def test_uniform_low_bits_are_stored_in_four(tmp_path, bits, lowest, highest) -> None:
    convert(write_tiny_llava(tmp_path / "hf"), tmp_path / "full")
    config = QuantizationConfig.parse(f"W{bits}A16")
    checkpoint = open_checkpoint(calibrate(tmp_path / "full", tmp_path / "low", config))
    found = largest_code(checkpoint, "decoder_layer_000")
    assert lowest <= found[0] < 0 < found[1] == highest
    sizes = checkpoint.sizes()
    packed = sum(
        spec.size
        for block in checkpoint.block_names
        for name, spec in checkpoint.block_specs(block).items()
        if name.endswith(".packed")
    )
    assert sizes["logical"] - sizes["effective"] == packed * (4 - bits) // 4
