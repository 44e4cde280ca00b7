"""Where in the decoder visual tokens can go: attention concentration and redundancy per layer
(QUOTA, arXiv 2604.17320, section 3.2, Fig. 3 and 5), and the candidate layers that follow.

Concentration: how much attention a text token pays the ten visual tokens it looks at most.
Redundancy: how much the visual tokens resemble each other. Both are measured on the unpruned model,
in full precision and under the deployed operators.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from quota_jax import __version__
from quota_jax.batch import Batch
from quota_jax.checkpoint import Checkpoint
from quota_jax.checkpoint import format as fmt
from quota_jax.errors import QuotaError
from quota_jax.models.vision_language import VisionLanguageModel, sequence_of
from quota_jax.prune.calibration_pass import Journal, run_pass
from quota_jax.prune.sensitivity import check_pair
from quota_jax.prune.token_statistics import median_cosine, top_text_attention
from quota_jax.quant.calibration_data import Sample, digest

KIND = "profile"
SERIES = ("full_precision", "quantized")
METRICS = ("concentration", "share", "redundancy")
TOP = 10
"""Visual tokens that count for the concentration (the paper's top-10)."""
COMPARED = 1024
"""Most visual tokens of a sample that are compared with each other: all of up to 1024."""
CANDIDATES = 5
"""Candidate layers of the paper, for both models."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProfileOptions:
    """batch_size: samples computed together. dtype: models are loaded in it; None takes what is
    stored. seed: of the tokens that are compared where a sample has more than ``COMPARED``."""

    batch_size: int = 4
    dtype: str | None = None
    seed: int = 0

    def __post_init__(self):
        if self.batch_size < 1:
            raise QuotaError(f"batch_size must be at least 1, got {self.batch_size}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """Quartiles over samples, one value per layer."""

    lower: tuple[float, ...]
    median: tuple[float, ...]
    upper: tuple[float, ...]

    @classmethod
    def of(cls, values: np.ndarray) -> Spread:
        """``values [samples, layers]``; samples without a value are NaN and left out."""
        rows = np.nanpercentile(values, (25, 50, 75), axis=0)
        lower, median, upper = (tuple(row.tolist()) for row in rows)
        return cls(lower=lower, median=median, upper=upper)


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """One model's profile.

    concentration: attention of a text token on the ``TOP`` visual tokens it attends to most, as a
        part of all its attention; share: as a part of its attention on visual tokens; redundancy:
        median pairwise cosine of the visual tokens at the layer's output.
    """

    concentration: Spread
    share: Spread
    redundancy: Spread


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidates:
    """Proposed layers; ``rule_met`` is False where no run of layers meets the rule of
    ``propose_candidates`` and the most concentrated one is named instead. ``threshold``: the
    concentration that candidates should reach; ``limit``: the redundancy they should not exceed
    (None where it does not rise)."""

    layers: tuple[int, ...]
    rule_met: bool
    threshold: float
    limit: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """What ``quota-jax profile`` finds; ``series`` has one entry or both of ``SERIES``."""

    series: Mapping[str, Series]
    candidates: Candidates
    provenance: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        return {
            "format_version": fmt.FORMAT_VERSION,
            "kind": KIND,
            "series": {name: asdict(each) for name, each in self.series.items()},
            "candidates": asdict(self.candidates),
            "provenance": dict(self.provenance),
        }


def measure_profile(
    checkpoint: Checkpoint,
    samples: Sequence[Sample],
    folder: Path,
    *,
    reference: Checkpoint | None = None,
    options: ProfileOptions | None = None,
    progress: bool = False,
) -> Profile:
    """Profiles a checkpoint, and its full-precision form if ``reference`` is given.

    The models are loaded one after the other. ``folder`` holds a journal for each until all is
    measured: after a kill the same call goes on from them, with the same result.

    Raises:
      QuotaError: ``reference`` is not the full-precision form, or no sample has text after a
        picture.
    """
    options = options or ProfileOptions()
    checkpoints = {SERIES[0] if checkpoint.quantization.is_none else SERIES[1]: checkpoint}
    if reference is not None:
        check_pair(checkpoint, reference)
        checkpoints = {SERIES[0]: reference, **checkpoints}
    if not samples:
        raise QuotaError("a profile needs calibration samples")
    shared: dict[str, Any] = {
        "data": digest(samples),
        "samples": len(samples),
        "batch_size": options.batch_size,
        "dtype": options.dtype,
        "seed": options.seed,
        "top": TOP,
        "compared": COMPARED,
        "version": __version__,
    }
    series, journals = {}, []
    for name, each in checkpoints.items():
        identity = {**shared, "checkpoint": each.fingerprint}
        journals.append(folder / f"{name}.partial.jsonl")
        values = run_pass(
            Journal(journals[-1], identity),
            each,
            samples,
            options.batch_size,
            functools.partial(_measuring, each, options),
            title=name.replace("_", " "),
            progress=progress,
        )
        for metric, need in (
            ("redundancy", "two visual tokens"),
            ("share", "text after a picture"),
        ):
            if np.isnan(values[metric]).all():
                raise QuotaError(f"the calibration data hold no sample with {need}")
        series[name] = Series(**{metric: Spread.of(values[metric]) for metric in METRICS})
    deployed = series[list(series)[-1]]
    provenance = shared | {
        f"{name}_checkpoint": each.fingerprint for name, each in checkpoints.items()
    }
    provenance["quantization"] = checkpoint.quantization.to_json()
    for journal in journals:
        journal.unlink()
    return Profile(
        series=series,
        candidates=propose_candidates(deployed.concentration.median, deployed.redundancy.median),
        provenance=provenance,
    )


def propose_candidates(
    concentration: Sequence[float], redundancy: Sequence[float], count: int = CANDIDATES
) -> Candidates:
    """The earliest run of ``count`` layers whose attention says what matters and whose visual
    tokens are still diverse.

    Scores made of attention rank tokens reliably only where attention from the text is
    concentrated; in the paper it is weak and unstable in the first layers and rises sharply behind
    them. Early stages save most, as all later layers run on what is left. In the last blocks tokens
    resemble each other, little is saved and removal is fragile. Hence the rule, in medians over
    samples:

    1. layers of the first half, never layer 0, and at most half as many as the first half has;
    2. every one at least half way up from the lowest to the highest concentration of that half (a
       single peak among weak layers does not do);
    3. where redundancy rises towards the end (somewhere in the second half it is higher than
       anywhere in the first, layer 0 aside): every one at most half way up from the lowest of the
       first half to the highest of the second;
    4. of the runs that meet 1 to 3 the earliest.

    If none does: the run of the first half whose weakest layer is most concentrated.
    """
    depth = len(concentration)
    if depth != len(redundancy) or not depth or count < 1:
        raise QuotaError(
            f"candidates need equal profiles and a positive count, got {depth} and "
            f"{len(redundancy)} layers, count {count}"
        )
    first = min(1, depth - 1)
    end = max(first + 1, depth // 2)
    count = min(count, max(1, end // 2))
    threshold = (min(concentration[:end]) + max(concentration[:end])) / 2
    early, late = redundancy[first:end], redundancy[end:]
    limit = None
    if late and max(late) > max(early):
        limit = (min(early) + max(late)) / 2
    runs = [range(start, start + count) for start in range(first, end - count + 1)]

    def weakest(run: range) -> float:
        return min(concentration[layer] for layer in run)

    def fits(run: range) -> bool:
        diverse = limit is None or max(redundancy[layer] for layer in run) <= limit
        return diverse and weakest(run) >= threshold

    met = [run for run in runs if fits(run)]
    chosen = met[0] if met else max(runs, key=weakest)
    return Candidates(layers=tuple(chosen), rule_met=bool(met), threshold=threshold, limit=limit)


def _measuring(checkpoint: Checkpoint, options: ProfileOptions):
    model = checkpoint.load_model(options.dtype)

    def measure(batch: Batch) -> dict[str, np.ndarray]:
        compared = compared_tokens(batch, options.seed)
        found = layer_statistics(model, batch, compared)
        return {name: np.asarray(value) for name, value in zip(METRICS, found, strict=True)}

    return measure


def compared_tokens(batch: Batch, seed: int) -> Int[np.ndarray, "B M"]:
    """Places of the visual tokens to compare, ascending; -1 behind the last. All of a sample, or
    ``COMPARED`` drawn by ``seed``: the same whatever stands beside the sample in a batch."""
    visual = np.asarray(batch.is_visual)
    chosen = np.full((len(visual), min(COMPARED, batch.visual_bucket)), -1, np.int32)
    for row, mask in enumerate(visual):
        places = np.flatnonzero(mask)
        if len(places) > COMPARED:
            draw = np.random.default_rng(seed).choice(len(places), COMPARED, replace=False)
            places = places[np.sort(draw)]
        chosen[row, : len(places)] = places
    return chosen


@jax.jit
def layer_statistics(
    model: VisionLanguageModel, batch: Batch, compared: Int[Array, "B M"]
) -> tuple[Float[Array, "B L"], Float[Array, "B L"], Float[Array, "B L"]]:
    """Concentration, share and redundancy of each layer for each row of a batch; NaN where a sample
    has none: no text after a picture, fewer than two visual tokens."""
    sequence, decoder = sequence_of(batch), model.decoder
    x = model.embed(batch, model.visual_features(batch.pixels))

    def layer(x, index):
        inner = decoder.project(x, sequence, index)
        mass, share = top_text_attention(
            inner.query,
            inner.key,
            sequence,
            top=TOP,
            sm_scale=decoder.config.head_dim**-0.5,
        )
        x = decoder.layer(x, sequence, index)[0]
        return x, (mass, share, median_cosine(x, compared))

    depth = model.config.text.num_layers
    _, (mass, share, cosine) = jax.lax.scan(layer, x, jnp.arange(depth, dtype=jnp.int32))
    return mass.T, share.T, cosine.T
