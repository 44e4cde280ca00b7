"""Tokenizer loading, stop ids and text that streams."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from quota_jax.config import ModelConfig, QwenVlConfig
from quota_jax.errors import QuotaError
from quota_jax.processing.hugging_face import first_line, quiet, read_json, transformers

BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
REPLACEMENT = "\ufffd"
FILE_SETTINGS = ("vocab_file", "merges_file", "tokenizer_file", "spm_file", "added_tokens_file")


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer by transformers' AutoTokenizer: local files only, no remote code."""
    settings = read_json(folder / "tokenizer_config.json") or {}
    _check_paths(folder, settings)
    files = ("tokenizer.json", "tokenizer.model")
    if not any((folder / name).is_file() for name in files):
        raise QuotaError(f"{folder} has no tokenizer: neither {files[0]} nor {files[1]}")
    try:
        with quiet():
            module = transformers()
            # The config is given because AutoTokenizer would else read the folder's config.json,
            # which in a converted checkpoint is not Hugging Face's.
            return module.AutoTokenizer.from_pretrained(
                folder,
                config=module.LlavaConfig(tokenizer_class=_declared_class(folder)),
                local_files_only=True,
                trust_remote_code=False,
                use_fast=True,
            )
    except Exception as error:  # the files are foreign: anything may be wrong with them
        raise QuotaError(f"{folder}: cannot load the tokenizer: {first_line(error)}") from None


def _declared_class(folder: Path) -> str | None:
    name = (read_json(folder / "config.json") or {}).get("tokenizer_class")
    return name if isinstance(name, str) else None


def _check_paths(folder: Path, settings: Mapping[str, Any]) -> None:
    """No setting may lead out of the folder; leftover paths that do not exist are harmless."""
    listed = settings.get("fast_tokenizer_files", [])
    values = [settings.get(key) for key in FILE_SETTINGS]
    values += listed if isinstance(listed, list) else [listed]
    inside = folder.resolve()
    for value in values:
        if not isinstance(value, str):
            continue
        target = folder / value
        if target.exists() and not target.resolve().is_relative_to(inside) and _leads_out(value):
            raise QuotaError(f"{folder / 'tokenizer_config.json'}: {value!r} is outside the folder")


def _leads_out(value: str) -> bool:
    """Hub caches link plain names to blobs elsewhere: only the written path counts."""
    return Path(value).is_absolute() or ".." in Path(value).parts


def find_placeholders(tokenizer: Any, folder: Path, config: ModelConfig) -> dict[str, str]:
    """The texts of the image and video tokens: each one token, with the id in the config."""
    settings = read_json(folder / "processor_config.json") or {}
    found = {}
    for kind, (usual, token_id) in _placeholder_ids(config).items():
        key = f"{kind}_token"
        text = getattr(tokenizer, key, None) or settings.get(key) or usual
        if not isinstance(text, str):
            raise QuotaError(f"{folder / 'processor_config.json'}: {key} {text!r} is not text")
        ids = tokenizer.encode(text, add_special_tokens=False)
        if list(ids) != [token_id]:
            raise QuotaError(
                f"{folder}: the tokenizer reads {text!r} as {list(ids)}, "
                f"but the model's {kind} token id is {token_id}"
            )
        found[kind] = text
    return found


def _placeholder_ids(config: ModelConfig) -> dict[str, tuple[str, int]]:
    if isinstance(config, QwenVlConfig):
        return {
            "image": ("<|image_pad|>", config.image_token_id),
            "video": ("<|video_pad|>", config.video_token_id),
        }
    return {"image": ("<image>", config.image_token_id)}


def read_stop_ids(tokenizer: Any, folder: Path, vocab_size: int) -> tuple[int, ...]:
    """Ids that end an answer, of generation_config.json, else the tokenizer, else config.json."""
    path = folder / "generation_config.json"
    value = (read_json(path) or {}).get("eos_token_id")
    if value is None:
        value = tokenizer.eos_token_id
    if value is None:
        path = folder / "config.json"
        config = read_json(path) or {}
        text = config.get("text_config")
        value = config.get(
            "eos_token_id", (text if isinstance(text, dict) else {}).get("eos_token_id")
        )
    ids = [] if value is None else value if isinstance(value, list) else [value]
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
            raise QuotaError(f"{path}: eos_token_id {value!r} is not within 0..{vocab_size - 1}")
    return tuple(dict.fromkeys(ids))


def decode(tokenizer: Any, ids: Iterable[int], skip_special_tokens: bool) -> str:
    """Text of ids, spaces as the tokenizer wrote them."""
    return tokenizer.decode(
        list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
    )


class DecodeStream:
    """Text of a growing answer, piece by piece.

    The pieces that `push` and at last `finish` return join to the decoded whole. A character spread
    over several tokens is held back until its last byte is there; byte pieces (`<0xE2>`) until
    another piece follows, because one wrong byte changes how the whole run decodes. Each push
    decodes the whole answer again: windows lose the spaces that tokenizers strip at a beginning.
    """

    def __init__(self, tokenizer: Any, *, skip_special_tokens: bool = True):
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        added = tokenizer.added_tokens_decoder
        self._silent = {i for i, token in added.items() if skip_special_tokens and token.special}
        self._ids: list[int] = []
        self._settled = 0
        self._emitted = 0

    def push(self, ids: Iterable[int]) -> str:
        """Takes new ids and returns the text that became final, possibly none."""
        new = [int(token) for token in ids]
        for place, piece in enumerate(self._tokenizer.convert_ids_to_tokens(new)):
            # Ids without a piece and silent special ones are skipped: bytes around them join.
            if piece is None or new[place] in self._silent or BYTE_PIECE.fullmatch(piece):
                continue
            self._settled = len(self._ids) + place + 1
        self._ids += new
        text = decode(self._tokenizer, self._ids[: self._settled], self._skip)
        return self._emit(text.rstrip(REPLACEMENT))

    def finish(self) -> str:
        """The text still held back; further pushes are not meant to follow."""
        return self._emit(decode(self._tokenizer, self._ids, self._skip))

    def _emit(self, text: str) -> str:
        new = text[self._emitted :]
        self._emitted = max(self._emitted, len(text))
        return new
