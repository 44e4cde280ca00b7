"""Prompts or conversations with their pictures to `Batch`, token ids back to text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from quota_jax.batch import Batch
from quota_jax.config import ModelConfig
from quota_jax.errors import QuotaError
from quota_jax.processing.buckets import Buckets, Shape, lay_out, pinned, read_shape
from quota_jax.processing.llava_pictures import LlavaPictures
from quota_jax.processing.pictures import Picture, PictureReader, Video
from quota_jax.processing.qwen_pictures import QwenPictures
from quota_jax.processing.templates import (
    DEFAULT_TEMPLATES,
    TEMPLATES,
    read_conversation,
    read_shipped_templates,
    render_shipped,
)
from quota_jax.processing.tokens import (
    DecodeStream,
    decode,
    find_placeholders,
    load_tokenizer,
    read_stop_ids,
)

PICTURES: dict[str, Any] = {"llava": LlavaPictures, "qwen2_5_vl": QwenPictures}
"""How each model type sees pictures."""


@dataclass(frozen=True, kw_only=True)
class Processor:
    """Between prompts and a model: tokenizer, image processor, chat templates and buckets.

    Token ids equal those of transformers' processor of the model with the same tokenizer, every
    picture expanded to its number of image tokens, and pixels equal those of its PIL image
    processor bit for bit. Nothing here depends on torch or reaches the network. Prompts, pictures,
    conversations and messages are counted from 0 in errors.

    placeholders: what stands for one input in a prompt, by kind: `{"image": "<image>"}`, or
        `{"image": "<|image_pad|>", "video": "<|video_pad|>"}`.
    chat_templates: Jinja templates by name as the folder ships them ("default" is used by `chat`).
    stop_ids: ids that end an answer; empty where the folder names none.
    """

    config: ModelConfig
    tokenizer: Any
    pictures: PictureReader
    placeholders: Mapping[str, str]
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
        limits: dict[str, Any] = {"exif_orientation": exif_orientation}
        if max_image_pixels is not None:
            limits["max_image_pixels"] = max_image_pixels
        return cls(
            config=config,
            tokenizer=tokenizer,
            pictures=PICTURES[config.model_type].from_folder(folder, config, **limits),
            placeholders=find_placeholders(tokenizer, folder, config),
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
        **shape: int | None,
    ) -> Batch:
        """Builds a batch of raw prompts; no template is added.

        Args:
            images: for each prompt the list of its pictures (PIL images, paths, uint8 [H, W, C]
                arrays, or `Video`s), one per placeholder; None for prompts without any.
            max_new_tokens: refuse prompts that leave less room within max_position_embeddings.
            shape: pins shapes of the batch instead of taking them from the buckets and the longest
                prompt; too small a value is refused. `text_bucket`, `image_slots`; for pictures of
                one size `images_per_prompt`; for others `visual_bucket` (tokens of a prompt) and
                `patch_bucket` (patches of a picture).
        """
        bounds = read_shape(shape)
        if not isinstance(prompts, list | tuple) or not all(isinstance(p, str) for p in prompts):
            raise QuotaError("prompts must be a list of strings")
        return self._batch(images, prompts, [True] * len(prompts), bounds, max_new_tokens)

    def chat(
        self,
        conversations: Sequence[Sequence[Mapping[str, Any]]],
        template: str | None = None,
        add_generation_prompt: bool = True,
        *,
        max_new_tokens: int = 0,
        **shape: int | None,
    ) -> Batch:
        """Renders conversations (see `render`) and builds their batch as `__call__` does.

        As in transformers, special tokens are not added to a prompt that already begins with the
        BOS token.
        """
        bounds = read_shape(shape)
        prompts, images = self.render(conversations, template, add_generation_prompt)
        return self._batch(images, prompts, self._add_special(prompts), bounds, max_new_tokens)

    def encode(
        self,
        conversations: Sequence[Sequence[Mapping[str, Any]]],
        template: str | None = None,
        add_generation_prompt: bool = True,
    ) -> tuple[list[np.ndarray], list[list[Any]]]:
        """Token ids of each conversation, one for each picture, and its pictures as they are.

        The first half of `chat`, for callers that read pictures elsewhere (`pictures.read`) and
        then call `lay_out`.
        """
        prompts, images = self.render(conversations, template, add_generation_prompt)
        self._check_counts(images, prompts)
        return self._encode(images, prompts, self._add_special(prompts)), images

    def lay_out(
        self, ids: Sequence[np.ndarray], pictures: Sequence[Sequence[Picture]], **shape: int | None
    ) -> Batch:
        """The batch of encoded prompts and read pictures, in numpy arrays on the host.

        Args:
            ids: int32[n] token ids of each prompt, one for each picture (see `encode`).
            shape: as for `__call__`.
        """
        return self._lay_out(ids, pictures, read_shape(shape))

    def render(
        self,
        conversations: Sequence[Sequence[Mapping[str, Any]]],
        template: str | None = None,
        add_generation_prompt: bool = True,
    ) -> tuple[list[str], list[list[Any]]]:
        """The prompt text and the pictures of each conversation.

        Args:
            conversations: lists of messages {"role": "user", "content": text or list of parts}, a
                part being {"type": "text", "text": ...}, {"type": "image", "image": PIL image,
                path or array} or {"type": "video", "video": `Video`}.
            template: "llava", "vicuna_v1", "chatml" or the name of a template in the folder; None
                takes the folder's own, else the one of the model family.
        """
        if not isinstance(conversations, list | tuple) or any(
            isinstance(conversation, Mapping) for conversation in conversations
        ):
            raise QuotaError("chat takes a list of conversations, each a list of messages")
        prompts, pictures = [], []
        for place, conversation in enumerate(conversations):
            messages, images = read_conversation(
                conversation, self.placeholders, f"conversation {place}"
            )
            prompts.append(self._render_one(messages, template, add_generation_prompt))
            pictures.append(images)
        return prompts, pictures

    def _render_one(self, messages: Any, template: str | None, add_generation_prompt: bool) -> str:
        if template is None:
            own = "default" in self.chat_templates
            template = "default" if own else DEFAULT_TEMPLATES[self.config.model_type]
        if template in self.chat_templates:
            return render_shipped(
                self.tokenizer,
                self.chat_templates[template],
                messages,
                self.placeholders,
                add_generation_prompt,
            )
        if template not in TEMPLATES:
            known = sorted({*TEMPLATES, *self.chat_templates})
            raise QuotaError(f"unknown chat template {template!r}; known: {', '.join(known)}")
        return TEMPLATES[template](messages, self.placeholders, add_generation_prompt)

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
        ids = self._encode(images, prompts, add_special)
        read = self.pictures.read_all(images)
        for place, (prompt_ids, pictures) in enumerate(zip(ids, read, strict=True)):
            self._check_room(place, len(prompt_ids), pictures, max_new_tokens)
        return jax.tree.map(jnp.asarray, self._lay_out(ids, read, shape))

    def _add_special(self, prompts: Sequence[str]) -> list[bool]:
        bos = self.tokenizer.bos_token
        return [not (bos and prompt.startswith(bos)) for prompt in prompts]

    def _encode(
        self,
        images: Sequence[Sequence[Any]],
        prompts: Sequence[str],
        add_special: Iterable[bool],
    ) -> list[np.ndarray]:
        return [
            self._tokenize(place, prompt, images[place], special)
            for place, (prompt, special) in enumerate(zip(prompts, add_special, strict=True))
        ]

    def _lay_out(
        self, ids: Sequence[np.ndarray], read: Sequence[Sequence[Picture]], shape: Shape
    ) -> Batch:
        """Chooses the shapes and lays everything out."""
        kinds = list(self.pictures.placeholders)
        visual = [np.isin(prompt_ids, kinds) for prompt_ids in ids]
        texts = max(int((~is_visual).sum()) for is_visual in visual)
        text_bucket = pinned(shape.text_bucket, texts, "text_bucket", "text tokens in a prompt")
        pixels, rows = self.pictures.pack([p for row in read for p in row], self.buckets, shape)
        left = iter(rows)
        return lay_out(
            ids,
            [[next(left) for _ in row] for row in read],
            [self.pictures.positions(*pair) for pair in zip(visual, read, strict=True)],
            pixels,
            placeholders=kinds,
            text_bucket=self.buckets.for_text(texts) if text_bucket is None else text_bucket,
            visual_bucket=self.pictures.visual_bucket(read, self.buckets, shape),
            batch_size=self.buckets.for_rows(len(ids)),
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
            for kind, text in self.placeholders.items():
                found = prompt.count(text)
                given = sum(isinstance(image, Video) == (kind == "video") for image in row)
                if found != given:
                    raise QuotaError(
                        f"prompt {place} has {found} {text} "
                        f"placeholder{'' if found == 1 else 's'} but {given} "
                        f"{kind}{'' if given == 1 else 's'}"
                    )

    def _tokenize(
        self, place: int, prompt: str, images: Sequence[Any], add_special: bool
    ) -> np.ndarray:
        """int32[n] ids with one placeholder token a picture.

        Expanding the text first, as transformers does, gives the same ids: image tokens are split
        off before anything else is tokenized.
        """
        # verbose=False: the tokenizer's own length limit is no matter here, `_check_room` has the
        # model's
        encoded = self.tokenizer(prompt, add_special_tokens=add_special, verbose=False)
        ids = np.asarray(encoded["input_ids"], np.int32)
        if not ids.size:
            raise QuotaError(f"prompt {place} is empty: it has no tokens")
        found = ids[np.isin(ids, list(self.pictures.placeholders))].tolist()
        expected = [self.pictures.token_id(image) for image in images]
        if len(found) != len(expected):
            raise QuotaError(
                f"prompt {place} tokenizes to {len(found)} image tokens "
                f"(id {self.config.image_token_id}) for {len(expected)} "
                f"{' or '.join(self.placeholders.values())} placeholders"
            )
        if found != expected:
            kinds = [self.pictures.placeholders[token] for token in found]
            raise QuotaError(
                f"prompt {place}: its placeholders stand for {', '.join(kinds)} in this order; "
                "the inputs are in another"
            )
        vocab_size = self.config.text.vocab_size
        if ids.max() >= vocab_size:
            token = self.tokenizer.convert_ids_to_tokens(int(ids.max()))
            raise QuotaError(
                f"prompt {place} holds token {token!r} with id {ids.max()}, "
                f"outside the model's vocabulary of {vocab_size}"
            )
        return ids

    def _check_room(
        self, place: int, length: int, pictures: Sequence[Picture], max_new_tokens: int
    ) -> None:
        if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int):
            raise QuotaError(f"max_new_tokens must be an integer, got {max_new_tokens!r}")
        if max_new_tokens < 0:
            raise QuotaError(f"max_new_tokens must not be negative, got {max_new_tokens}")
        text = length - len(pictures)
        visual = sum(picture.num_tokens for picture in pictures)
        limit = self.config.text.max_position_embeddings
        if text + visual + max_new_tokens > limit:
            raise QuotaError(
                f"prompt {place} is too long: {text} text + {visual} visual + {max_new_tokens} new "
                f"tokens exceed max_position_embeddings {limit}"
            )
