"""GPTQ (Frantar et al., ICLR 2023, arXiv 2210.17323): rounding that repairs its own errors.

Input channels are quantized one after the other. The error of each is spread over those that are
still to come, weighted by the inverse of the inputs' second moments (Algorithm 1), so that the
linear's output on the calibration data changes least. Free of models.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from quota_jax.errors import QuotaError
from quota_jax.quant.groups import Groups

_LARGEST_DAMPING = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class GptqOptions:
    """damping: added to the diagonal, in units of its mean. block_size: channels after which errors
    are spread over the rest; it changes the speed, not the result, up to rounding.

    act_order: channels with the largest second moments come first. The grids of all groups are then
    fixed beforehand, from the original weight, so that groups stay where they are ("static
    groups"); without it the grid of a group is fitted to what the weight has become. feed: what
    blocks read, outputs of "full" precision or of the "quantized" blocks before them.
    """

    damping: float = 0.01
    block_size: int = 128
    act_order: bool = False
    batch_size: int = 4
    feed: str = "full"

    def __post_init__(self):
        if not 0 < self.damping <= _LARGEST_DAMPING:
            raise QuotaError(f"damping must lie in (0, 1], got {self.damping}")
        if self.feed not in ("full", "quantized"):
            raise QuotaError(f"feed {self.feed!r} is unknown; known: full, quantized")
        for name in ("block_size", "batch_size"):
            if getattr(self, name) < 1:
                raise QuotaError(f"{name} must be at least 1, got {getattr(self, name)}")


def inverse_factor(hessian: np.ndarray, damping: float) -> np.ndarray:
    """The upper triangular U with ``U^T U = (H + damping mean(diag H) I)^-1``; float64.

    A channel without any input gets the mean as its diagonal: it is rounded to nearest. (The
    authors set its weights to zero.) Damping grows tenfold while H is not positive definite.

    Raises:
      QuotaError: H is not finite, or no damping up to 1 makes it positive definite.
    """
    hessian = np.array(hessian, np.float64)
    if not np.isfinite(hessian).all():
        raise QuotaError("the second moments of the inputs are not finite")
    diagonal = np.diagonal(hessian).copy()
    mean = diagonal.mean() or 1.0
    # With both axes reversed the lower Cholesky factor is an upper one, R R^T = H; U = R^-1.
    flipped = hessian[::-1, ::-1]
    places = np.arange(len(diagonal))
    while damping <= _LARGEST_DAMPING:
        flipped[places, places] = (np.where(diagonal > 0, diagonal, mean) + damping * mean)[::-1]
        try:
            lower = np.linalg.cholesky(flipped)
        except np.linalg.LinAlgError:
            damping *= 10
            continue
        return np.triu(_inverse_lower(lower)[::-1, ::-1])
    raise QuotaError("the second moments of the inputs are not positive definite")


def _inverse_lower(lower: np.ndarray) -> np.ndarray:
    """The inverse of a lower triangular matrix by halves: nearly all of it is matrix products."""
    size = len(lower)
    if size <= 256:
        return np.linalg.inv(lower)
    half = size // 2
    inverse = np.zeros_like(lower)
    first, last = _inverse_lower(lower[:half, :half]), _inverse_lower(lower[half:, half:])
    inverse[:half, :half], inverse[half:, half:] = first, last
    inverse[half:, :half] = -last @ (lower[half:, :half] @ first)
    return inverse


def gptq(
    weight: Float[Array, "N K"], hessian: Any, grid: Groups, options: GptqOptions
) -> tuple[Array, Array, Array | None]:
    """Codes ``[N, K]``, scales ``[N, G]`` and zeros (None where symmetric), as ``Groups.quantize``
    gives them.

    Args:
      hessian: ``[K, K]``, the sum of ``x^T x`` over the inputs; its scale does not matter.
    """
    columns = weight.shape[1]
    kind = jnp.dtype(grid.scale_dtype or weight.dtype)
    weight = jnp.asarray(weight, jnp.float32)
    hessian = np.asarray(hessian)
    order = np.arange(columns)
    if options.act_order:
        order = np.argsort(-np.diagonal(hessian), kind="stable")
        hessian = hessian[np.ix_(order, order)]
    upper = inverse_factor(hessian, options.damping).astype(np.float32)

    # Blocks hold whole groups, so that a group is refitted when all errors have reached it.
    size = grid.size or columns
    refit = bool(grid.size) and not options.act_order
    block = min(options.block_size, columns)
    if refit:
        block = max(1, block // size) * size
    fill = -columns % block
    cut = grid.cut(weight)
    scale, zero = grid.grid(cut.min(-1), cut.max(-1), kind)
    codes, scale, zero = _quantize(
        jnp.pad(weight[:, order], [(0, 0), (0, fill)]).T,
        jnp.pad(upper, (0, fill)) + jnp.diag(jnp.arange(columns + fill) >= columns),
        scale.T,
        zero.T,
        jnp.pad(jnp.asarray(order // size), (0, fill), mode="edge"),
        grid=grid,
        block=block,
        refit=refit,
        kind=kind.name,
    )
    back = np.argsort(order)
    return grid.stored(codes.T[:, back], scale.T.astype(kind), zero.T)


@functools.partial(jax.jit, static_argnames=("grid", "block", "refit", "kind"))
def _quantize(weight, upper, scale, zero, index, *, grid: Groups, block: int, refit: bool, kind):
    """All arrays transposed: weight ``[K, N]``, scale and zero ``[G, N]``; index ``[K]``."""
    columns = len(weight)
    places = jnp.arange(columns)

    def one_block(number, carry):
        weight, codes, scale, zero = carry
        start = number * block
        rows = jax.lax.dynamic_slice_in_dim(upper, start, block)
        inner = jax.lax.dynamic_slice_in_dim(rows, start, block, axis=1)

        def fit(j, part, scale, zero):
            members = jax.lax.dynamic_slice_in_dim(part, j, grid.size)
            fitted = grid.grid(members.min(0), members.max(0), kind)
            place = (start + j) // grid.size
            return tuple(
                jax.lax.dynamic_update_index_in_dim(old, new, place, 0)
                for old, new in zip((scale, zero), fitted, strict=True)
            )

        def column(j, carry):
            part, found, errors, scale, zero = carry
            if refit:
                scale, zero = jax.lax.cond(
                    j % grid.size == 0, fit, lambda j, part, *old: old, j, part, scale, zero
                )
            group = index[start + j]
            code = grid.codes(part[j], scale[group], zero[group])
            error = (part[j] - (code - zero[group]) * scale[group]) / inner[j, j]
            # Row j of the factor is zero before its diagonal: earlier columns stay as they are.
            part = part - inner[j][:, None] * error[None]
            return part, found.at[j].set(code), errors.at[j].set(error), scale, zero

        part = jax.lax.dynamic_slice_in_dim(weight, start, block)
        blank = jnp.zeros_like(part)
        _, found, errors, scale, zero = jax.lax.fori_loop(
            0, block, column, (part, blank, blank, scale, zero)
        )
        later = jnp.where(places >= start + block, rows, 0)
        weight = weight - jnp.matmul(later.T, errors, precision="highest")
        codes = jax.lax.dynamic_update_slice_in_dim(codes, found, start, 0)
        return weight, codes, scale, zero

    carry = (weight, jnp.zeros_like(weight), scale, zero)
    _, codes, scale, zero = jax.lax.fori_loop(0, columns // block, one_block, carry)
    return codes, scale, zero
