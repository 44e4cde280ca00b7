"""Prompts or conversations with their pictures to `Batch`, token ids back to text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from quota_jax.batch import Batch
from quota_jax.config import ModelConfig
from quota_jax.errors import QuotaError
from quota_jax.processing.buckets import Buckets, Shape, assemble
from quota_jax.processing.images import LlavaPictures
from quota_jax.processing.templates import (
    TEMPLATES,
    read_conversation,
    read_shipped_templates,
    render_shipped,
)
from quota_jax.processing.tokens import (
    DecodeStream,
    decode,
    find_placeholder,
    load_tokenizer,
    read_stop_ids,
)

PICTURES = {"llava": LlavaPictures}
"""How each model type sees pictures."""


@dataclass(frozen=True, kw_only=True)
class Processor:
    """Between prompts and a model: tokenizer, image processor, chat templates and buckets.

    Token ids equal those of transformers' `LlavaProcessor` with the same tokenizer, every picture
    expanded to `config.tokens_per_image` image tokens, and pixels equal those of its PIL image
    processor bit for bit. Nothing here depends on torch or reaches the network. Prompts, pictures,
    conversations and messages are counted from 0 in errors.

    image_placeholder: text that stands for one picture in a prompt, `<image>`.
    chat_templates: Jinja templates by name as the folder ships them ("default" is used by `chat`).
    stop_ids: ids that end an answer; empty where the folder names none.
    """

    config: ModelConfig
    tokenizer: Any
    pictures: LlavaPictures
    image_placeholder: str
    stop_ids: tuple[int, ...]
    chat_templates: Mapping[str, str] = field(default_factory=dict)
    buckets: Buckets = field(default_factory=Buckets)

    @classmethod
    def from_folder(
        cls,
        folder: Path | str,
        config: ModelConfig,
        *,
        buckets: Buckets | None = None,
        max_image_pixels: int | None = None,
        exif_orientation: bool = False,
    ) -> Processor:
        """Reads tokenizer, preprocessor, chat template and generation config of a folder.

        Files that are missing, damaged or at odds with `config` raise `QuotaError`.

        Args:
            folder: a Hugging Face folder or the assets of a checkpoint.
            max_image_pixels: larger pictures are refused, at any stage of their processing; None
                takes Pillow's limit for decompression bombs (89,478,485).
            exif_orientation: turn pictures upright by their EXIF tag. Off, as transformers ignores
                the tag of a PIL image (it heeds it for paths).
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise QuotaError(f"{folder} is not a folder")
        tokenizer = load_tokenizer(folder)
        return cls(
            config=config,
            tokenizer=tokenizer,
            pictures=PICTURES[config.model_type].from_folder(
                folder,
                config,
                max_image_pixels=max_image_pixels,
                exif_orientation=exif_orientation,
            ),
            image_placeholder=find_placeholder(tokenizer, folder, config.image_token_id),
            stop_ids=read_stop_ids(tokenizer, folder, config.text.vocab_size),
            chat_templates=read_shipped_templates(tokenizer, folder),
            buckets=buckets or Buckets(),
        )

    def __call__(
        self,
        images: Sequence[Sequence[Any]] | None = None,
        prompts: Sequence[str] = (),
        *,
        max_new_tokens: int = 0,
        text_bucket: int | None = None,
        image_slots: int | None = None,
        images_per_prompt: int | None = None,
    ) -> Batch:
        """Builds a batch of raw prompts; no template is added.

        Args:
            images: for each prompt the list of its pictures (PIL images, paths or uint8 [H, W, C]
                arrays), one per placeholder; None for prompts without any.
            max_new_tokens: refuse prompts that leave less room within max_position_embeddings.
            text_bucket, image_slots, images_per_prompt: pin the shapes of the batch instead of
                taking them from the buckets and the longest prompt (visual_bucket is
                images_per_prompt times tokens_per_image); too small a value is refused.
        """
        shape = Shape(
            text_bucket=text_bucket, image_slots=image_slots, images_per_prompt=images_per_prompt
        )
        if not isinstance(prompts, list | tuple) or not all(isinstance(p, str) for p in prompts):
            raise QuotaError("prompts must be a list of strings")
        return self._batch(images, prompts, [True] * len(prompts), shape, max_new_tokens)

    def chat(
        self,
        conversations: Sequence[Sequence[Mapping[str, Any]]],
        template: str | None = None,
        add_generation_prompt: bool = True,
        *,
        max_new_tokens: int = 0,
        text_bucket: int | None = None,
        image_slots: int | None = None,
        images_per_prompt: int | None = None,
    ) -> Batch:
        """Renders conversations (see `render`) and builds their batch as `__call__` does.

        As in transformers, special tokens are not added to a prompt that already begins with the
        BOS token.
        """
        shape = Shape(
            text_bucket=text_bucket, image_slots=image_slots, images_per_prompt=images_per_prompt
        )
        prompts, images = self.render(conversations, template, add_generation_prompt)
        bos = self.tokenizer.bos_token
        add_special = [not (bos and prompt.startswith(bos)) for prompt in prompts]
        return self._batch(images, prompts, add_special, shape, max_new_tokens)

    def render(
        self,
        conversations: Sequence[Sequence[Mapping[str, Any]]],
        template: str | None = None,
        add_generation_prompt: bool = True,
    ) -> tuple[list[str], list[list[Any]]]:
        """The prompt text and the pictures of each conversation.

        Args:
            conversations: lists of messages {"role": "user", "content": text or list of parts}, a
                part being {"type": "text", "text": ...} or {"type": "image", "image": PIL image,
                path or array}.
            template: "llava", "vicuna_v1" or the name of a template in the folder; None takes the
                folder's own, else "llava".
        """
        if not isinstance(conversations, list | tuple) or any(
            isinstance(conversation, Mapping) for conversation in conversations
        ):
            raise QuotaError("chat takes a list of conversations, each a list of messages")
        prompts, pictures = [], []
        for place, conversation in enumerate(conversations):
            messages, images = read_conversation(
                conversation, self.image_placeholder, f"conversation {place}"
            )
            prompts.append(self._render_one(messages, template, add_generation_prompt))
            pictures.append(images)
        return prompts, pictures

    def _render_one(self, messages: Any, template: str | None, add_generation_prompt: bool) -> str:
        if template is None:
            template = "default" if "default" in self.chat_templates else "llava"
        if template in self.chat_templates:
            return render_shipped(
                self.tokenizer,
                self.chat_templates[template],
                messages,
                self.image_placeholder,
                add_generation_prompt,
            )
        if template not in TEMPLATES:
            known = sorted({*TEMPLATES, *self.chat_templates})
            raise QuotaError(f"unknown chat template {template!r}; known: {', '.join(known)}")
        return TEMPLATES[template](messages, self.image_placeholder, add_generation_prompt)

    def decode(self, tokens: Any, lengths: Any, skip_special_tokens: bool = True) -> list[str]:
        """The text of int[B, T] generated ids, of which the first `lengths[b]` of row b count."""
        tokens, lengths = np.asarray(tokens), np.asarray(lengths)
        if tokens.ndim != 2 or lengths.shape != tokens.shape[:1]:
            raise QuotaError(f"decode: tokens {tokens.shape} and lengths {lengths.shape} differ")
        if lengths.size and not 0 <= lengths.min() <= lengths.max() <= tokens.shape[1]:
            raise QuotaError(f"decode: lengths {lengths.tolist()} outside 0..{tokens.shape[1]}")
        return [
            decode(self.tokenizer, row[:length].tolist(), skip_special_tokens)
            for row, length in zip(tokens, lengths, strict=True)
        ]

    def decode_stream(self, *, skip_special_tokens: bool = True) -> DecodeStream:
        """A fresh `DecodeStream` for one answer."""
        return DecodeStream(self.tokenizer, skip_special_tokens=skip_special_tokens)

    def _batch(
        self,
        images: Sequence[Sequence[Any]] | None,
        prompts: Sequence[str],
        add_special: Iterable[bool],
        shape: Shape,
        max_new_tokens: int,
    ) -> Batch:
        if not prompts:
            raise QuotaError("the list of prompts is empty")
        images = [[] for _ in prompts] if images is None else images
        self._check_counts(images, prompts)
        ids = [
            self._tokenize(place, prompt, len(images[place]), special)
            for place, (prompt, special) in enumerate(zip(prompts, add_special, strict=True))
        ]
        for place, prompt_ids in enumerate(ids):
            self._check_room(place, len(prompt_ids), len(images[place]), max_new_tokens)
        return assemble(
            ids,
            self.pictures(images),
            image_token_id=self.config.image_token_id,
            tokens_per_image=self.pictures.tokens_per_image,
            buckets=self.buckets,
            shape=shape,
            filler_id=self.tokenizer.bos_token_id or 0,
        )

    def _check_counts(self, images: Any, prompts: Sequence[str]) -> None:
        if not isinstance(images, list | tuple) or not all(
            isinstance(row, list | tuple) for row in images
        ):
            raise QuotaError("images must hold one list of pictures for each prompt")
        if len(images) != len(prompts):
            raise QuotaError(f"{len(prompts)} prompts but {len(images)} lists of images")
        for place, (prompt, row) in enumerate(zip(prompts, images, strict=True)):
            count = prompt.count(self.image_placeholder)
            if count != len(row):
                raise QuotaError(
                    f"prompt {place} has {count} {self.image_placeholder} "
                    f"placeholder{'' if count == 1 else 's'} but {len(row)} "
                    f"image{'' if len(row) == 1 else 's'}"
                )

    def _tokenize(self, place: int, prompt: str, pictures: int, add_special: bool) -> np.ndarray:
        """int32[n] ids with one image token a picture.

        Expanding the text first, as transformers does, gives the same ids: image tokens are split
        off before anything else is tokenized.
        """
        # verbose=False: the tokenizer's own length limit is no matter here, `_check_room` has the
        # model's
        encoded = self.tokenizer(prompt, add_special_tokens=add_special, verbose=False)
        ids = np.asarray(encoded["input_ids"], np.int32)
        if not ids.size:
            raise QuotaError(f"prompt {place} is empty: it has no tokens")
        found = int(np.count_nonzero(ids == self.config.image_token_id))
        if found != pictures:
            raise QuotaError(
                f"prompt {place} tokenizes to {found} image tokens "
                f"(id {self.config.image_token_id}) for {pictures} "
                f"{self.image_placeholder} placeholders"
            )
        vocab_size = self.config.text.vocab_size
        if ids.max() >= vocab_size:
            token = self.tokenizer.convert_ids_to_tokens(int(ids.max()))
            raise QuotaError(
                f"prompt {place} holds token {token!r} with id {ids.max()}, "
                f"outside the model's vocabulary of {vocab_size}"
            )
        return ids

    def _check_room(self, place: int, length: int, pictures: int, max_new_tokens: int) -> None:
        if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int):
            raise QuotaError(f"max_new_tokens must be an integer, got {max_new_tokens!r}")
        if max_new_tokens < 0:
            raise QuotaError(f"max_new_tokens must not be negative, got {max_new_tokens}")
        text, visual = length - pictures, pictures * self.pictures.tokens_per_image
        limit = self.config.text.max_position_embeddings
        if text + visual + max_new_tokens > limit:
            raise QuotaError(
                f"prompt {place} is too long: {text} text + {visual} visual + {max_new_tokens} new "
                f"tokens exceed max_position_embeddings {limit}"
            )
