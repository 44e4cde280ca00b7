"""Bytes, operations and floors of real shapes against numbers by hand, and how they are drawn."""

from __future__ import annotations

import io
import itertools
from pathlib import Path

import jax.numpy as jnp
import pytest
from PIL import Image

from quota_jax.bench.roofline import PEAKS, Peaks, peaks_of
from quota_jax.bench.work import CacheUse, Work, decode_work, prefill_work
from quota_jax.config import PRESETS
from quota_jax.errors import QuotaError
from quota_jax.figures.roofline_plot import Point, draw_roofline, find_room, label_of, spread_out
from quota_jax.flops import executed_flops
from quota_jax.models.params import abstract_params
from quota_jax.quantization import QuantizationConfig
from quota_jax.recipe import Recipe

LLAVA = PRESETS["llava_1_5_7b"]
H100 = PEAKS["NVIDIA H100 80GB HBM3"]
LINEARS = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
"""Weights of the linears of LLaVA-1.5-7B's decoder."""
HEAD = 32064 * 4096
PRUNED = Recipe.uniform(num_layers=32, layers=[2, 3, 4, 5, 6], keep=0.3)


def weights(label: str, preset: str = "llava_1_5_7b") -> dict[str, int]:
    specs = abstract_params(PRESETS[preset], QuantizationConfig.parse(label), jnp.bfloat16)
    return {name: spec.size * spec.dtype.itemsize for name, spec in specs.items()}


def dense_cache(batch: int) -> CacheUse:
    """The unpruned cache of 640 tokens in bfloat16, with room for 768."""
    size = 32 * batch * 768 * 2 * 4096 * 2
    return CacheUse(num_layers=32, nbytes=size, capacity=768, lengths=(640,) * batch)


@pytest.mark.parametrize("batch", [1, 8])
def test_a_decode_step_in_bfloat16_reads_decoder_head_and_cache(batch: int):
    bits = "W16A16KV16"
    work = decode_work(
        LLAVA,
        QuantizationConfig.parse(bits),
        weights(bits),
        [dense_cache(batch)],
        batch_size=batch,
        new_tokens=64,
    )
    norms = 65 * 4096
    # Step i reads 640 + i tokens, the mean of i over 64 steps is 32.5.
    tokens = batch * 672.5
    assert work.bytes == 2 * (LINEARS + HEAD + norms) + tokens * 32 * 2 * 4096 * 2
    assert work.float_ops == 2 * batch * (LINEARS + HEAD) + 2 * tokens * 32 * 2 * 4096
    assert work.integer_ops == 0
    if batch == 1:
        assert work.bytes == 13_567_795_200
        assert H100.seconds(work) == pytest.approx(4.050e-3, rel=1e-3)


def test_four_bit_linears_count_as_integers_and_read_a_quarter():
    quantization = QuantizationConfig.parse("W4A4KV16")
    stored = weights("W4A4KV16")
    work = decode_work(LLAVA, quantization, stored, [dense_cache(1)], batch_size=1, new_tokens=64)
    scales = 32 * 4 * (3 * 4096 + 4096 + 2 * 11008 + 4096)
    cache = round(672.5 * 32 * 2 * 4096 * 2)
    assert work.bytes == LINEARS // 2 + scales + 2 * (HEAD + 65 * 4096) + cache
    assert work.integer_ops == 2 * LINEARS
    assert work.float_ops == 2 * HEAD + round(2 * 672.5 * 32 * 2 * 4096)
    # Inputs in 16 bits: the same bytes, nothing is multiplied in integers.
    floats = decode_work(
        LLAVA,
        QuantizationConfig.parse("W4A16KV16"),
        stored,
        [dense_cache(1)],
        batch_size=1,
        new_tokens=64,
    )
    assert floats == Work(bytes=work.bytes, float_ops=work.operations, integer_ops=0)


def test_a_prefill_reads_all_weights_but_the_embeddings():
    caches = [dense_cache(2)]
    shape = {"batch_size": 2, "visual_tokens": 576, "text_tokens": 64}
    for bits in ("W16A16KV16", "W4A4KV16"):
        stored, quantization = weights(bits), QuantizationConfig.parse(bits)
        work = prefill_work(LLAVA, quantization, Recipe.none(32), stored, caches, **shape)
        cache = 2 * 640 * 32 * 2 * 4096 * 2
        assert work.bytes == sum(stored.values()) - 2 * HEAD + cache
        flops = executed_flops(LLAVA, Recipe.none(32), visual_tokens=576, text_tokens=64)
        assert work.operations == 2 * 2 * flops.total
        # 23 layers of the tower over 577 tokens, two matrices of the projector over 576.
        tower = 23 * 577 * (4 * 1024**2 + 2 * 1024 * 4096)
        linears = 640 * LINEARS + tower + 576 * (1024 + 4096) * 4096
        assert work.integer_ops == (4 * linears if bits.startswith("W4") else 0)


