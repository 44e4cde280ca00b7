"""Draws calibration samples from sources and stores them as the list that ``calibrate`` reads.

The paper draws 128 samples once and keeps them as a static JSON file, for LLaVA from LLaVA-Mix, for
Qwen2.5-VL from LLaVA-Mix, WikiText, TextVQA, DocVQA and ChartQA; it states no shares.
"""

from __future__ import annotations

import math
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from quota_jax.checkpoint.format import encode_json, remove, sync_path, sync_tree, write_file
from quota_jax.errors import QuotaError
from quota_jax.evaluate.pictures import FilePicture
from quota_jax.quant.sample_sources import Draft, MissingPictureError, Source


@dataclass(frozen=True, kw_only=True, slots=True)
class DrawOptions:
    """What is drawn, and how much of a row a sample holds.

    exchanges: questions, each with its answer; 0 takes all of a conversation. max_characters: of a
    sample's text. answers: without, a sample ends with its last question. skip_missing: pass over
    rows whose picture is not there.
    """

    count: int = 128
    seed: int = 0
    exchanges: int = 1
    max_characters: int = 2000
    answers: bool = True
    skip_missing: bool = False

    def __post_init__(self):
        for name, least in (("count", 1), ("seed", 0), ("exchanges", 0), ("max_characters", 1)):
            if getattr(self, name) < least:
                raise QuotaError(f"{name} must be at least {least}, got {getattr(self, name)}")


def allot(count: int, shares: Sequence[float]) -> list[int]:
    """``count`` parted in proportion to ``shares``; the largest remainders, of equal ones the
    first, get what rounding down leaves.

    Raises:
      QuotaError: a negative share, or none above 0.
    """
    if any(not math.isfinite(share) or share < 0 for share in shares):
        raise QuotaError(f"shares must not be negative, got {list(shares)}")
    if not (total := sum(shares)):
        raise QuotaError("at least one share must be above 0")
    exact = [count * share / total for share in shares]
    parts = [math.floor(value) for value in exact]
    order = sorted(range(len(parts)), key=lambda i: parts[i] - exact[i])
    for i in order[: count - sum(parts)]:
        parts[i] += 1
    return parts


def draw_samples(
    sources: Sequence[Source], shares: Sequence[float], options: DrawOptions
) -> list[Draft]:
    """Draws without replacement; equal files, options and order of sources give equal lists.

    The samples of a source do not depend on the other sources, and a smaller share takes the first
    of a larger one. The list is mixed, so its beginning is of all sources.

    Raises:
      QuotaError: a source has too few rows; a drawn row is malformed or lacks its picture.
    """
    drafts = []
    for source, wanted in zip(sources, allot(options.count, shares), strict=True):
        drafts += _draw(source, wanted, options)
    order = np.random.default_rng(options.seed).permutation(len(drafts))
    return [drafts[i] for i in order]


def _draw(source: Source, wanted: int, options: DrawOptions) -> list[Draft]:
    generator = np.random.default_rng([options.seed, zlib.crc32(source.name.encode())])
    found: list[Draft] = []
    missing = 0
    for place in generator.permutation(len(source)) if len(source) >= wanted else ():
        if len(found) == wanted:
            break
        try:
            draft = source.draft(int(place))
        except MissingPictureError:
            if not options.skip_missing:
                raise
            missing += 1
            continue
        if options.exchanges:
            draft = replace(draft, turns=draft.turns[: 2 * options.exchanges])
        if not options.answers:
            draft = draft.question()
        found.append(draft.shortened(options.max_characters))
    if len(found) < wanted:
        have = f"{len(source)} rows of use" + (f", {missing} without picture" if missing else "")
        raise QuotaError(f"{source.name}: {have}; {wanted} were asked for")
    return found


def pictures_folder(out: Path) -> Path:
    """Where the pictures of a list lie: ``calib_pictures`` beside ``calib.json``."""
    return out.with_name(f"{out.stem}_pictures")


def check_free(out: Path) -> None:
    """Refuses to overwrite a list or its pictures."""
    for path in (out, pictures_folder(out)):
        if os.path.lexists(path):
            raise QuotaError(f"{path} exists already")


@contextmanager
def new_list(out: Path) -> Iterator[tuple[Path, str, list[dict[str, Any]]]]:
    """A list of samples to be filled: a folder for the pictures, the name that it will have beside
    the list, and the list's entries.

    At the end of the block the folder gets its name, if there is a picture in it, and the list is
    written last; after an error neither is there.

    Raises:
      QuotaError: something is in the way, or a file cannot be written.
    """
    check_free(out)
    folder = pictures_folder(out)
    partial = folder.with_name(f"{folder.name}.partial")
    entries: list[dict[str, Any]] = []
    try:
        remove(partial)
        partial.mkdir(parents=True)
        yield partial, folder.name, entries
        if any(partial.iterdir()):
            sync_tree(partial)
            partial.rename(folder)
            sync_path(folder.parent)
        write_file(out, encode_json(entries, str(out)))
    except OSError as error:
        raise QuotaError(f"{error.filename or out}: {error.strerror or error}") from None
    finally:
        remove(partial)


def write_samples(
    drafts: Sequence[Draft],
    out: Path,
    progress: Callable[[int], object] | None = None,
) -> None:
    """Writes the list and copies of its pictures, so that it may be moved and nothing changes it.

    Every picture is decoded once. The list comes last: it is there only if all pictures are.

    Args:
      progress: called with 1 after each sample.

    Raises:
      QuotaError: something is in the way, or a picture cannot be decoded.
    """
    names: dict[Path, str] = {}
    with new_list(out) as (folder, stem, entries):
        for place, draft in enumerate(drafts):
            entry: dict[str, Any] = {"source": draft.origin}
            if draft.picture is not None:
                if draft.picture not in names:
                    name = f"{place:04d}{draft.picture.suffix.lower()}"
                    _copy(draft, draft.picture, folder / name)
                    names[draft.picture] = name
                entry["image"] = f"{stem}/{names[draft.picture]}"
            entry |= {"turns": list(draft.turns)} if draft.turns else {"text": draft.text}
            entries.append(entry)
            if progress:
                progress(1)


def _copy(draft: Draft, source: Path, target: Path) -> None:
    try:
        FilePicture(path=source).load()
    except QuotaError as error:
        raise QuotaError(f"{draft.where}: {error}") from None
    shutil.copyfile(source, target)
