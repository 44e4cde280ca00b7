"""Logits and greedy generation against transformers in float32 (the torch oracle)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import quota_jax as qj
from converters import convert
from quota_jax.generation import forward
from tests.tiny_models import draw_picture, load_oracle, write_tiny_llava

pytestmark = pytest.mark.torch

CASES: dict[str, dict[str, Any]] = {
    "mha": {"num_heads": 4, "num_kv_heads": 4},
    "gqa_40": {"num_heads": 6, "num_kv_heads": 2, "head_dim": 40},
    "tied_64": {"head_dim": 64, "num_heads": 2, "num_kv_heads": 1, "tie_word_embeddings": True},
    "head_80": {"head_dim": 80, "num_heads": 3, "num_kv_heads": 3, "attention_bias": True},
    "last_full": {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"},
    "two_features": {"vision_feature_layer": (-2, 1), "image_size": 42, "mlp_bias": True},
    "odd_image": {"image_size": 45, "vision_num_heads": 4, "num_layers": 4},
    "llama3_rope": {
        "rope_scaling": (
            ("rope_type", "llama3"),
            ("factor", 8.0),
            ("low_freq_factor", 1.0),
            ("high_freq_factor", 4.0),
            ("original_max_position_embeddings", 64),
        ),
        "old_config": True,
    },
}


LONG = ("last_full", "llama3_rope", "two_features")
"""Left to CI."""


@pytest.fixture(
    params=[pytest.param(name, marks=[pytest.mark.slow] * (name in LONG)) for name in sorted(CASES)]
)
def pair(request, tmp_path):
    folder = write_tiny_llava(tmp_path / "hf", **CASES[request.param])
    convert(folder, tmp_path / "ckpt")
    return qj.load(tmp_path / "ckpt", dtype="float32"), load_oracle(folder)


def oracle_inputs(batch, row):
    import torch

    length = int(batch.lengths[row])
    index = np.asarray(batch.visual_index[row])
    patches = index[index >= 0]
    inputs = {"input_ids": torch.tensor(np.array(batch.tokens[row : row + 1, :length], np.int64))}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return inputs, patches


def test_logits_and_greedy_tokens_equal_transformers(pair):
    """One batch: one image, three images, text only; prompts of different lengths."""
    import torch

    vlm, oracle = pair
    pictures = [draw_picture(seed) for seed in range(4)]
    batch = vlm.processor(
        images=[[pictures[0]], pictures[1:], []],
        prompts=[
            "USER: <image>\nis there a red circle ? ASSISTANT:",
            "USER: <image> <image> what color is the square <image> ASSISTANT:",
            "USER: what is a car ? ASSISTANT:",
        ],
    )
    ours = np.asarray(forward(vlm.model, batch))
    out = qj.generate(vlm.model, batch, max_new_tokens=32)
    for row in range(3):
        inputs, patches = oracle_inputs(batch, row)
        if len(patches):
            slots = np.unique(patches // vlm.config.tokens_per_image)
            inputs["pixel_values"] = torch.tensor(np.array(batch.pixels)[slots])
        with torch.no_grad():
            theirs = oracle(**inputs).logits[0].numpy()
            tokens = oracle.generate(
                **inputs, max_new_tokens=32, min_new_tokens=32, do_sample=False
            )[0, inputs["input_ids"].shape[1] :].numpy()
            free = oracle.generate(**inputs, max_new_tokens=32, do_sample=False, eos_token_id=[-1])[
                0, inputs["input_ids"].shape[1] :
            ].numpy()
        assert len(tokens) == 32
        difference = np.abs(ours[row, : len(theirs)] - theirs).max()
        assert difference <= 2e-4 * np.abs(theirs).max()
        np.testing.assert_array_equal(out.tokens[row], free)