def test_pruning_takes_operations_and_no_weights():
    stored, quantization = weights("W4A4KV16"), QuantizationConfig.parse("W4A4KV16")
    shape = {"batch_size": 1, "visual_tokens": 576, "text_tokens": 64}
    whole, pruned = (
        prefill_work(LLAVA, quantization, recipe, stored, [], **shape)
        for recipe in (Recipe.none(32), PRUNED)
    )
    assert pruned.bytes == whole.bytes
    # Layers 2 to 6 leave 496, 415, 335, 254 and 173 of 576; attention sees what comes in.
    incoming = 3 * 576 + 496 + 415 + 335 + 254 + 25 * 173 + 32 * 64
    left = 2 * 576 + 496 + 415 + 335 + 254 + 26 * 173 + 32 * 64
    decoder = incoming * 4 * 4096**2 + left * 3 * 4096 * 11008
    assert whole.integer_ops - pruned.integer_ops == 2 * (640 * LINEARS - decoder)


def test_a_tied_head_is_read_in_every_step():
    preset, bits = PRESETS["qwen2_5_vl_3b"], "W16A16KV16"
    stored = weights(bits, "qwen2_5_vl_3b")
    quantization = QuantizationConfig.parse(bits)
    work = decode_work(preset, quantization, stored, [], batch_size=1, new_tokens=1)
    assert work.bytes == sum(size for name, size in stored.items() if name.startswith("decoder."))
    prefill = prefill_work(
        preset,
        quantization,
        Recipe.none(36),
        stored,
        [],
        batch_size=1,
        visual_tokens=1296,
        text_tokens=64,
    )
    assert prefill.bytes == sum(stored.values())


def test_a_floor_is_the_longer_of_bytes_and_operations():
    peaks = Peaks(bandwidth=10.0, float_ops=100.0, integer_ops=200.0)
    assert peaks.seconds(Work(bytes=50, float_ops=100, integer_ops=200)) == 5
    # Operations of both kinds follow each other.
    assert peaks.seconds(Work(bytes=5, float_ops=100, integer_ops=200)) == 2
    assert Work(bytes=5, float_ops=100, integer_ops=200).intensity == 60


def test_peaks_come_from_the_table_or_the_options():
    assert peaks_of("NVIDIA H200") == Peaks(bandwidth=4.8e12, float_ops=989e12, integer_ops=1979e12)
    assert peaks_of("NVIDIA H200", bandwidth=4) == Peaks(
        bandwidth=4e12, float_ops=989e12, integer_ops=1979e12
    )
    assert peaks_of("cpu") is peaks_of("cpu", bandwidth=1) is peaks_of("cpu", peak=(1, 2)) is None
    found = Peaks(bandwidth=1e12, float_ops=1e12, integer_ops=2e12)
    assert peaks_of("cpu", bandwidth=1, peak=(1, 2)) == found
    with pytest.raises(QuotaError, match="--peak must be positive, got nan"):
        peaks_of("cpu", peak=(1, float("nan")))


def point(series: str, kept: float, batch: int, stage, x: float, y: float) -> Point:
    return Point(series=series, kept=kept, batch_size=batch, stage=stage, x=x, y=y)


def test_near_points_share_a_line():
    points = [point(name, kept, 8, "decode", 1, 1) for name in "ab" for kept in (1, 0.3)]
    assert label_of(points) == ["a, batch 8: 100, 30 %", "b, batch 8: 100, 30 %"]


def test_labels_do_not_overlap():
    assert spread_out([1, 1.1, 3], [1, 1, 1], 0, 10) == pytest.approx([1, 2, 3])
    assert spread_out([3, 1.1, 1], [1, 1, 1], 0, 3) == pytest.approx([2.5, 1.5, 0.5])
    spots = [(1.0 + 0.1 * n, 2.0 + 0.1 * n) for n in range(6)]
    boxes = [(1.2, 0.14 * (1 + n % 2)) for n in range(6)]
    places = find_room(spots, boxes, spots)
    areas = [
        (x, y - height / 2, x + width, y + height / 2)
        for (x, y), (width, height) in zip(places, boxes, strict=True)
    ]
    for one, two in itertools.combinations(areas, 2):
        assert one[2] <= two[0] or two[2] <= one[0] or one[3] <= two[1] or two[3] <= one[1]
    for left, low, right, high in areas:
        assert not any(left < x < right and low < y < high for x, y in spots)


def test_the_roofline_is_drawn_and_equal_each_time(tmp_path: Path):
    points = [
        point(name, kept, batch, stage, x * batch, y * batch)
        for name in ("W4A4KV4", "bf16")
        for kept in (0.3, 1)
        for batch in (1, 8)
        for stage, x, y in (("prefill", 400, 1e14), ("decode", 1, 1e12))
    ]
    files = []
    for suffix in ("png", "png", "svg"):
        path = tmp_path / f"roof.{suffix}"
        draw_roofline(points, H100, path, title="title")
        files.append(path.read_bytes())
    assert files[0] == files[1]
    image = Image.open(io.BytesIO(files[0]))
    image.load()
    assert min(image.size) > 300
    assert b"3.35 TB/s" in files[2]
