"""Folders, tokenizers and transformers' own processors for the processing tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from tiny_processor import IMAGE_TOKEN_ID, write_processor_files

from quota_jax.config import LlavaConfig, TextConfig, VisionConfig

IMAGE_SIZE, PATCH_SIZE = 28, 7
TOKENS_PER_IMAGE = 16
CORPUS = [
    "USER: What is shown in this image? ASSISTANT: The image shows a red stop sign.",
    "A chat between a curious user and an artificial intelligence assistant.",
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
]


def tiny_config(
    image_token_id: int = IMAGE_TOKEN_ID,
    vocab_size: int = 512,
    max_position_embeddings: int = 1024,
    strategy: str = "default",
) -> LlavaConfig:
    """A config whose pictures are 28 x 28 and 16 tokens."""
    return LlavaConfig(
        vision=VisionConfig(
            hidden_size=8,
            intermediate_size=8,
            num_layers=1,
            num_heads=1,
            image_size=IMAGE_SIZE,
            patch_size=PATCH_SIZE,
        ),
        text=TextConfig(
            vocab_size=vocab_size,
            hidden_size=8,
            intermediate_size=8,
            num_layers=1,
            num_heads=1,
            num_kv_heads=1,
            head_dim=8,
            max_position_embeddings=max_position_embeddings,
        ),
        image_token_id=image_token_id,
        vision_feature_layers=(-1,),
        vision_feature_select_strategy=strategy,
    )


def write_folder(folder: Path, **files: Any) -> Path:
    """A folder with the word-level tokenizer; `files` replace (config_json=...) or drop (None)."""
    folder.mkdir(parents=True, exist_ok=True)
    write_processor_files(folder, image_size=IMAGE_SIZE, patch_size=PATCH_SIZE)
    (folder / "config.json").write_text(json.dumps(tiny_config().to_hf()))
    for name, content in files.items():
        stem, _, ending = name.rpartition("_")
        path = folder / f"{stem}.{ending}"
        if content is None:
            path.unlink()
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def write_llama_folder(folder: Path) -> Path:
    """As llava-hf's checkpoints: LlamaTokenizer with byte pieces, `<image>` added at the end."""
    from tokenizers import (
        AddedToken,
        Tokenizer,
        decoders,
        models,
        normalizers,
        processors,
        trainers,
    )

    write_folder(folder)
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    control = ["<unk>", "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=[*control, *pieces], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    # The trainer made the byte pieces special, which they are not in LLaMA's vocabulary.
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < 3]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    tokenizer.add_special_tokens([AddedToken("<image>", special=True, normalized=False), "<pad>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "legacy": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,
        "extra_special_tokens": {"image_token": "<image>"},
        **special,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    return folder


def image_id(folder: Path) -> int:
    """The id of `<image>` in a folder's tokenizer.json."""
    state = json.loads((folder / "tokenizer.json").read_text())
    return next(token["id"] for token in state["added_tokens"] if token["content"] == "<image>")


def byte_level_tokenizer() -> Any:
    """A GPT-2-like tokenizer, as Qwen's: every byte is a character of its vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", model_max_length=10**6
    )


def hf_processor(folder: Path, *, pil_class: str = "CLIPImageProcessorPil") -> Any:
    """transformers' own LlavaProcessor of a folder, with a PIL image processor: the oracle."""
    import transformers

    settings = json.loads((folder / "preprocessor_config.json").read_text())
    settings.pop("image_processor_type", None)
    return transformers.LlavaProcessor(
        image_processor=getattr(transformers, pil_class)(**settings),
        tokenizer=transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True),
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def real_ids(batch: Any) -> list[list[int]]:
    """The tokens of each row without padding."""
    lengths = np.asarray(batch.lengths)
    return [
        row[:length].tolist() for row, length in zip(np.asarray(batch.tokens), lengths, strict=True)
    ]
