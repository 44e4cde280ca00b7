"""Requests to batches of few shapes: which rows go together, and how each batch is padded.

The plan is a function of the requests alone, never of what has been answered before, so a resumed
run forms the batches of an uninterrupted one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

import numpy as np

from quota_jax.errors import QuotaError
from quota_jax.generation import room_for
from quota_jax.processing import Processor
from quota_jax.processing.pictures import Bounds


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One conversation to be continued.

    name: for errors. conversation: messages as `Processor.chat` takes them, but every picture is a
    `PictureSource` (hashable; ``load()`` opens it, ``name`` is for errors). max_new_tokens: most
    new tokens; fewer where the model's positions end before. until: texts that end the answer and
    are not part of it. temperature, top_p, top_k, seed: as for `quota_jax.generate`.
    """

    name: str
    conversation: Sequence[Mapping[str, Any]]
    max_new_tokens: int
    until: tuple[str, ...] = ()
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class Bucket:
    """What all batches of one compiled program share.

    bounds: shapes of a prompt's pictures. text: text tokens of the longest prompt. room: places for
    new tokens. sampled: whether any row draws its tokens.
    """

    bounds: Bounds
    text: int
    room: int
    sampled: bool

    def pins(self, rows: int) -> dict[str, int]:
        """The shape of a batch of so many rows, for `Processor.lay_out`."""
        return {"text_bucket": self.text, **self.bounds.pins(rows)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """A request in token ids, one for each picture.

    max_new: new tokens that fit. digest: names the token ids.
    """

    request: Request
    ids: np.ndarray
    pictures: tuple[Any, ...]
    max_new: int
    bucket: Bucket
    digest: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Prompts, by their place, that are answered as one batch."""

    bucket: Bucket
    rows: tuple[int, ...]

    def filled(self, size: int) -> list[int]:
        """``size`` rows: the group's own, then its first one again.

        A copy, not an empty row: it needs the same shapes and stops no later than the others.
        """
        return [*self.rows, *[self.rows[0]] * (size - len(self.rows))]


def encode(
    requests: Sequence[Request],
    processor: Processor,
    *,
    template: str | None = None,
    pool: Executor | None = None,
) -> list[Prompt]:
    """Renders and tokenizes every request and finds its bucket.

    Pictures are opened only where their size decides the shape (each once, on ``pool``).

    Raises:
        QuotaError: a request that cannot be rendered or does not fit the model, by its name.
    """
    rendered = []
    for request in requests:
        try:
            (ids,), (pictures,) = processor.encode([request.conversation], template)
        except QuotaError as error:
            raise QuotaError(f"{request.name}: {error}") from None
        rendered.append((request, ids, tuple(pictures)))
    sizes = _sizes((picture for *_, pictures in rendered for picture in pictures), processor, pool)
    return [_prompt(*each, sizes, processor) for each in rendered]


def _sizes(
    pictures: Iterable[Any], processor: Processor, pool: Executor | None
) -> dict[Any, tuple[int, int]]:
    """Width and height of each different picture; zeros where the model does not care."""
    different = list(dict.fromkeys(pictures))
    reader = processor.pictures
    if not reader.any_size:
        return dict.fromkeys(different, (0, 0))

    def size(source: Any) -> tuple[int, int]:
        return reader.open(source.load(), source.name).size

    return dict(zip(different, (pool.map if pool else map)(size, different), strict=True))


def _prompt(
    request: Request,
    ids: np.ndarray,
    pictures: tuple[Any, ...],
    sizes: Mapping[Any, tuple[int, int]],
    processor: Processor,
) -> Prompt:
    reader, buckets = processor.pictures, processor.buckets
    if request.max_new_tokens < 1:
        raise QuotaError(f"{request.name}: max_new_tokens must be at least 1")
    own = [sizes[picture] for picture in pictures]
    text, visual = len(ids) - len(pictures), sum(map(reader.count_tokens, own))
    limit = processor.config.text.max_position_embeddings
    if text + visual >= limit:
        raise QuotaError(
            f"{request.name}: {text} text and {visual} visual tokens leave no room for an answer "
            f"within the model's {limit} positions"
        )
    try:
        bounds = reader.bounds(own, buckets)
        bucket = Bucket(
            bounds=bounds,
            text=buckets.for_text(text),
            room=room_for(min(request.max_new_tokens, limit)),
            sampled=request.temperature > 0,
        )
    except QuotaError as error:
        raise QuotaError(f"{request.name}: {error}") from None
    return Prompt(
        request=request,
        ids=ids,
        pictures=pictures,
        max_new=min(request.max_new_tokens, limit - text - visual),
        bucket=bucket,
        digest=hashlib.sha256(ids.astype("<i4").tobytes()).hexdigest()[:16],
    )


def plan(prompts: Sequence[Prompt], size: int) -> list[Group]:
    """Batches of up to ``size`` prompts, one bucket after the other, the largest first.

    So a shape that does not fit the device fails at the start. Inside a bucket prompts keep their
    order.
    """
    if size < 1:
        raise QuotaError(f"batch size must be at least 1, got {size}")
    members: dict[Bucket, list[int]] = {}
    for place, prompt in enumerate(prompts):
        members.setdefault(prompt.bucket, []).append(place)
    return [
        Group(bucket=bucket, rows=tuple(members[bucket][start : start + size]))
        for bucket in sorted(members, reverse=True)
        for start in range(0, len(members[bucket]), size)
    ]
