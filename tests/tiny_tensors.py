"""Tensors of tiny random checkpoints: making, writing, reading, comparing; transformers' model."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
NORMS = ("norm", "ln_q")


class Shapes(dict[str, tuple[int, ...]]):
    """Shapes of parameters by name, filled module by module."""

    def linear(self, name: str, rows: int, columns: int, bias: bool) -> None:
        self[f"{name}.weight"] = (rows, columns)
        if bias:
            self[f"{name}.bias"] = (rows,)

    def norm(self, name: str, width: int, bias: bool = False) -> None:
        self[f"{name}.weight"] = (width,)
        if bias:
            self[f"{name}.bias"] = (width,)

    def decoder(
        self, model: str, spec: Any, *, qkv_bias: bool, output_bias: bool, mlp_bias: bool
    ) -> None:
        """A LLaMA-like decoder without its head, by the spec's fields."""
        width, ffn = spec.text_width, spec.intermediate_size
        queries, keys = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        self[f"{model}.embed_tokens.weight"] = (spec.vocab_size, width)
        for index in range(spec.num_layers):
            prefix = f"{model}.layers.{index}"
            self.linear(f"{prefix}.self_attn.q_proj", queries, width, qkv_bias)
            self.linear(f"{prefix}.self_attn.k_proj", keys, width, qkv_bias)
            self.linear(f"{prefix}.self_attn.v_proj", keys, width, qkv_bias)
            self.linear(f"{prefix}.self_attn.o_proj", width, queries, output_bias)
            self.linear(f"{prefix}.mlp.gate_proj", ffn, width, mlp_bias)
            self.linear(f"{prefix}.mlp.up_proj", ffn, width, mlp_bias)
            self.linear(f"{prefix}.mlp.down_proj", width, ffn, mlp_bias)
            self.norm(f"{prefix}.input_layernorm", width)
            self.norm(f"{prefix}.post_attention_layernorm", width)
        self.norm(f"{model}.norm", width)


def random_tensors(
    shapes: Mapping[str, tuple[int, ...]],
    *,
    seed: int,
    dtype: str | Callable[[str], str],
    tied: bool,
) -> dict[str, np.ndarray]:
    """Random values, scaled so that logits spread; they depend only on seed, name and shape.

    `dtype` is one name for all tensors or a function from the tensor's name to a dtype name. With
    `tied` a head, where there is one, equals the embeddings.
    """
    tensors = {}
    for name, shape in shapes.items():
        source = name.replace("lm_head.", "model.embed_tokens.") if tied else name
        rng = np.random.default_rng([seed, zlib.crc32(source.encode())])
        values = rng.standard_normal(shape, dtype=np.float32)
        if any(part in name for part in NORMS):
            values = 0.1 * values + (1.0 if name.endswith("weight") else 0.0)
        elif name.endswith("bias"):
            values = 0.2 * values
        elif "embed_tokens" in source:
            values = values / np.sqrt(shape[-1]) if tied else values
        elif len(shape) > 1 and "position_embedding" not in name:
            values = 1.5 * values / np.sqrt(np.prod(shape[1:]))
        tensors[name] = values.astype(DTYPES[dtype if isinstance(dtype, str) else dtype(name)])
    return tensors


def inverse_frequencies(head_dim: int, theta: float) -> np.ndarray:
    """The rotary buffer that old checkpoints carry beside their parameters."""
    half = np.arange(0, head_dim, 2, dtype=np.float32) / head_dim
    return (theta**-half).astype(np.float32)


def write_tensors(folder: Path, tensors: dict[str, np.ndarray], num_shards: int = 1) -> None:
    """Write model.safetensors, or `num_shards` shards and their index."""
    if num_shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(tensors)
    per_shard = -(-len(names) // num_shards)
    weight_map = {}
    for shard in range(num_shards):
        file_name = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        chosen = names[shard * per_shard : (shard + 1) * per_shard]
        part = {name: tensors[name] for name in chosen}
        save_file(part, folder / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(chosen, file_name)
    total = sum(array.nbytes for array in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def read_folder(folder: Path | str) -> dict[str, np.ndarray]:
    """Every tensor of a Hugging Face folder, shards merged; refuses none of them."""
    tensors: dict[str, np.ndarray] = {}
    for shard in sorted(Path(folder).glob("*.safetensors")):
        tensors |= load_file(shard)
    return tensors


def assert_same_tensors(
    left: dict[str, np.ndarray], right: dict[str, np.ndarray], *, ignore: Iterable[str] = ()
) -> None:
    """Names, dtypes, shapes and bits are equal; names ending in one of `ignore` are left aside."""
    endings = tuple(ignore)
    left = {k: v for k, v in left.items() if not (endings and k.endswith(endings))}
    right = {k: v for k, v in right.items() if not (endings and k.endswith(endings))}
    assert sorted(left) == sorted(right)
    for name, array in left.items():
        other = right[name]
        assert (array.dtype, array.shape) == (other.dtype, other.shape), name
        assert array.tobytes() == other.tobytes(), f"{name} differs"


def load_oracle(folder: Path | str) -> Any:
    """transformers' model of the folder, whatever its family: float32, eager, eval mode.

    Asserts that no key is missing, unexpected or mismatched. Needs torch.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    loaded: Any = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    model, info = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[kind], f"{kind}: {info[kind]}"
    return model.eval()
