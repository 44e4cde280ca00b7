"""``quota-jax samples``: draws the list of pictures and texts that calibrate looks at."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quota_jax.cli.console import table
from quota_jax.errors import QuotaError

if TYPE_CHECKING:
    from quota_jax.quant.sample_sources import Source


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Draw calibration samples from published files and store them as a list for calibrate.

    The list and the folder OUT_pictures beside it, with copies of the pictures, hold all that
    calibration needs. A sample is a question and its answer, in the chat template of whichever
    model is calibrated; passages of WikiText stay plain. Equal files, options and seeds give equal
    lists. Files larger than memory are fine, but WikiText's, which are held whole.

    For example:
      quota-jax samples --llava-mix llava_v1_5_mix665k.json --images data --out calib.json
      quota-jax samples --llava-mix llava_v1_5_mix665k.json --images data \\
          --wikitext wiki.train.raw --textvqa TextVQA_0.5.1_train.json \\
          --docvqa train_v1.0_withQT.json --chartqa train_human.json train_augmented.json \\
          --out calib.json
    """

    out: Path
    """List to write, JSON; must not exist."""
    count: int = 128
    """Samples in all."""
    seed: int = 0
    """Of the draw."""
    llava_mix: tuple[Path, ...] = ()
    """Lists of {id, image, conversations} such as llava_v1_5_mix665k.json."""
    images: Path | None = None
    """Folder of LLaVA's pictures (coco, gqa, ...); default that of the list."""
    textvqa: tuple[Path, ...] = ()
    """TextVQA_0.5.1_train.json."""
    textvqa_images: Path | None = None
    """Its pictures; default train_images beside the file."""
    docvqa: tuple[Path, ...] = ()
    """train_v1.0_withQT.json."""
    docvqa_images: Path | None = None
    """Folder that holds `documents`; default that of the file."""
    chartqa: tuple[Path, ...] = ()
    """train_human.json and train_augmented.json."""
    chartqa_images: Path | None = None
    """Its pictures; default png beside the file."""
    wikitext: tuple[Path, ...] = ()
    """Text, JSON lines or parquet with a column "text"."""
    llava_mix_share: float | None = None
    """Share of this source, in proportion to the others'; default 1."""
    textvqa_share: float | None = None
    """The same; 0 leaves a source out."""
    docvqa_share: float | None = None
    """The same."""
    chartqa_share: float | None = None
    """The same."""
    wikitext_share: float | None = None
    """The same."""
    text_only: bool = False
    """Draw LLaVA's conversations without a picture too."""
    exchanges: int = 1
    """Questions of a conversation, each with its answer; 0: all."""
    max_characters: int = 2000
    """Text beyond this is cut, between words."""
    no_answers: bool = False
    """Samples end with the question, where a model would begin to answer."""
    skip_missing: bool = False
    """Pass over rows whose picture is not there."""

    def run(self) -> int:
        from tqdm import tqdm

        from quota_jax.quant.sample_lists import (
            DrawOptions,
            check_free,
            draw_samples,
            pictures_folder,
            write_samples,
        )

        options = DrawOptions(
            count=self.count,
            seed=self.seed,
            exchanges=self.exchanges,
            max_characters=self.max_characters,
            answers=not self.no_answers,
            skip_missing=self.skip_missing,
        )
        check_free(self.out)
        shares = self._shares()
        sources = self._sources()
        drafts = draw_samples(sources, shares, options)
        with tqdm(desc="samples", total=len(drafts), disable=None, leave=False) as bar:
            write_samples(drafts, self.out, bar.update)
        taken = Counter(draft.origin.partition(" ")[0] for draft in drafts)
        rows = [(each.name, len(each), taken[each.name]) for each in sources]
        print(table(("source", "rows", "samples"), rows))
        pictures = pictures_folder(self.out)
        beside = f" and {pictures}" if pictures.exists() else ""
        print(f"wrote {self.out}{beside}: {len(drafts)} samples, seed {self.seed}")
        return 0

    def _shares(self) -> list[float]:
        """Of the sources that are given, in the order of ``_sources``."""
        given = {
            "llava-mix": (self.llava_mix, self.images, self.llava_mix_share),
            "textvqa": (self.textvqa, self.textvqa_images, self.textvqa_share),
            "docvqa": (self.docvqa, self.docvqa_images, self.docvqa_share),
            "chartqa": (self.chartqa, self.chartqa_images, self.chartqa_share),
            "wikitext": (self.wikitext, None, self.wikitext_share),
        }
        shares = []
        for name, (files, images, share) in given.items():
            if files:
                shares.append(1.0 if share is None else share)
            elif share is not None:
                raise QuotaError(f"--{name}-share needs --{name}")
            elif images is not None:
                option = "images" if name == "llava-mix" else f"{name}-images"
                raise QuotaError(f"--{option} needs --{name}")
        if not shares:
            raise QuotaError(f"no source: name files with --{', --'.join(given)}")
        if self.text_only and not self.llava_mix:
            raise QuotaError("--text-only needs --llava-mix")
        return shares

    def _sources(self) -> list[Source]:
        from quota_jax.quant import sample_sources as read

        sources: list[Source] = []
        if self.llava_mix:
            sources.append(read.llava_mix(self.llava_mix, self.images, text_only=self.text_only))
        if self.textvqa:
            sources.append(read.text_vqa(self.textvqa, self.textvqa_images))
        if self.docvqa:
            sources.append(read.doc_vqa(self.docvqa, self.docvqa_images))
        if self.chartqa:
            sources.append(read.chart_qa(self.chartqa, self.chartqa_images))
        if self.wikitext:
            sources.append(read.Passages.open(self.wikitext, self.max_characters))
        return sources
