"""Tiny random Qwen2.5-VL checkpoints in Hugging Face format, written without torch.

`write_tiny_qwen(folder, num_heads=..., layout=..., ...)` makes what `tiny_models` makes for LLaVA:
config.json, safetensors shards, a word-level tokenizer with the ChatML tokens behind its words, the
chat template and a Qwen2-VL image processor. `load_oracle` opens it with transformers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tests.tiny_processor import (
    CLIP_MEAN,
    CLIP_STD,
    TEXT_WORDS,
    word_level_tokenizer,
    write_json_files,
    write_template,
    write_tokenizer_files,
)
from tests.tiny_tensors import (
    Shapes,
    inverse_frequencies,
    load_oracle,
    random_tensors,
    write_tensors,
)

__all__ = [
    "CHAT_TEMPLATE",
    "LAYOUTS",
    "SPECIAL_TOKENS",
    "TOKEN_IDS",
    "VOCABULARY",
    "TinyQwen",
    "build_tokenizer",
    "hf_config",
    "hf_shapes",
    "hf_tensors",
    "layout_name",
    "load_oracle",
    "write_tiny_qwen",
]

LAYOUTS = ("saved", "hub", "memory")
"""On-disk name layouts, the first two alike; names are spelled out in `layout_name`."""

SPECIAL_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|image_pad|>", "<|video_pad|>"),
)
VOCABULARY = ("<unk>", *TEXT_WORDS, *SPECIAL_TOKENS)
TOKEN_IDS = {token: VOCABULARY.index(token) for token in SPECIAL_TOKENS}

CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% elif part['type'] == 'video' %}{{ '<|vision_start|><|video_pad|><|vision_end|>' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML as Qwen2.5-VL lays out a conversation: parts in order, a default system message."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TinyQwen:
    """What a tiny checkpoint looks like; equal specs give equal bytes.

    `dtype` and `stored_head` are as in `TinyLlava`. `mrope_section` None shares the rotary pairs
    out as the real models do. `old_config` writes the flat config.json of the hub: text fields at
    the root, rope_theta and rope_scaling. `buffers` adds rotary tables beside the parameters.
    """

    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    intermediate_size: int = 96
    vocab_size: int = 16 * -(-len(VOCABULARY) // 16)
    tie_word_embeddings: bool = False
    stored_head: str = "auto"
    rope_theta: float = 1000000.0
    mrope_section: tuple[int, int, int] | None = None
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-6
    vision_layers: int = 3
    vision_num_heads: int = 2
    vision_head_dim: int = 16
    vision_intermediate_size: int = 48
    window_size: int = 112
    full_attention_layers: tuple[int, ...] = (1,)
    patch_size: int = 14
    spatial_merge_size: int = 2
    temporal_patch_size: int = 2
    tokens_per_second: int = 2
    min_pixels: int = 56 * 56
    max_pixels: int = 256 * 28 * 28
    dtype: str | Callable[[str], str] = "float32"
    layout: str = "saved"
    num_shards: int = 1
    old_config: bool = False
    buffers: bool = False
    template_file: str = "chat_template.jinja"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout {self.layout!r} is not one of {LAYOUTS}")
        if self.stored_head not in ("auto", "copy"):
            raise ValueError(f"stored_head {self.stored_head!r} is not 'auto' or 'copy'")
        if self.vocab_size < len(VOCABULARY):
            raise ValueError(f"vocab_size {self.vocab_size} < {len(VOCABULARY)} words")
        if 2 * sum(self.sections) != self.head_dim:
            raise ValueError(f"mrope_section {self.sections} does not fit head_dim {self.head_dim}")

    @property
    def text_width(self) -> int:
        """Width D of the residual stream."""
        return self.num_heads * self.head_dim

    @property
    def vision_width(self) -> int:
        """Width of the tower."""
        return self.vision_num_heads * self.vision_head_dim

    @property
    def sections(self) -> tuple[int, int, int]:
        """Rotary pairs of the frame, row and column positions: 1/4, 3/8 and 3/8 of them."""
        pairs = self.head_dim // 2
        edge = 3 * pairs // 8
        return self.mrope_section or (pairs - 2 * edge, edge, edge)


def hf_config(spec: TinyQwen) -> dict[str, Any]:
    """Contents of config.json."""
    text: dict[str, Any] = {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.text_width,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "max_position_embeddings": spec.max_position_embeddings,
        "max_window_layers": spec.num_layers,
        "rms_norm_eps": spec.rms_norm_eps,
        "hidden_act": "silu",
        "use_sliding_window": False,
        "sliding_window": 32768 if spec.old_config else None,
        "bos_token_id": TOKEN_IDS["<|endoftext|>"],
        "eos_token_id": TOKEN_IDS["<|im_end|>"],
    }
    vision: dict[str, Any] = {
        "depth": spec.vision_layers,
        "hidden_size": spec.vision_width,
        "intermediate_size": spec.vision_intermediate_size,
        "num_heads": spec.vision_num_heads,
        "out_hidden_size": spec.text_width,
        "hidden_act": "silu",
        ("in_chans" if spec.old_config else "in_channels"): 3,
        "patch_size": spec.patch_size,
        "spatial_merge_size": spec.spatial_merge_size,
        "temporal_patch_size": spec.temporal_patch_size,
        "tokens_per_second": spec.tokens_per_second,
        "window_size": spec.window_size,
        "fullatt_block_indexes": list(spec.full_attention_layers),
    }
    config: dict[str, Any] = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        ("torch_dtype" if spec.old_config else "dtype"): (
            spec.dtype if isinstance(spec.dtype, str) else "float32"
        ),
        "image_token_id": TOKEN_IDS["<|image_pad|>"],
        "video_token_id": TOKEN_IDS["<|video_pad|>"],
        "vision_start_token_id": TOKEN_IDS["<|vision_start|>"],
        "vision_end_token_id": TOKEN_IDS["<|vision_end|>"],
        "tie_word_embeddings": spec.tie_word_embeddings,
        "vision_config": vision,
    }
    sections = list(spec.sections)
    if spec.old_config:
        rope = {"type": "mrope", "mrope_section": sections}
        return {**config, **text, "rope_theta": spec.rope_theta, "rope_scaling": rope}
    vision["model_type"] = "qwen2_5_vl_vision"
    vision["rope_parameters"] = {"rope_type": "axial", "rope_theta": 10000.0}
    config["text_config"] = {
        **text,
        "model_type": "qwen2_5_vl_text",
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": spec.rope_theta,
            "mrope_section": sections,
        },
    }
    return config


def hf_shapes(spec: TinyQwen) -> Shapes:
    """Shape of every parameter, by its name in the "saved" layout."""
    shapes = Shapes()
    width, ffn, patch = spec.vision_width, spec.vision_intermediate_size, spec.patch_size
    shapes["visual.patch_embed.proj.weight"] = (width, 3, spec.temporal_patch_size, patch, patch)
    for index in range(spec.vision_layers):
        prefix = f"visual.blocks.{index}"
        shapes.norm(f"{prefix}.norm1", width)
        shapes.norm(f"{prefix}.norm2", width)
        shapes.linear(f"{prefix}.attn.qkv", 3 * width, width, True)
        shapes.linear(f"{prefix}.attn.proj", width, width, True)
        shapes.linear(f"{prefix}.mlp.gate_proj", ffn, width, True)
        shapes.linear(f"{prefix}.mlp.up_proj", ffn, width, True)
        shapes.linear(f"{prefix}.mlp.down_proj", width, ffn, True)
    merged = width * spec.spatial_merge_size**2
    shapes.norm("visual.merger.ln_q", width)
    shapes.linear("visual.merger.mlp.0", merged, merged, True)
    shapes.linear("visual.merger.mlp.2", spec.text_width, merged, True)
    shapes.decoder("model", spec, qkv_bias=True, output_bias=False, mlp_bias=False)
    if not spec.tie_word_embeddings or spec.stored_head == "copy":
        shapes["lm_head.weight"] = (spec.vocab_size, spec.text_width)
    return shapes


def layout_name(saved_name: str, layout: str) -> str:
    """The name that a tensor of the "saved" layout has in another layout."""
    if layout != "memory" or saved_name.startswith("lm_head."):
        return saved_name
    if saved_name.startswith("visual."):
        return "model." + saved_name
    return saved_name.replace("model.", "model.language_model.", 1)


def hf_tensors(spec: TinyQwen) -> dict[str, np.ndarray]:
    """Random tensors under the spec's layout; values depend only on seed, name and shape."""
    tensors = random_tensors(
        hf_shapes(spec), seed=spec.seed, dtype=spec.dtype, tied=spec.tie_word_embeddings
    )
    if spec.buffers:
        tensors["model.rotary_emb.inv_freq"] = inverse_frequencies(spec.head_dim, spec.rope_theta)
        tensors["visual.rotary_pos_emb.inv_freq"] = inverse_frequencies(
            spec.vision_head_dim // 2, 10000.0
        )
    return {layout_name(name, spec.layout): value for name, value in tensors.items()}


