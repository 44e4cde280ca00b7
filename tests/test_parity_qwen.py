"""Qwen2.5-VL against transformers in float32: logits and greedy tokens; padding, compilation."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_processing_qwen import IMAGE, USER, VIDEO, picture
from tiny_qwen import load_oracle, write_tiny_qwen

import quota_jax as qj
from converters import convert
from quota_jax.generation import _prefill, decode_chunk, forward
from quota_jax.processing import Buckets
from quota_jax.quant.calibrate import calibrate
from quota_jax.quantization import QuantizationConfig
from quota_jax.recipe import Recipe

CASES: dict[str, dict[str, Any]] = {
    "gqa": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16},
    "tied_64": {"num_heads": 2, "num_kv_heads": 1, "head_dim": 64, "tie_word_embeddings": True},
    "tower_80": {"vision_head_dim": 80, "vision_num_heads": 2, "full_attention_layers": (0, 2)},
    "all_full": {"full_attention_layers": (0, 1, 2), "vision_layers": 3, "old_config": True},
    "no_full": {"full_attention_layers": (), "head_dim": 40, "num_heads": 6, "num_kv_heads": 3},
    "mha_80": {"head_dim": 80, "num_heads": 3, "num_kv_heads": 3, "window_size": 56},
    "sections": {"mrope_section": (4, 1, 3), "head_dim": 16, "num_layers": 4},
}
SETS = {
    "cut windows": [[(100, 200)], [(300, 90), (60, 60), (250, 250)], []],
    "tiny and wide": [[(1, 1)], [(500, 20), (30, 31), (112, 112)], [(20, 500)]],
}


def question(count: int) -> str:
    return f"{USER}what color" + "".join(f"{IMAGE}the car" for _ in range(count)) + "is"


def oracle_answer(vlm, oracle, images, batch, row: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits at every place of a row, and 32 greedy tokens."""
    import torch

    length = int(batch.lengths[row])
    ids = np.asarray(batch.tokens[row, :length])[None].astype(np.int64)
    inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.ones(ids.shape, dtype=int)}
    config = vlm.config
    kinds = (ids == config.image_token_id) + 2 * (ids == config.video_token_id)
    inputs["mm_token_type_ids"] = torch.tensor(kinds)
    stills = [image for image in images if not isinstance(image, qj.Video)]
    if stills:
        made = vlm.processor.pictures.image_processor(stills, return_tensors="pt")
        inputs |= {name: made[name] for name in ("pixel_values", "image_grid_thw")}
    for video in (image for image in images if isinstance(image, qj.Video)):
        read = vlm.processor.pictures.read(video, "video")
        inputs["pixel_values_videos"] = torch.tensor(read.pixels.reshape(-1, read.pixels.shape[-1]))
        inputs["video_grid_thw"] = torch.tensor([read.grid])
        inputs["second_per_grid_ts"] = torch.tensor([2 / video.fps])
    oracle.model.rope_deltas = None
    with torch.no_grad():
        logits = oracle(**inputs).logits[0].numpy()
        oracle.model.rope_deltas = None
        tokens = oracle.generate(**inputs, max_new_tokens=32, do_sample=False, eos_token_id=[-1])
    return logits, tokens[0, length:].numpy()


def check(vlm, oracle, images, prompts) -> None:
    batch = vlm.processor(images=images, prompts=prompts)
    ours = np.asarray(forward(vlm.model, batch))
    out = qj.generate(vlm.model, batch, max_new_tokens=32)
    for row, inputs in enumerate(images):
        theirs, tokens = oracle_answer(vlm, oracle, inputs, batch, row)
        difference = np.abs(ours[row, : len(theirs)] - theirs).max()
        assert difference <= 2e-4 * np.abs(theirs).max()
        np.testing.assert_array_equal(out.tokens[row], tokens)


LONG = ("all_full", "mha_80", "no_full", "sections", "tower_80")
"""Left to CI: what these add to the others shows in their names."""


@pytest.mark.torch
@pytest.mark.parametrize(
    "case",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in LONG)) for name in sorted(CASES)],
)
def test_logits_and_greedy_tokens_equal_transformers(case: str, tmp_path: Path):
    """Batches of one, three and no pictures of different sizes, prompts of different lengths."""
    folder = write_tiny_qwen(tmp_path / "hf", **CASES[case])
    convert(folder, tmp_path / "ckpt")
    vlm, oracle = qj.load(tmp_path / "ckpt", dtype="float32"), load_oracle(folder)
    for sizes in SETS.values():
        images: list[list[Any]] = [
            [picture(width, height) for width, height in row] for row in sizes
        ]
        check(vlm, oracle, images, [question(len(row)) for row in images])


