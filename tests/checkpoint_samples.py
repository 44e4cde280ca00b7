"""Small checkpoints with random content for the tests of quota_jax.checkpoint."""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from quota_jax.checkpoint import CheckpointWriter
from quota_jax.config import LlavaConfig, TextConfig, VisionConfig
from quota_jax.models.params import blocks, flatten_params
from quota_jax.quantization import QuantizationConfig

BF16 = np.dtype(ml_dtypes.bfloat16)
W4 = QuantizationConfig.parse("W4A4KV4")
W8 = QuantizationConfig.parse("W8A8")
NONE = QuantizationConfig.none
ASSETS = {"tokenizer.json": b'{"model": {}}', "chat_template.jinja": "né".encode()}
Blocks = dict[str, dict[str, np.ndarray]]


def tiny_config(*, layers: int = 2, hidden: int = 32, vocab: int = 48) -> LlavaConfig:
    return LlavaConfig(
        vision=VisionConfig(
            hidden_size=16,
            intermediate_size=24,
            num_layers=3,
            num_heads=2,
            image_size=8,
            patch_size=4,
        ),
        text=TextConfig(
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_layers=layers,
            num_heads=4,
            num_kv_heads=2,
            head_dim=hidden // 4,
        ),
        image_token_id=5,
    )


def random_blocks(
    config: LlavaConfig,
    quantization: QuantizationConfig = NONE,
    dtype: np.dtype = BF16,
    seed: int = 0,
) -> Blocks:
    """Random arrays for every block; integers over their whole range: nothing compresses."""
    rng = np.random.default_rng(seed)
    result: Blocks = {}
    for block, params in blocks(config, quantization).items():
        arrays = {}
        for name, spec in params.items():
            if spec.dtype.kind in "iu":
                arrays[name] = np.frombuffer(rng.bytes(spec.size), spec.dtype).reshape(spec.shape)
            else:
                arrays[name] = rng.standard_normal(spec.shape).astype(
                    np.float32 if is_quantization_scale(name, params) else dtype
                )
        result[block] = arrays
    return result


def is_quantization_scale(name: str, params: Container[str]) -> bool:
    stem, _, kind = name.rpartition(".")
    return kind == "scale" and any(f"{stem}.{other}" in params for other in ("packed", "codes"))


def writer(
    path: Path,
    config: LlavaConfig,
    quantization: QuantizationConfig = NONE,
    fingerprint: str = "source-1",
    **options: Any,
) -> CheckpointWriter:
    fields: dict[str, Any] = {"provenance": {"source": "random"}, "assets": ASSETS, **options}
    return CheckpointWriter(
        path, config=config, quantization=quantization, fingerprint=fingerprint, **fields
    )


def write(
    path: Path,
    config: LlavaConfig,
    arrays: Blocks,
    quantization: QuantizationConfig = NONE,
    **options: Any,
) -> Path:
    """A complete checkpoint at ``path``."""
    with writer(path, config, quantization, **options) as out:
        for name, params in arrays.items():
            out.write_block(name, params)
        out.finish()
    return path


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Bitwise equality of names, shapes, dtypes and values."""
    assert set(found) == set(expected)
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert found[name].tobytes() == array.tobytes(), name


def stack(arrays: Blocks) -> dict[str, np.ndarray]:
    """The stacked parameters by plain numpy: layer blocks in name order along a new first axis."""
    result: dict[str, list[np.ndarray]] = {}
    for block, params in arrays.items():
        for name, array in params.items():
            result.setdefault(name, []).append(array[None] if "_layer_" in block else array)
    return {
        name: np.concatenate(parts) if len(parts) > 1 else parts[0]
        for name, parts in result.items()
    }


def stacked_params(model: Any) -> dict[str, np.ndarray]:
    """The parameters of a model on the host."""
    return {name: np.asarray(array) for name, array in flatten_params(model).items()}
