"""Tiny random LLaVA checkpoints in Hugging Face format, written without torch.

Every part's tests start from `write_tiny_llava(folder, num_heads=..., layout=..., ...)`: a folder
with config.json, safetensors shards, a working word-level tokenizer, a chat template and a CLIP
image processor. Weights are random but scaled so that logits spread: a wrong rotation, mask or
layer shows. `load_oracle` opens the same folder with transformers as the reference (needs torch).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from tests.tiny_processor import (
    BOS_ID,
    CHAT_TEMPLATE,
    COLOURS,
    EOS_ID,
    IMAGE_TOKEN_ID,
    OBJECTS,
    PAD_ID,
    UNK_ID,
    VOCABULARY,
    build_tokenizer,
    write_processor_files,
)
from tests.tiny_tensors import (
    DTYPES,
    Shapes,
    assert_same_tensors,
    inverse_frequencies,
    load_oracle,
    random_tensors,
    read_folder,
    write_tensors,
)

__all__ = [
    "BOS_ID",
    "CHAT_TEMPLATE",
    "COLOURS",
    "DTYPES",
    "EOS_ID",
    "IMAGE_TOKEN_ID",
    "LAYOUTS",
    "OBJECTS",
    "PAD_ID",
    "UNK_ID",
    "VOCABULARY",
    "TinyLlava",
    "assert_same_tensors",
    "build_tokenizer",
    "draw_picture",
    "hf_config",
    "hf_shapes",
    "hf_tensors",
    "layout_name",
    "load_oracle",
    "read_folder",
    "write_processor_files",
    "write_tensors",
    "write_tiny_llava",
]

LAYOUTS = ("saved", "hub", "memory", "memory_vision_model")
"""On-disk name layouts; names are spelled out in `layout_name`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TinyLlava:
    """What a tiny checkpoint looks like; equal specs give equal bytes.

    `dtype` is one name for all tensors or a function from the tensor's "saved" name to a dtype
    name. `hidden_size` None means num_heads * head_dim. `stored_head` "copy" writes lm_head
    although the embeddings are tied. `old_config` writes rope_theta / rope_scaling instead of
    rope_parameters and leaves out keys that old hub files lack. `buffers` adds the tensors that
    old checkpoints carry beside their parameters.
    """

    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    hidden_size: int | None = None
    intermediate_size: int = 96
    vocab_size: int = 16 * -(-len(VOCABULARY) // 16)
    tie_word_embeddings: bool = False
    stored_head: str = "auto"
    attention_bias: bool = False
    mlp_bias: bool = False
    rope_theta: float = 10000.0
    rope_scaling: tuple[tuple[str, Any], ...] | None = None
    max_position_embeddings: int = 1024
    rms_norm_eps: float = 1e-5
    vision_layers: int = 3
    vision_hidden_size: int = 32
    vision_intermediate_size: int = 48
    vision_num_heads: int = 2
    image_size: int = 28
    patch_size: int = 14
    vision_feature_layer: int | tuple[int, ...] = -2
    vision_feature_select_strategy: str = "default"
    projector_bias: bool = True
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
        if self.vision_feature_select_strategy not in ("default", "full"):
            raise ValueError(f"select strategy {self.vision_feature_select_strategy!r} is unknown")

    @property
    def text_width(self) -> int:
        """Width D of the residual stream."""
        return self.hidden_size or self.num_heads * self.head_dim

    @property
    def num_patches(self) -> int:
        """Patches of one image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def tokens_per_image(self) -> int:
        """Visual tokens of one image: the class token is dropped by strategy "default"."""
        return self.num_patches + (self.vision_feature_select_strategy == "full")


def hf_config(spec: TinyLlava) -> dict[str, Any]:
    """Contents of config.json."""
    text: dict[str, Any] = {
        "model_type": "llama",
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.text_width,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "max_position_embeddings": spec.max_position_embeddings,
        "rms_norm_eps": spec.rms_norm_eps,
        "hidden_act": "silu",
        "tie_word_embeddings": spec.tie_word_embeddings,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": PAD_ID,
    }
    if spec.attention_bias or not spec.old_config:
        text["attention_bias"] = spec.attention_bias
    if spec.mlp_bias or not spec.old_config:
        text["mlp_bias"] = spec.mlp_bias
    if not spec.old_config or spec.text_width != spec.num_heads * spec.head_dim:
        text["head_dim"] = spec.head_dim
    scaling = dict(spec.rope_scaling) if spec.rope_scaling else None
    if spec.old_config:
        text["rope_theta"] = spec.rope_theta
        text["rope_scaling"] = (
            {("type" if key == "rope_type" else key): value for key, value in scaling.items()}
            if scaling
            else None
        )
    else:
        text["rope_parameters"] = {
            "rope_theta": spec.rope_theta,
            **(scaling or {"rope_type": "default"}),
        }
    layer = spec.vision_feature_layer
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        ("torch_dtype" if spec.old_config else "dtype"): (
            spec.dtype if isinstance(spec.dtype, str) else "float32"
        ),
        "image_token_index": IMAGE_TOKEN_ID,
        "image_seq_length": spec.tokens_per_image,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": spec.projector_bias,
        "vision_feature_layer": layer if isinstance(layer, int) else list(layer),
        "vision_feature_select_strategy": spec.vision_feature_select_strategy,
        "tie_word_embeddings": spec.tie_word_embeddings,
        "text_config": text,
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": spec.vision_hidden_size,
            "intermediate_size": spec.vision_intermediate_size,
            "num_hidden_layers": spec.vision_layers,
            "num_attention_heads": spec.vision_num_heads,
            "image_size": spec.image_size,
            "patch_size": spec.patch_size,
            "num_channels": 3,
            "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-5,
            "projection_dim": spec.vision_hidden_size,
        },
    }


def hf_shapes(spec: TinyLlava) -> Shapes:
    """Shape of every parameter, by its name in the "saved" layout."""
    shapes = Shapes()
    width, ffn, patch = spec.vision_hidden_size, spec.vision_intermediate_size, spec.patch_size
    vision = "vision_tower"
    shapes[f"{vision}.embeddings.class_embedding"] = (width,)
    shapes[f"{vision}.embeddings.patch_embedding.weight"] = (width, 3, patch, patch)
    shapes[f"{vision}.embeddings.position_embedding.weight"] = (spec.num_patches + 1, width)
    shapes.norm(f"{vision}.pre_layrnorm", width, bias=True)
    for index in range(spec.vision_layers):
        prefix = f"{vision}.encoder.layers.{index}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes.linear(f"{prefix}.self_attn.{part}", width, width, True)
        shapes.norm(f"{prefix}.layer_norm1", width, bias=True)
        shapes.norm(f"{prefix}.layer_norm2", width, bias=True)
        shapes.linear(f"{prefix}.mlp.fc1", ffn, width, True)
        shapes.linear(f"{prefix}.mlp.fc2", width, ffn, True)
    shapes.norm(f"{vision}.post_layernorm", width, bias=True)

    layers = spec.vision_feature_layer
    features = width * (1 if isinstance(layers, int) else len(layers))
    text = spec.text_width
    shapes.linear("multi_modal_projector.linear_1", text, features, spec.projector_bias)
    shapes.linear("multi_modal_projector.linear_2", text, text, spec.projector_bias)

    shapes.decoder(
        "language_model.model",
        spec,
        qkv_bias=spec.attention_bias,
        output_bias=spec.attention_bias,
        mlp_bias=spec.mlp_bias,
    )
    if not spec.tie_word_embeddings or spec.stored_head == "copy":
        shapes["language_model.lm_head.weight"] = (spec.vocab_size, text)
    return shapes


def layout_name(saved_name: str, layout: str) -> str:
    """The name that a tensor of the "saved" layout has in another layout."""
    name = saved_name
    if layout in ("hub", "memory_vision_model"):
        name = name.replace("vision_tower.", "vision_tower.vision_model.", 1)
    if layout in ("memory", "memory_vision_model"):
        if name.startswith("language_model.lm_head"):
            return name.removeprefix("language_model.")
        name = "model." + name.replace("language_model.model.", "language_model.", 1)
    return name


def hf_tensors(spec: TinyLlava) -> dict[str, np.ndarray]:
    """Random tensors under the spec's layout; values depend only on seed, name and shape."""
    tensors = random_tensors(
        hf_shapes(spec), seed=spec.seed, dtype=spec.dtype, tied=spec.tie_word_embeddings
    )
    if spec.buffers:
        tensors |= _buffers(spec)
    return {layout_name(name, spec.layout): value for name, value in tensors.items()}


def _buffers(spec: TinyLlava) -> dict[str, np.ndarray]:
    """Non-parameter tensors of old checkpoints, which every reader has to leave aside."""
    inverse = inverse_frequencies(spec.head_dim, spec.rope_theta)
    return {
        "vision_tower.embeddings.position_ids": np.arange(spec.num_patches + 1)[None],
        **{
            f"language_model.model.layers.{index}.self_attn.rotary_emb.inv_freq": inverse
            for index in range(spec.num_layers)
        },
    }


def write_tiny_llava(folder: Path | str, spec: TinyLlava | None = None, **changes: Any) -> Path:
    """Write a complete checkpoint folder (made when missing) and return its path.

    `changes` replace fields of `spec`: `write_tiny_llava(folder, head_dim=40, layout="hub")`.
    """
    spec = replace(spec or TinyLlava(), **changes)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf_config(spec), indent=2))
    write_tensors(folder, hf_tensors(spec), spec.num_shards)
    write_processor_files(
        folder,
        image_size=spec.image_size,
        patch_size=spec.patch_size,
        select_strategy=spec.vision_feature_select_strategy,
        max_length=spec.max_position_embeddings,
        template_file=spec.template_file,
    )
    return folder


def draw_picture(seed: int = 0, size: tuple[int, int] = (60, 48)) -> Image.Image:
    """A picture of a few coloured boxes and discs; width and height differ on purpose."""
    rng = np.random.default_rng(seed)
    picture = Image.new("RGB", size, tuple(int(c) for c in rng.integers(0, 256, 3)))
    pen = ImageDraw.Draw(picture)
    for index in range(4):
        left, top = (int(rng.integers(0, edge // 2)) for edge in size)
        box = [left, top, left + size[0] // 3, top + size[1] // 3]
        fill = tuple(int(c) for c in rng.integers(0, 256, 3))
        (pen.ellipse if index % 2 else pen.rectangle)(box, fill=fill)
    return picture
