"""Calibration data: a JSON list of {"image": path, "text": prompt} to batches of one shape.

In place of "text" a sample may have "turns", those of user and assistant one after the other: they
become a conversation in the chat template of the model that is calibrated. "source" says where a
sample comes from and is read by people only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from quota_jax.batch import Batch
from quota_jax.config import QwenVlConfig
from quota_jax.errors import QuotaError
from quota_jax.processing import Processor
from quota_jax.quant.blocks import Block
from quota_jax.quantization import QuantizationConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """A text with one picture (a path, PIL image or array) or without.

    Text that holds no placeholder for its picture becomes a user's turn in the chat template; text
    without a picture stays as it is. turns, in place of text: of user and assistant by turns, the
    picture in front of the first.
    """

    text: str = ""
    image: Any = None
    turns: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class CalibrationData:
    """Batches of equal shape; the first ``counts[i]`` rows of batch i are samples.

    While blocks are calibrated on a pruned model, ``batches`` hold what is left for the next one.
    """

    batches: list[Any]
    counts: list[int]

    def masks(self, block: Block) -> list[jax.Array]:
        """Which rows of the block's output belong to samples, for each batch."""
        pairs = zip(self.batches, self.counts, strict=True)
        return [block.mask(batch, count) for batch, count in pairs]

    def check(self, quantization: QuantizationConfig) -> None:
        """Vision tower and projector learn from pictures only."""
        seen = any(bool(batch.is_visual.any()) for batch in self.batches)
        needs = [module for module in ("vision", "projector") if quantization.quantizes(module)]
        if needs and not seen:
            raise QuotaError(f"the calibration data hold no picture, which {needs[0]} needs")


def read_samples(path: str | Path, limit: int | None = None) -> list[Sample]:
    """The first ``limit`` entries of the list; paths of pictures are relative to the file.

    Raises:
      QuotaError: the file is no such list; the entry is named, counted from 0.
    """
    path = Path(path)
    try:
        entries = json.loads(path.read_bytes())
    except OSError as error:
        raise QuotaError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise QuotaError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(entries, list) or not entries:
        raise QuotaError(f"{path}: expected a JSON list of samples that is not empty")
    if limit is not None and limit > len(entries):
        raise QuotaError(f"{path}: holds {len(entries)} samples, {limit} were asked for")
    samples = []
    for place, entry in enumerate(entries[:limit]):
        where = f"{path}: sample {place}"
        if not isinstance(entry, dict):
            raise QuotaError(f"{where}: expected an object with 'text' and perhaps 'image'")
        if unknown := sorted(set(entry) - {"text", "turns", "image", "source"}):
            raise QuotaError(f"{where}: unknown field {unknown[0]!r}")
        text, turns = _words(entry, where)
        image = entry.get("image")
        if image is not None:
            if not isinstance(image, str) or not image:
                raise QuotaError(f"{where}: 'image' must be a path")
            # The list is the user's own: it may name pictures anywhere.
            if not (path.parent / image).is_file():
                raise QuotaError(f"{where}: no picture {path.parent / image}")
            image = str(path.parent / image)
        samples.append(Sample(text=text, turns=turns, image=image))
    return samples


def _words(entry: Mapping[str, Any], where: str) -> tuple[str, tuple[str, ...]]:
    if "turns" not in entry:
        text = entry.get("text")
        if not isinstance(text, str) or not text.strip():
            raise QuotaError(f"{where}: 'text' must be a string that is not empty")
        return text, ()
    turns = entry["turns"]
    if "text" in entry:
        raise QuotaError(f"{where}: 'text' and 'turns' exclude each other")
    if (
        not isinstance(turns, list)
        or not turns
        or any(not isinstance(turn, str) or not turn.strip() for turn in turns)
    ):
        raise QuotaError(f"{where}: 'turns' must be a list of strings that are not empty")
    return "", tuple(turns)


def digest(samples: Sequence[Sample]) -> str:
    """Checksum of texts and pictures: equal digests promise equal calibrations."""
    found = hashlib.sha256()
    for sample in samples:
        found.update(json.dumps(sample.turns or sample.text).encode())
        if isinstance(sample.image, str | Path):
            try:
                found.update(hashlib.sha256(Path(sample.image).read_bytes()).digest())
            except OSError as error:
                raise QuotaError(f"{sample.image}: cannot be read: {error.strerror}") from None
        elif sample.image is not None:
            pixels = np.asarray(sample.image)
            found.update(f"{pixels.shape}".encode() + pixels.tobytes())
    return found.hexdigest()


def make_batches(
    processor: Processor, samples: Sequence[Sample], batch_size: int
) -> CalibrationData:
    """Batches of ``batch_size`` samples in their order, all with the shapes that the largest
    needs."""
    rows = [_prompt(processor, sample) for sample in samples]
    groups = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]

    def build(group, **shape):
        # A short last batch is filled up with copies, which count for nothing.
        full = [*group, *[group[0]] * (batch_size - len(group))]
        prompts, images = zip(*full, strict=True)
        return processor(images=list(images), prompts=list(prompts), **shape)

    batches = [build(group) for group in groups]
    shape = {
        "text_bucket": max(batch.text_bucket for batch in batches),
        "image_slots": max(_slots(batch) for batch in batches),
    }
    visual = max(batch.visual_bucket for batch in batches)
    if isinstance(processor.config, QwenVlConfig):
        shape["visual_bucket"] = visual
        shape["patch_bucket"] = max(batch.pixels.values.shape[1] for batch in batches)
    else:
        shape["images_per_prompt"] = visual // processor.config.tokens_per_image
    return CalibrationData(
        batches=[build(group, **shape) for group in groups],
        counts=[len(group) for group in groups],
    )


def _slots(batch: Batch) -> int:
    return getattr(batch.pixels, "values", batch.pixels).shape[0]


def _prompt(processor: Processor, sample: Sample) -> tuple[str, list[Any]]:
    if not sample.turns:
        if sample.image is None:
            return sample.text, []
        if processor.placeholders["image"] in sample.text:
            return sample.text, [sample.image]
    messages = [
        {"role": ("user", "assistant")[i % 2], "content": [{"type": "text", "text": text}]}
        for i, text in enumerate(sample.turns or (sample.text,))
    ]
    if sample.image is not None:
        messages[0]["content"].insert(0, {"type": "image", "image": sample.image})
    # A conversation that has its answer ends with it.
    asks = bool(len(messages) % 2)
    prompts, images = processor.render([messages], add_generation_prompt=asks)
    # The tokenizer puts its first token in front itself.
    return prompts[0].removeprefix(processor.tokenizer.bos_token or ""), images[0]