def build_tokenizer() -> Any:
    """The word-level tokenizer of the checkpoints; nothing is added to a prompt."""
    return word_level_tokenizer(VOCABULARY, SPECIAL_TOKENS)


def write_processor_files(folder: Path, spec: TinyQwen) -> None:
    """Tokenizer, chat template, image processor and generation files of a checkpoint folder."""
    special = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": "<unk>"}
    write_tokenizer_files(folder, build_tokenizer(), special, spec.max_position_embeddings)
    write_template(folder, CHAT_TEMPLATE, spec.template_file)
    end, text_end = TOKEN_IDS["<|im_end|>"], TOKEN_IDS["<|endoftext|>"]
    write_json_files(
        folder,
        {
            "preprocessor_config.json": {
                "image_processor_type": "Qwen2VLImageProcessor",
                "processor_class": "Qwen2_5_VLProcessor",
                "min_pixels": spec.min_pixels,
                "max_pixels": spec.max_pixels,
                "patch_size": spec.patch_size,
                "temporal_patch_size": spec.temporal_patch_size,
                "merge_size": spec.spatial_merge_size,
                "image_mean": list(CLIP_MEAN),
                "image_std": list(CLIP_STD),
            },
            "generation_config.json": {
                "bos_token_id": text_end,
                "eos_token_id": [end, text_end],
                "pad_token_id": text_end,
            },
        },
    )


def write_tiny_qwen(folder: Path | str, spec: TinyQwen | None = None, **changes: Any) -> Path:
    """Write a complete checkpoint folder (made when missing) and return its path.

    `changes` replace fields of `spec`: `write_tiny_qwen(folder, head_dim=40, layout="memory")`.
    """
    spec = replace(spec or TinyQwen(), **changes)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf_config(spec), indent=2))
    write_tensors(folder, hf_tensors(spec), spec.num_shards)
    write_processor_files(folder, spec)
    return folder
