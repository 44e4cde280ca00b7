"""Tokenizer, chat template and processor files of the exported folders, for both families."""

from __future__ import annotations

import json
from typing import Any

from quota_jax.testbed.world.vocabulary import (
    BOS,
    EOS,
    ID,
    IMAGE,
    PAD,
    UNK,
    WORDS,
    build_tokenizer,
)

LLAVA_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "{{ 'ASSISTANT:' }}"
    "{%- elif message['role'] == 'user' -%}"
    "{{ 'USER:' }}"
    "{%- endif -%}"
    "{%- if message['content'] is string -%}"
    "{{ ' ' + message['content'] }}"
    "{%- else -%}"
    "{%- for part in message['content'] if part['type'] == 'image' -%}{{ ' <image>\n' }}"
    "{%- endfor -%}"
    "{%- set seen = message['content'] | selectattr('type', 'equalto', 'image') | list | length -%}"
    "{%- for part in message['content'] if part['type'] == 'text' -%}"
    "{{ ('' if seen and loop.first else ' ') + part['text'] }}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{{ '</s>' if message['role'] == 'assistant' else ' ' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}"
)
"""LLaVA-1.5 style: `USER: <image>\\nquestion ASSISTANT:` and `</s>` after each answer."""

QWEN_SPECIALS: tuple[str, ...] = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
QWEN_ID: dict[str, int] = {word: len(WORDS) + i for i, word in enumerate(QWEN_SPECIALS)}
"""Ids behind those of the words; the words keep theirs."""
MIN_PIXELS, MAX_PIXELS = 224 * 224, 448 * 448
"""Pictures are brought into the range of sizes that training shows."""

QWEN_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{%- if message['content'] is string -%}{{ message['content'] }}"
    "{%- else -%}{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{%- elif part['type'] == 'video' -%}{{ '<|vision_start|><|video_pad|><|vision_end|>' }}"
    "{%- else -%}{{ part['text'] }}{%- endif -%}{%- endfor -%}{%- endif -%}"
    "{{ '<|im_end|>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
"""ChatML as Qwen2.5-VL lays out a conversation, but without a system message of its own."""


def build_qwen_tokenizer() -> Any:
    """The world's tokenizer with the tokens of ChatML, and without a first token."""
    from tokenizers import AddedToken, processors

    tokenizer = build_tokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A", pair="$A $B", special_tokens=[]
    )
    tokenizer.add_special_tokens([AddedToken(word, normalized=False) for word in QWEN_SPECIALS])
    return tokenizer


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def qwen_processor_files(patch_size: int = 14, merge_size: int = 2) -> dict[str, bytes]:
    """Contents of a Qwen2.5-VL folder's tokenizer and processor files, by file name."""
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": UNK,
        "extra_special_tokens": {
            "image_token": "<|image_pad|>",
            "video_token": "<|video_pad|>",
        },
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
        "padding_side": "left",
    }
    preprocessor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "resample": 3,
        "min_pixels": MIN_PIXELS,
        "max_pixels": MAX_PIXELS,
        "patch_size": patch_size,
        "temporal_patch_size": 2,
        "merge_size": merge_size,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    end, text_end = QWEN_ID["<|im_end|>"], QWEN_ID["<|endoftext|>"]
    generation = {"eos_token_id": [end, text_end], "pad_token_id": text_end, "do_sample": False}
    return {
        "tokenizer.json": build_qwen_tokenizer().to_str(pretty=True).encode(),
        "tokenizer_config.json": _json(tokenizer_config),
        "chat_template.jinja": QWEN_TEMPLATE.encode(),
        "preprocessor_config.json": _json(preprocessor),
        "generation_config.json": _json(generation),
    }


def llava_processor_files(image_size: int = 336, patch_size: int = 14) -> dict[str, bytes]:
    """Contents of a LLaVA folder's tokenizer and processor files, by file name."""
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "unk_token": UNK,
        "pad_token": PAD,
        "extra_special_tokens": {"image_token": IMAGE},
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
        "padding_side": "left",
    }
    preprocessor = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": image_size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": image_size, "width": image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    processor = {
        "processor_class": "LlavaProcessor",
        "image_token": IMAGE,
        "patch_size": patch_size,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default",
    }
    generation = {
        "bos_token_id": ID[BOS],
        "eos_token_id": ID[EOS],
        "pad_token_id": ID[PAD],
        "do_sample": False,
    }
    return {
        "tokenizer.json": build_tokenizer().to_str(pretty=True).encode(),
        "tokenizer_config.json": _json(tokenizer_config),
        "chat_template.jinja": LLAVA_TEMPLATE.encode(),
        "preprocessor_config.json": _json(preprocessor),
        "processor_config.json": _json(processor),
        "generation_config.json": _json(generation),
    }


def special_ids(family: str) -> dict[str, int | None]:
    """Ids of the first, the last and the padding token, as config.json names them."""
    if family == "llava":
        return {"bos_token_id": ID[BOS], "eos_token_id": ID[EOS], "pad_token_id": ID[PAD]}
    return {
        "bos_token_id": None,
        "eos_token_id": QWEN_ID["<|im_end|>"],
        "pad_token_id": QWEN_ID["<|endoftext|>"],
    }


def folder_files(family: str) -> dict[str, bytes]:
    """Contents of a folder's tokenizer and processor files, by file name."""
    return llava_processor_files() if family == "llava" else qwen_processor_files()
