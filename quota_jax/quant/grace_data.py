"""Which tokens of a batch are predicted, and from where: the answers of conversations, or all
text."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from quota_jax.errors import QuotaError
from quota_jax.processing import Processor
from quota_jax.quant.calibration_data import Sample, make_batches


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("places", "labels", "weights"), meta_fields=()
)
@dataclass(frozen=True, kw_only=True)
class Targets:
    """Up to M predicted tokens of each sample.

    places: the token before each, where its logits are read. labels: the token itself. weights: 1,
    or 0 for unused entries.
    """

    places: Any
    labels: Any
    weights: Any


def make_training_batches(
    processor: Processor, samples: Sequence[Sample], batch_size: int, targets: str
) -> list[tuple[Any, Targets]]:
    """Batches of one shape on the host, with what is predicted in them.

    All pictures stay in host memory (LLaVA-1.5: 1.35 MB each).

    Args:
      targets: "answers" (of conversations, with the token that ends each), or "text" (every text
        token behind another one).

    Raises:
      QuotaError: a sample has nothing to predict, or its chat template has no place for answers.
    """
    data = make_batches(processor, samples, batch_size)
    found = []
    for start, batch in enumerate(data.batches):
        batch = jax.tree.map(np.asarray, batch)
        group = samples[start * batch_size : (start + 1) * batch_size]
        rows = []
        for row, sample in enumerate(group):
            where = f"sample {start * batch_size + row}"
            if targets == "text":
                rows.append(_text_places(batch, row))
            else:
                rows.append(_answer_places(processor, sample, batch, row, where))
            if not rows[-1]:
                raise QuotaError(f"{where} has no text to learn")
        found.append((batch, rows))
    width = max(len(places) for _, rows in found for places in rows)
    return [(batch, _targets(batch, rows, width)) for batch, rows in found]


def _targets(batch: Any, rows: list[list[int]], width: int) -> Targets:
    places = np.zeros((len(batch.tokens), width), np.int32)
    labels, weights = places.copy(), np.zeros(places.shape, np.float32)
    for row, predicted in enumerate(rows):
        used = slice(0, len(predicted))
        places[row, used] = np.array(predicted) - 1
        labels[row, used] = batch.tokens[row, predicted]
        weights[row, used] = 1
    return Targets(places=places, labels=labels, weights=weights)


def _text(batch: Any, row: int) -> np.ndarray:
    """Places of the text tokens of a sample."""
    return np.flatnonzero(np.asarray(batch.is_real & ~batch.is_visual)[row])


def _text_places(batch: Any, row: int) -> list[int]:
    text = _text(batch, row)
    # A visual token may be pruned: nothing is predicted from one.
    return [int(place) for place in text if place - 1 in text]


def _answer_places(
    processor: Processor, sample: Sample, batch: Any, row: int, where: str
) -> list[int]:
    """Places of the answers' tokens, up to the one that ends an answer."""
    if len(sample.turns) < 2:
        raise QuotaError(
            f"{where} has no answer to learn: give turns of user and assistant, or targets 'text'"
        )
    picture = processor.config.image_token_id
    text = _text(batch, row)
    whole = _encode(processor, sample, len(sample.turns))
    words = whole[whole != picture]
    if words.tolist() != batch.tokens[row, text].tolist():
        raise QuotaError(f"{where}: its conversation and its batch have other tokens")
    places: list[int] = []
    for turn in range(1, len(sample.turns), 2):
        asked, answered = (_encode(processor, sample, count) for count in (turn, turn + 1))
        start, end = len(asked), _common(answered, whole)
        if _common(asked, whole) < start or end <= start:
            raise QuotaError(
                f"{where}: the chat template does not write an answer right behind its question"
            )
        answer = whole[start:end]
        stops = np.flatnonzero(np.isin(answer, processor.stop_ids))
        if stops.size:
            end = start + int(stops[0]) + 1
        skipped = int((whole[:start] == picture).sum())
        places += text[start - skipped : end - skipped].tolist()
    return places


def _encode(processor: Processor, sample: Sample, count: int) -> np.ndarray:
    """Token ids of the first turns; behind a question, of the words that ask for its answer."""
    messages: list[dict[str, Any]] = [
        {"role": ("user", "assistant")[i % 2], "content": [{"type": "text", "text": text}]}
        for i, text in enumerate(sample.turns[:count])
    ]
    if sample.image is not None:
        messages[0]["content"].insert(0, {"type": "image", "image": sample.image})
    ids, _ = processor.encode([messages], add_generation_prompt=bool(count % 2))
    return np.asarray(ids[0])


def _common(first: np.ndarray, second: np.ndarray) -> int:
    """How many ids both begin with."""
    length = min(len(first), len(second))
    other = np.flatnonzero(first[:length] != second[:length])
    return int(other[0]) if other.size else length
