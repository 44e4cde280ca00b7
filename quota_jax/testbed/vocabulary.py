"""Words of the testbed: object kinds, colors, signs, and the small tokenizer built from them.

The vocabulary is closed and tiny, so one word is one token; numbers of two digits are two pieces
("42" -> "4", "##2") and every other word of a free question becomes `<unk>`. Text is lower-cased
and punctuation split off before the look-up, so people may write natural English.
"""

from __future__ import annotations

import json
from pathlib import Path

KINDS: tuple[str, ...] = (
    "circle", "square", "triangle", "star", "heart", "cross", "arrow", "moon",
    "ring", "diamond", "house", "car", "tree", "flower", "fish", "cup",
    "key", "boat", "cloud", "umbrella", "mushroom", "bottle", "flag", "bell",
)  # fmt: skip
COLORS: tuple[str, ...] = (
    "red", "orange", "yellow", "green", "blue", "purple", "black", "white",
)  # fmt: skip
ROWS: tuple[str, ...] = ("top", "middle", "bottom")
COLUMNS: tuple[str, ...] = ("left", "center", "right")
SIGN_WORDS: tuple[str, ...] = (
    "stop", "exit", "open", "taxi", "cafe", "bus", "zoo", "bank",
    "hotel", "park", "food", "sale", "tour", "gift", "jazz", "wifi",
    "milk", "bike", "shop", "north", "south", "quiz", "vote", "lucky",
)  # fmt: skip

PAD, BOS, EOS, UNK, IMAGE = "<pad>", "<s>", "</s>", "<unk>", "<image>"
SPECIALS: tuple[str, ...] = (PAD, BOS, EOS, UNK, IMAGE)
USER, ASSISTANT = "user:", "assistant:"
ANSWER_SUFFIX = "Answer the question using a single word or phrase."

_FUNCTION_WORDS: tuple[str, ...] = (
    "?", ".", ",", "is", "are", "there", "a", "an", "the", "what", "color", "how", "many", "where",
    "does", "sign", "say", "yes", "no", "object", "objects", "in", "image", "of", "above", "below",
    "answer", "question", "using", "single", "word", "or", "phrase", "describe",
)  # fmt: skip
_DIGITS: tuple[str, ...] = tuple("0123456789")


def plural(kind: str) -> str:
    """Plural of an object kind: "cross" -> "crosses", "fish" -> "fish", else with "s"."""
    if kind == "fish":
        return kind
    return kind + ("es" if kind.endswith("s") else "s")


def _unique(words: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(words))


PLURALS: tuple[str, ...] = tuple(plural(kind) for kind in KINDS)
WORDS: tuple[str, ...] = _unique(
    (
        *SPECIALS,
        USER,
        ASSISTANT,
        *_FUNCTION_WORDS,
        *ROWS,
        *COLUMNS,
        *COLORS,
        *KINDS,
        *PLURALS,
        *_DIGITS,
        *("##" + digit for digit in _DIGITS),
        *SIGN_WORDS,
    )
)
"""Token text by id. Ids are positions in this tuple; `<pad>` is 0."""

VOCAB_SIZE = 160
"""Rows of the embedding: the words plus a few rows no text reaches."""

ID: dict[str, int] = {word: index for index, word in enumerate(WORDS)}

CHAT_TEMPLATE = (
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


def prompt(question: str) -> str:
    """The one-question prompt the models are trained and evaluated on."""
    return f"USER: <image>\n{question} ASSISTANT:"


def build_tokenizer():
    """The `tokenizers.Tokenizer` of the testbed (word pieces over a closed vocabulary)."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
    )

    if len(WORDS) > VOCAB_SIZE:
        raise ValueError(f"{len(WORDS)} words do not fit VOCAB_SIZE={VOCAB_SIZE}")
    tokenizer = Tokenizer(models.WordPiece(vocab=dict(ID), unk_token=UNK))
    tokenizer.normalizer = normalizers.Lowercase()
    # Everything the pattern does not match (white space) is dropped; "user:" stays one piece.
    pattern = Regex(r"(?:user|assistant):|[a-z]+|[0-9]+|[^\sa-z0-9]")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern, behavior="removed", invert=True)
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, ID[BOS])]
    )
    tokenizer.add_special_tokens([AddedToken(word, normalized=False) for word in SPECIALS])
    return tokenizer


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def processor_files(image_size: int = 336, patch_size: int = 14) -> dict[str, bytes]:
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
        "chat_template.jinja": CHAT_TEMPLATE.encode(),
        "preprocessor_config.json": _json(preprocessor),
        "processor_config.json": _json(processor),
        "generation_config.json": _json(generation),
    }


def write_processor_files(folder: Path) -> None:
    """Write `processor_files()` into an existing folder."""
    for name, content in processor_files().items():
        (folder / name).write_bytes(content)