@pytest.mark.torch
def test_a_video_equals_transformers(tmp_path: Path):
    folder = write_tiny_qwen(tmp_path / "hf", tokens_per_second=3)
    convert(folder, tmp_path / "ckpt")
    vlm, oracle = qj.load(tmp_path / "ckpt", dtype="float32"), load_oracle(folder)
    video = qj.Video(frames=[picture(130, 90, seed=seed) for seed in range(5)], fps=1.5)
    images: list[list[Any]] = [[picture(60, 90), video]]
    check(vlm, oracle, images, [f"{IMAGE} the car {VIDEO} what is the color"])


@pytest.fixture(
    scope="module", params=["W16A16KV16", pytest.param("W4A4KV4", marks=pytest.mark.slow)]
)
def vlm(request, tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp("qwen")
    convert(write_tiny_qwen(root / "hf", num_layers=4), root / "ckpt")
    if request.param == "W16A16KV16":
        return qj.load(root / "ckpt")
    calibrate(root / "ckpt", root / "q", QuantizationConfig.parse(request.param))
    return qj.load(root / "q")


RECIPE = Recipe.uniform(num_layers=4, layers=[1, 2], keep=0.3)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [None, RECIPE], ids=["full", "pruned"])
def test_padding_buckets_and_neighbours_change_nothing(vlm, recipe):
    images = [[picture(100, 200)], [picture(300, 90), picture(60, 60)], []]
    prompts = [question(len(row)) for row in images]

    def run(rows, **pins):
        batch = vlm.processor(
            images=[images[row] for row in rows], prompts=[prompts[row] for row in rows], **pins
        )
        logits, _ = qj.prefill(vlm.model, batch, recipe=recipe)
        return np.asarray(logits), qj.generate(
            vlm.model, batch, recipe=recipe, max_new_tokens=8
        ).tokens

    whole, whole_tokens = run([0, 1, 2])
    larger = {"text_bucket": 96, "visual_bucket": 256, "patch_bucket": 512, "image_slots": 4}
    for row, pins in ((0, {}), (0, larger), (1, larger), (2, larger)):
        logits, tokens = run([row], **pins)
        np.testing.assert_array_equal(logits[0], whole[row])
        np.testing.assert_array_equal(tokens[0], whole_tokens[row])


def test_twenty_sizes_of_one_bucket_compile_once(vlm):
    sizes = [(w, h) for w in (300, 330, 360, 390, 420) for h in (300, 330, 360, 390)]
    programs: list[Any] = [_prefill, decode_chunk]

    # 121 to 210 visual tokens: one bucket for all of them.
    processor = dataclasses.replace(
        vlm.processor, buckets=Buckets(visual=(0, 224), patches=(0, 896))
    )

    def run(size):
        batch = processor(images=[[picture(size[0], size[1])]], prompts=[question(1)])
        return batch, qj.generate(vlm.model, batch, recipe=RECIPE, max_new_tokens=3)

    shapes = set()
    run(sizes[0])
    before = [program._cache_size() for program in programs]
    for size in sizes:
        batch, _ = run(size)
        shapes.add(int(batch.lengths[0]))
    assert len(shapes) >= 10
    assert [program._cache_size() for program in programs] == before


def test_caches_hold_what_each_layer_kept(vlm):
    batch = vlm.processor(images=[[picture(300, 300)]], prompts=[question(1)])
    visual = int(np.asarray(batch.is_visual).sum())
    text = int(batch.lengths[0]) - visual
    _, cache = qj.prefill(vlm.model, batch, recipe=RECIPE)
    kept = [visual, -(-65 * visual // 100), -(-30 * visual // 100)]
    assert [int(group.lengths[0]) - text for group in cache.groups] == kept
    assert all(int(group.shift[0]) == 0 for group in cache.groups)
    renumbered = dataclasses.replace(RECIPE, positions="renumber")
    _, cache = qj.prefill(vlm.model, batch, recipe=renumbered)
    after = int(batch.next_position[0])
    assert [int(g.shift[0]) for g in cache.groups] == [0] + [after - text - k for k in kept[1:]]
