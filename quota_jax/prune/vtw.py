"""VTW (lzhxmu/VTW): all visual tokens leave at the entry of one layer, found on calibration data.

Positions: kept tokens keep theirs (``keep``, the authors' default).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from quota_jax.batch import Batch
from quota_jax.errors import QuotaError
from quota_jax.models.vision_language import VisionLanguageModel, sequence_of
from quota_jax.prune.select import gather, select
from quota_jax.prune.selectors import divergences, first_below
from quota_jax.recipe import Recipe, Selector, Stage

START = 5
"""The first layer that the authors try."""


@dataclass(frozen=True, kw_only=True)
class Withdrawal:
    """``divergences[i]`` is the mean KL divergence of the next token's distribution when all visual
    tokens leave at ``layers[i]``; ``recipe`` drops them at ``layer``, the first one within the
    threshold."""

    layer: int
    layers: tuple[int, ...]
    divergences: tuple[float, ...]
    recipe: Recipe


def withdrawal_recipe(num_layers: int, layer: int) -> Recipe:
    """All visual tokens leave at the entry of ``layer``."""
    stage = Stage(layer=layer, keep=0.0, point="before_attention", selector=Selector(name="stride"))
    return Recipe(num_layers=num_layers, stages=(stage,))


def find_withdrawal(
    model: VisionLanguageModel,
    batches: Iterable[Batch],
    *,
    start: int | None = None,
    eta: float = 0.003,
    progress: bool = False,
) -> Withdrawal:
    """VTW's K: the first layer from ``start`` on with mean KL(full || withdrawn) <= eta.

    The authors use some 20 samples, start at layer 5 (or at the last layer of a shallower decoder)
    and take eta .003 for LLaVA-1.5-7B, .0005 for 13B. Samples without a picture are left out. The
    model's own (quantized) operators count. Where no layer is within eta: QuotaError with the
    smallest divergence. One program for all layers; batches of one shape compile once.
    """
    depth = model.config.text.num_layers
    start = min(START, depth - 1) if start is None else start
    if isinstance(start, bool) or not isinstance(start, int) or not 0 <= start < depth:
        raise QuotaError(f"start must be a layer of the decoder (0 to {depth - 1}), got {start!r}")
    if not (np.isfinite(eta) and eta >= 0):
        raise QuotaError(f"eta must be finite and not negative, got {eta}")
    layers = tuple(range(start, depth))
    found: list[np.ndarray] = []
    for batch in tqdm(batches, desc="VTW", unit="batch", disable=not progress):
        full, withdrawn = _withdrawn(model, batch, jnp.asarray(layers, jnp.int32))
        seen = np.asarray(batch.is_visual).any(1)
        found.append(divergences(np.asarray(full)[seen], np.asarray(withdrawn)[:, seen]))
    values = np.concatenate(found, axis=1) if found else np.zeros((len(layers), 0))
    if not values.shape[1]:
        raise QuotaError("no sample with a picture to search the withdrawal layer on")
    means = values.mean(1)
    layer = first_below(means, layers, eta)
    return Withdrawal(
        layer=layer,
        layers=layers,
        divergences=tuple(means.tolist()),
        recipe=withdrawal_recipe(depth, layer),
    )


@jax.jit
def _withdrawn(
    model: VisionLanguageModel, batch: Batch, layers: Int[Array, " n"]
) -> tuple[Float[Array, "B vocab"], Float[Array, "n B vocab"]]:
    """Logits of the next token in full, and with all visual tokens gone from each layer on."""
    decoder, depth = model.decoder, model.config.text.num_layers
    sequence = sequence_of(batch)
    x = model.embed(batch, model.visual_features(batch.pixels))
    recipe = withdrawal_recipe(depth, 0)
    text, order = select(sequence, jnp.zeros(x.shape[:2]), recipe.stages[0], recipe)

    def layer(x, index):
        return decoder.layer(x, sequence, index)[0], gather(x, order)

    x, entries = jax.lax.scan(layer, x, jnp.arange(depth, dtype=jnp.int32))

    def withdraw(first):
        def body(index, x):
            return decoder.layer(x, text, index)[0]

        return _last_logits(decoder, jax.lax.fori_loop(first, depth, body, entries[first]), text)

    return _last_logits(decoder, x, sequence), jax.lax.map(withdraw, layers)


def _last_logits(decoder: Any, x, sequence) -> Float[Array, "B vocab"]:
    last = jnp.maximum(sequence.lengths - 1, 0)[:, None, None]
    return decoder.logits(jnp.take_along_axis(x, last, axis=1)[:, 0])
