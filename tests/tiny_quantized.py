"""Tiny checkpoints as AWQ, GPTQ and compressed-tensors would store them, packed by hand.

The packing here is slow Python integers, bit by bit, and knows nothing of the package: codes, zero
points and scales are random, and the reference weight is what each format's documentation says.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.tiny_tensors import read_folder, write_tensors

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
DECODER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def words(values: np.ndarray, order: tuple[int, ...] = tuple(range(8))) -> np.ndarray:
    """[R, 8 W] nibbles -> int32 [R, W]; the i-th nibble of a word, lowest first, is element
    ``order[i]`` of its eight."""
    rows, columns = values.shape
    out = np.zeros((rows, -(-columns // 8)), np.int64)
    for row in range(rows):
        for word in range(out.shape[1]):
            for place, element in enumerate(order):
                column = 8 * word + element
                if column < columns:
                    out[row, word] |= int(values[row, column]) << (4 * place)
    return out.astype(np.uint32).view(np.int32)


def is_decoder_linear(name: str) -> bool:
    return (
        name.endswith(".weight")
        and ".layers." in name
        and name.split(".")[-2] in DECODER
        and ("vision" not in name and "visual" not in name)
    )


def quantize_folder(
    folder: Path,
    config: dict[str, Any],
    *,
    group: int = 16,
    symmetric: bool = False,
    act_order: bool = False,
    scale_dtype: Any = np.float16,
    chosen: Callable[[str], bool] = is_decoder_linear,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Replaces the chosen matrices of a Hugging Face folder by random quantized ones; returns the
    reference weights by name, in the dtype of the scales. ``group`` 0: whole rows."""
    rng = np.random.default_rng(seed)
    tensors, references = read_folder(folder), {}
    method = config["quant_method"]
    for name in [name for name in tensors if chosen(name)]:
        rows, columns = tensors.pop(name).shape
        stem = name.removesuffix("weight")
        size = group or columns
        groups = -(-columns // size)
        codes = rng.integers(0, 16, (rows, columns))
        zeros = np.full((rows, groups), 8)
        if not symmetric:
            # The first GPTQ format stores zeros minus one, so it has 1 to 16.
            low = int(method == "gptq" and config.get("checkpoint_format") != "gptq_v2")
            zeros = rng.integers(low, 16 + low, (rows, groups))
        scale = (0.05 * rng.random((rows, groups)) + 0.005).astype(scale_dtype)
        index = np.arange(columns) // size
        if act_order:
            index = index[rng.permutation(columns)]
        # One rounding, as a product of numbers in the scale's dtype has.
        whole = (codes - zeros[:, index]).astype(scale_dtype)
        references[name] = whole * scale[:, index]
        if method == "awq":
            tensors[stem + "qweight"] = words(codes.T, AWQ_ORDER)
            tensors[stem + "qzeros"] = words(zeros.T, AWQ_ORDER)
            tensors[stem + "scales"] = np.ascontiguousarray(scale.T)
        elif method == "gptq":
            offset = 0 if config.get("checkpoint_format") == "gptq_v2" else 1
            tensors[stem + "qweight"] = np.ascontiguousarray(words(codes).T)
            tensors[stem + "qzeros"] = words((zeros - offset).T)
            tensors[stem + "scales"] = np.ascontiguousarray(scale.T)
            tensors[stem + "g_idx"] = index.astype(np.int32)
        else:
            tensors[stem + "weight_packed"] = words(codes)
            tensors[stem + "weight_scale"] = scale
            tensors[stem + "weight_shape"] = np.array([rows, columns], np.int64)
            if not symmetric:
                tensors[stem + "weight_zero_point"] = np.ascontiguousarray(words(zeros.T).T)
            if act_order:
                tensors[stem + "weight_g_idx"] = index.astype(np.int32)
    write_tensors(folder, tensors)
    stored = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**stored, "quantization_config": config}))
    return references


def awq(group: int = 16, **changes: Any) -> dict[str, Any]:
    config = {"quant_method": "awq", "bits": 4, "group_size": group or -1, "version": "gemm"}
    return {**config, "zero_point": True, "modules_to_not_convert": ["visual"], **changes}


def gptq(group: int = 16, **changes: Any) -> dict[str, Any]:
    config = {"quant_method": "gptq", "bits": 4, "group_size": group or -1, "desc_act": True}
    return {**config, "sym": False, "checkpoint_format": "gptq", **changes}


def compressed_tensors(group: int = 16, *, symmetric: bool = False, **changes: Any) -> dict:
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "group" if group else "channel",
        "group_size": group or None,
        "dynamic": False,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head", "re:.*vision_tower.*"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {**weights, **changes}}},
    }
