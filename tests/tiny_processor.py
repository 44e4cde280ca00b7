"""Tokenizer, chat template and image processor files of the tiny checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>", "<image>")
UNK_ID, BOS_ID, EOS_ID, PAD_ID, IMAGE_TOKEN_ID = range(5)


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


COLOURS = _words("red green blue yellow orange purple black white brown pink gray cyan")
OBJECTS = _words(
    "circle square triangle star cat dog bird car house tree ball cup flower boat book apple fish "
    "sun moon heart ring cross cube bottle"
)
WORDS = _words(
    "user assistant system a an the is are there what which color colour shape object picture "
    "image in on of to it this that and or not no yes left right above below top bottom middle "
    "corner big small how many one two three four five where near see you can do does describe "
    "i with between next side than more less same different first second background do answer "
    "word using single please tell me about chat human artificial curious gives helpful"
)
TEXT_WORDS = tuple(dict.fromkeys(["\n", *":?.,!'-", *WORDS, *COLOURS, *OBJECTS]))
VOCABULARY = (*SPECIAL_TOKENS, *TEXT_WORDS)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{{ ' ' }}"
    "{% else %}{{ message['role'] | upper }}{{ ': ' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}"
    "{{ part['text'] }}{{ ' ' }}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""Roles in capitals, images before text, as the llava-hf checkpoints lay out a conversation."""

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def build_tokenizer() -> Any:
    """The word-level tokenizer of the LLaVA checkpoints; <s> comes first."""
    from tokenizers import processors

    tokenizer = word_level_tokenizer(VOCABULARY, SPECIAL_TOKENS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS_ID)]
    )
    return tokenizer


def word_level_tokenizer(vocabulary: Sequence[str], special_tokens: Sequence[str]) -> Any:
    """A token a word, in lower case; newline and punctuation are words."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>")
    )
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("\n"), "isolated"),
            pre_tokenizers.Split(Regex(" +"), "removed"),
            pre_tokenizers.Punctuation(),
        ]
    )
    tokenizer.add_special_tokens(list(special_tokens))
    return tokenizer


def write_processor_files(
    folder: Path,
    *,
    image_size: int,
    patch_size: int,
    select_strategy: str = "default",
    max_length: int = 1024,
    template_file: str = "chat_template.jinja",
) -> None:
    """Tokenizer, chat template, image processor and generation files of a checkpoint folder."""
    special = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
    }
    write_tokenizer_files(folder, build_tokenizer(), special, max_length)
    write_template(folder, CHAT_TEMPLATE, template_file)
    write_json_files(
        folder,
        {
            "preprocessor_config.json": {
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
                "image_mean": list(CLIP_MEAN),
                "image_std": list(CLIP_STD),
            },
            "processor_config.json": {
                "processor_class": "LlavaProcessor",
                "image_token": "<image>",
                "patch_size": patch_size,
                "num_additional_image_tokens": 1,
                "vision_feature_select_strategy": select_strategy,
            },
            "generation_config.json": {
                "bos_token_id": BOS_ID,
                "eos_token_id": EOS_ID,
                "pad_token_id": PAD_ID,
            },
        },
    )


def write_tokenizer_files(
    folder: Path, tokenizer: Any, special: Mapping[str, str], max_length: int
) -> None:
    """tokenizer.json and its settings; `special` names the tokens by role."""
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        **special,
    }
    write_json_files(
        folder, {"special_tokens_map.json": special, "tokenizer_config.json": settings}
    )


def write_template(folder: Path, template: str, template_file: str) -> None:
    """The chat template as chat_template.jinja or inside chat_template.json."""
    if template_file.endswith(".json"):
        write_json_files(folder, {template_file: {"chat_template": template}})
    else:
        (folder / template_file).write_text(template)


def write_json_files(folder: Path, files: Mapping[str, Any]) -> None:
    """Contents by file name."""
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2))
