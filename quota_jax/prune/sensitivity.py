"""Measures how much quantization disturbs each decoder layer (QUOTA, arXiv 2604.17320, Eq. 1).

``S_l = median over samples of ||x_l^q - x_l|| / (||x_l|| + eta)``: ``x_l`` is the output of decoder
layer l over a sample's real tokens in full precision, ``x_l^q`` the same under the deployed
operators, errors accumulated from the pixels on. Both models run side by side in one program that
returns one number per sample and layer.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from quota_jax import __version__
from quota_jax.batch import Batch
from quota_jax.checkpoint import Checkpoint
from quota_jax.checkpoint import format as fmt
from quota_jax.errors import QuotaError
from quota_jax.models.vision_language import VisionLanguageModel, sequence_of
from quota_jax.prune.allocator import PER
from quota_jax.prune.calibration_pass import Journal, first_difference, run_pass
from quota_jax.prune.select import gather
from quota_jax.quant.calibration_data import Sample, digest
from quota_jax.quant.streaming import check_graph
from quota_jax.recipe import Recipe

KIND = "sensitivities"


@dataclass(frozen=True, kw_only=True, slots=True)
class SensitivityOptions:
    """Choices that the paper leaves open.

    local: each quantized layer reads the full-precision input of that layer, so that errors do not
        accumulate. eta: see Eq. 1. per: "sample" takes one norm over all tokens of a sample,
        "token" the mean over tokens of each one's ratio. batch_size: samples computed together.
        dtype: both models are loaded in it; None takes what is stored.
    """

    local: bool = False
    eta: float = 1e-6
    per: str = "sample"
    batch_size: int = 4
    dtype: str | None = None

    def __post_init__(self):
        if self.per not in PER:
            raise QuotaError(f"per must be one of {PER}, got {self.per!r}")
        if not (np.isfinite(self.eta) and self.eta >= 0):
            raise QuotaError(f"eta must be finite and not negative, got {self.eta}")
        if self.batch_size < 1:
            raise QuotaError(f"batch_size must be at least 1, got {self.batch_size}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sensitivities:
    """S_l of every decoder layer, with the quartiles over samples; ``provenance`` says of which
    checkpoints, on which data, with which options."""

    values: tuple[float, ...]
    lower: tuple[float, ...]
    upper: tuple[float, ...]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def at(self, layers: Sequence[int]) -> tuple[float, ...]:
        """The values of some layers."""
        if missing := [layer for layer in layers if not 0 <= layer < len(self.values)]:
            raise QuotaError(
                f"no sensitivity of layer {missing[0]}: there are {len(self.values)} layers"
            )
        return tuple(self.values[layer] for layer in layers)

    def write(self, path: Path) -> None:
        """Writes JSON with a checksum; a reader sees the old or the new file, never half of one."""
        content = {
            "format_version": fmt.FORMAT_VERSION,
            "kind": KIND,
            "values": list(self.values),
            "lower_quartile": list(self.lower),
            "upper_quartile": list(self.upper),
            "provenance": dict(self.provenance),
        }
        fmt.write_file(path, fmt.encode_json(fmt.seal(content, str(path)), str(path)))

    @classmethod
    def read(cls, path: Path) -> Sensitivities:
        """The inverse of ``write``; a changed or foreign file is a QuotaError."""
        data = fmt.read_json(path)
        if data.get("kind") != KIND:
            raise QuotaError(f"{path}: is no file of sensitivities")
        fmt.check_version(data, str(path))
        fmt.check_seal(data, str(path))
        return cls(
            values=tuple(data["values"]),
            lower=tuple(data["lower_quartile"]),
            upper=tuple(data["upper_quartile"]),
            provenance=data["provenance"],
        )


def measure_sensitivities(
    quantized: Checkpoint,
    reference: Checkpoint,
    samples: Sequence[Sample],
    journal: Path,
    *,
    options: SensitivityOptions | None = None,
    recipe: Recipe | None = None,
    progress: bool = False,
) -> Sensitivities:
    """S_l of a quantized checkpoint against its full-precision source.

    Both models are on the device at once. ``recipe``: of the execution that is measured, with
    stages inside layers; None keeps all tokens. ``journal`` is a file that exists only while this
    is unfinished: after a kill the same call goes on from it, with the same result.

    Raises:
      QuotaError: the checkpoints are not the two forms of one model.
    """
    options = options or SensitivityOptions()
    identity = sensitivity_identity(quantized, reference, samples, options, recipe)
    if not samples:
        raise QuotaError("sensitivities need calibration samples")
    if recipe is not None:
        check_graph(recipe)

    def load():
        models = [each.load_model(options.dtype) for each in (quantized, reference)]
        return lambda batch: {
            "error": np.asarray(
                layer_errors(
                    *models,
                    batch,
                    eta=options.eta,
                    local=options.local,
                    per=options.per,
                    recipe=recipe,
                )
            )
        }

    notes = Journal(journal, identity)
    found = run_pass(
        notes,
        quantized,
        samples,
        options.batch_size,
        load,
        title="sensitivities",
        progress=progress,
    )
    lower, values, upper = np.percentile(found["error"], (25, 50, 75), axis=0).tolist()
    journal.unlink()
    return Sensitivities(
        values=tuple(values), lower=tuple(lower), upper=tuple(upper), provenance=identity
    )


def sensitivity_identity(
    quantized: Checkpoint,
    reference: Checkpoint,
    samples: Sequence[Sample],
    options: SensitivityOptions,
    recipe: Recipe | None = None,
) -> dict[str, Any]:
    """What sensitivities depend on; equal identities promise equal values on one machine."""
    check_pair(quantized, reference)
    identity = {
        "checkpoint": quantized.fingerprint,
        "reference": reference.fingerprint,
        "quantization": quantized.quantization.to_json(),
        "data": digest(samples),
        "samples": len(samples),
        "local": options.local,
        "eta": options.eta,
        "per": options.per,
        "batch_size": options.batch_size,
        "dtype": options.dtype,
        "version": __version__,
    }
    if recipe is not None:
        identity["recipe"] = recipe.to_json()
    return json.loads(json.dumps(identity))  # as a file gives it back


def check_quantized(checkpoint: Checkpoint) -> None:
    """Refuses a full-precision checkpoint."""
    if checkpoint.quantization.is_none:
        raise QuotaError(f"{checkpoint.path} is not quantized: nothing disturbs its layers")


def check_pair(quantized: Checkpoint, reference: Checkpoint) -> None:
    """Refuses checkpoints that are not a quantized model and its full-precision form."""
    check_quantized(quantized)
    if not reference.quantization.is_none:
        raise QuotaError(
            f"{reference.path} is quantized ({reference.quantization.label}): the reference must "
            "be the full-precision checkpoint"
        )
    found = first_difference(quantized.config.to_json(), reference.config.to_json())
    if found:
        raise QuotaError(f"{quantized.path} and {reference.path} are different models: {found}")


@functools.partial(jax.jit, static_argnames=("local", "per", "recipe"))
def layer_errors(
    quantized: VisionLanguageModel,
    reference: VisionLanguageModel,
    batch: Batch,
    *,
    eta: float,
    local: bool = False,
    per: str = "sample",
    recipe: Recipe | None = None,
) -> Float[Array, "B L"]:
    """Relative error of each layer's output for each row of a batch; see ``SensitivityOptions``.

    Norms in float32; padding does not count. Under a ``recipe`` with stages inside layers the
    quantized model chooses the tokens and both models keep the same ones; without, all stay.
    """
    sequence = sequence_of(batch)
    x, x_q = (
        model.embed(batch, model.visual_features(batch.pixels)) for model in (reference, quantized)
    )

    def layer(x, x_q, sequence, index):
        read = x.astype(x_q.dtype) if local else x_q
        x_q = quantized.decoder.layer(read, sequence, index)[0]
        return reference.decoder.layer(x, sequence, index)[0], x_q

    def segment(x, x_q, sequence, start, stop):
        """Layers on the same tokens; the errors of each, ``[layers, B]``."""

        def one(states, index):
            x, x_q = layer(states[0], states[1], sequence, index)
            return (x, x_q), _relative(x, x_q, sequence.is_real, eta, per)

        (x, x_q), errors = jax.lax.scan(one, (x, x_q), jnp.arange(start, stop, dtype=jnp.int32))
        return x, x_q, errors

    done, found = 0, []
    for stage in recipe.stages if recipe else ():
        x, x_q, errors = segment(x, x_q, sequence, done, stage.layer)
        index = jnp.int32(stage.layer)
        left, order = quantized.decoder.chosen(x_q, sequence, index, stage, recipe)
        x, x_q = (gather(part, order) for part in layer(x, x_q, sequence, index))
        sequence, done = left, stage.layer + 1
        found += [errors, _relative(x, x_q, sequence.is_real, eta, per)[None]]
    *_, errors = segment(x, x_q, sequence, done, reference.config.text.num_layers)
    return jnp.concatenate([*found, errors]).T


def _relative(x, x_q, is_real, eta, per: str) -> Float[Array, " B"]:
    """``allocator.relative_error`` of each row, on the device."""
    x = x.astype(jnp.float32)
    squares = [
        jnp.where(is_real, jnp.square(part).sum(-1), 0.0)
        for part in (x_q.astype(jnp.float32) - x, x)
    ]
    if per == "sample":
        error, norm = (jnp.sqrt(part.sum(1)) for part in squares)
        return error / (norm + eta)
    error, norm = (jnp.sqrt(part) for part in squares)
    ratios = jnp.where(is_real, error / (norm + eta), 0.0)
    return ratios.sum(1) / jnp.maximum(is_real.sum(1), 1)
