"""AWQ (Lin et al., MLSys 2024, arXiv 2306.00978): weight-only quantization that protects the input
channels with large activations. Free of models.

An input channel is divided by s and its weights multiplied by it, which spares important channels
some rounding error. Both searches minimize the squared error of the linear's own output over all
calibration rows, computed exactly from the second moments of its inputs. (The authors' code looks
at a whole attention or MLP module on a sample of rows.)
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from quota_jax.errors import QuotaError
from quota_jax.quant.groups import Groups

_TINY = 1e-4


@dataclass(frozen=True, kw_only=True, slots=True)
class AwqOptions:
    """ratios: candidates of the exponent, r = 0, 1/ratios, ...; shrinks: candidates of a group's
    clipped range, from all of it down by twentieths; 1 clips nothing."""

    ratios: int = 20
    shrinks: int = 10
    batch_size: int = 4

    def __post_init__(self):
        for name in ("ratios", "shrinks", "batch_size"):
            if getattr(self, name) < 1:
                raise QuotaError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.shrinks > 20:
            raise QuotaError(f"shrinks must be at most 20, got {self.shrinks}")


def tied(values: Float[Array, " K"], shape: tuple[int, int, int]) -> Float[Array, " K"]:
    """Means over the middle axis of ``shape``, at every place: channels that share a scale."""
    cut = values.reshape(shape)
    return jnp.broadcast_to(cut.mean(1, keepdims=True), shape).reshape(-1)


@functools.partial(jax.jit, static_argnames=("grid", "shape", "options"))
def search_scale(
    weight: Float[Array, "N K"],
    second: Float[Array, "K K"],
    mean: Float[Array, " K"],
    *,
    grid: Groups,
    shape: tuple[int, int, int],
    options: AwqOptions,
) -> Float[Array, " K"]:
    """The best s by which weights are multiplied.

    Candidates are ``x^r`` and ``x^r / w^(1-r)`` ("duo scaling"), x the channel's mean |input|, w
    its mean |weight| relative to the group's largest, each divided by the geometric mean of its
    largest and smallest value. r = 0 of the former changes nothing.

    Args:
      second: sum of ``x^T x`` over the inputs.
      mean: of the absolute inputs of each channel.
      shape: channels that must share a scale, see ``tied``.
    """
    cut = jnp.abs(grid.cut(weight))
    relative = cut / jnp.maximum(cut.max(-1, keepdims=True), _TINY)
    spread = relative.reshape(len(weight), -1)[:, : weight.shape[1]].mean(0)
    x, w = tied(mean, shape), tied(spread, shape)

    def candidate(ratio, duo):
        scale = x**ratio / jnp.where(duo, w ** (1 - ratio) + _TINY, 1.0)
        scale = jnp.maximum(scale, _TINY)
        return scale / jnp.sqrt(scale.max() * scale.min())

    def loss(choice):
        scale = candidate(*choice)
        found = grid.dequantize(*grid.quantize(weight * scale)) / scale
        difference = found - weight
        return (jnp.matmul(difference, second, precision="highest") * difference).sum()

    ratios = jnp.arange(options.ratios) / options.ratios
    choices = jnp.tile(ratios, 2), jnp.repeat(jnp.array([False, True]), options.ratios)
    best = jnp.argmin(jax.lax.map(loss, choices))
    return candidate(choices[0][best], choices[1][best])


@functools.partial(jax.jit, static_argnames=("grid", "options"))
def clip_groups(
    weight: Float[Array, "N K"],
    second: Float[Array, "K K"],
    *,
    grid: Groups,
    options: AwqOptions,
) -> Float[Array, "N K"]:
    """Each group cut to the range that gives its partial product the least squared error."""
    columns = weight.shape[1]
    groups = grid.cut(weight)
    count, size = groups.shape[1:]
    fill = count * size - columns
    square = jnp.pad(second, (0, fill)).reshape(count, size, count, size)
    within = square[jnp.arange(count), :, jnp.arange(count)]
    largest = jnp.abs(groups).max(-1, keepdims=True)
    kind = weight.dtype

    def attempt(number, best):
        least, chosen = best
        limit = largest * (1 - number / 20)
        cut = jnp.clip(groups, -limit, limit)
        scale, zero = (part[..., None] for part in grid.grid(cut.min(-1), cut.max(-1), kind))
        difference = (grid.codes(cut, scale, zero) - zero) * scale - groups
        product = jnp.einsum("ngi,gij->ngj", difference, within, precision="highest")
        error = (product * difference).sum(-1, keepdims=True)
        better = error < least
        return jnp.where(better, error, least), jnp.where(better, limit, chosen)

    start = jnp.full_like(largest, jnp.inf), largest
    _, limit = jax.lax.fori_loop(0, options.shrinks, attempt, start)
    return jnp.clip(groups, -limit, limit).reshape(len(weight), -1)[:, :columns]
