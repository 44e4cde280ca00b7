"""The student of GRACE: float master parameters, learned scales, and the model that they make.

Every quantized linear is simulated with the integers that packing will store. What is learned and
stays unquantized is used as it will be stored: matrices in their dtype in the checkpoint, vectors
in float32. So the student and its packed form are the same function, in float32 bit for bit.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.stable import rounded
from quota_jax.models.params import LINEARS
from quota_jax.quant.groups import Groups
from quota_jax.quant.quantizers import TINY, quantize_weight, symmetric_limit
from quota_jax.quant.rtn import quantize_params, stored_codes
from quota_jax.quant.straight_through import pass_through
from quota_jax.quantization import QuantizationConfig

FROZEN = (
    "decoder.embed",
    "decoder.head",
    "vision.patch_embed",
    "vision.position_embed",
    "vision.class_embed",
)
"""Embeddings and head: never learned."""
FACTORS = np.linspace(0.3, 1.2, 20)
"""Candidates of the search for a first scale, in units of the largest absolute value over the
largest code."""


class Learned(NamedTuple):
    """What is trained, all float32: weights by parameter name, and by linear the logarithm of each
    scale's ratio to its start."""

    weights: dict[str, Array]
    scales: dict[str, Array]


class Kept(NamedTuple):
    """What stays: the other parameters, and by linear the scales that learning started from."""

    params: dict[str, Array]
    starts: dict[str, Array]


@dataclass(frozen=True, kw_only=True, slots=True)
class Student:
    """How parameters become a model; hashable.

    learned: modules whose parameters are learned. dtype: of the checkpoint's matrices.
    """

    quantization: QuantizationConfig
    learned: tuple[str, ...]
    dtype: str

    def begin(self, params: Mapping[str, Any], start: str) -> tuple[Learned, Kept]:
        """Master parameters are those of full precision.

        Args:
          params: of the stacked full-precision model, in the checkpoint's dtypes.
          start: of the scales, "search" or "nearest" (round-to-nearest's).
        """
        weights, kept, scales, starts = {}, {}, {}, {}
        for name, value in params.items():
            learns = self._learns(name)
            if self.quantization.table_bits.get(name.removesuffix(".weight")) == 8:
                # Their scales are rounded to the checkpoint's dtype.
                for part, array in quantize_params({name: value}, self.quantization).items():
                    kept[part] = jnp.asarray(array, None if array.dtype == np.int8 else jnp.float32)
                continue
            (weights if learns else kept)[name] = jnp.asarray(value, jnp.float32)
            if not self._is_quantized(name):
                continue
            stem = name.removesuffix(".weight")
            starts[stem] = first_scales(value, self.quantization.grid, start)
            if learns:
                scales[stem] = jnp.zeros_like(starts[stem])
        return Learned(weights, scales), Kept(kept, starts)

    def params(self, learned: Learned, kept: Kept) -> dict[str, Array]:
        """Parameters of the simulated model, for ``build_model``; differentiable in ``learned``."""
        out = dict(kept.params)
        for name, value in learned.weights.items():
            rounds = name.endswith(".weight") and not self._is_quantized(name)
            if rounds and self.dtype != "float32":
                stored = value.astype(self.dtype).astype(jnp.float32)
                value = pass_through(value, stored)
            out[name] = value
        for stem, start in kept.starts.items():
            scale = start
            if stem in learned.scales:
                scale = rounded(start * rounded(jnp.exp(learned.scales[stem])))
            out[f"{stem}.scale"] = scale
        return out

    def pack(
        self, stored: Mapping[str, np.ndarray], params: Mapping[str, np.ndarray], layer: int | None
    ) -> dict[str, np.ndarray]:
        """One block of the quantized checkpoint.

        Args:
          stored: the block's parameters in the full-precision checkpoint.
          params: what ``params`` returned, on the host.
          layer: of a block of a stack.
        """
        out: dict[str, np.ndarray] = {}

        def of_block(name: str) -> np.ndarray:
            return params[name] if layer is None else params[name][layer]

        for name, value in stored.items():
            if self._is_quantized(name):
                stem = name.removesuffix(".weight")
                weight, scale = (jnp.asarray(of_block(n)) for n in (name, f"{stem}.scale"))
                out |= self._packed(stem, weight, scale)
            elif self._learns(name):
                out[name] = of_block(name).astype(
                    self.dtype if name.endswith(".weight") else np.float32
                )
            else:
                out |= quantize_params({name: value}, self.quantization)
        return out

    def _packed(self, stem: str, weight: Array, scale: Array) -> dict[str, np.ndarray]:
        quantization, zeros = self.quantization, None
        if quantization.groups is None:
            codes, scale = quantize_weight(weight, quantization.weight_bits, scale)
        else:
            codes, scale, zeros = quantization.groups.quantize(weight, scale)
        return stored_codes(stem, quantization.weight_bits, codes, scale, zeros)

    def _learns(self, name: str) -> bool:
        return name.split(".")[0] in self.learned and not name.startswith(FROZEN)

    def _is_quantized(self, name: str) -> bool:
        parts = name.split(".")
        return (
            parts[-1] == "weight" and parts[-2] in LINEARS and self.quantization.quantizes(parts[0])
        )


def first_scales(
    weight: Float[Array, "*stack N K"], grid: Groups, start: str
) -> Float[Array, "*scales"]:
    """Scales of output channels ``[*stack, N]``, or of groups ``[*stack, N, G]``.

    "nearest": the largest absolute value over the largest code. "search": of 20 factors of that,
    the one with the least squared rounding error.
    """
    weight = jnp.asarray(weight, jnp.float32)
    cut = grid.cut(weight.reshape(-1, weight.shape[-1]))
    scales = jnp.maximum(jnp.abs(cut).max(-1), TINY) / symmetric_limit(grid.bits)
    if start == "search":
        scales = _searched(cut, scales, bits=grid.bits)
    scales = scales if grid.size else scales[..., 0]
    return scales.reshape(*weight.shape[:-1], *scales.shape[1:])


@functools.partial(jax.jit, static_argnames="bits")
def _searched(cut: Array, largest: Array, *, bits: int) -> Array:
    limit = symmetric_limit(bits)

    def better(found, factor):
        best, least = found
        scale = largest * factor
        codes = jnp.clip(jnp.round(cut / scale[..., None]), -limit - 1, limit)
        error = jnp.square(codes * scale[..., None] - cut).sum(-1)
        return (jnp.where(error < least, scale, best), jnp.minimum(error, least)), None

    first = largest, jnp.full(largest.shape, jnp.inf)
    (best, _), _ = jax.lax.scan(better, first, jnp.asarray(FACTORS, jnp.float32))
    return best


def host(params: Mapping[str, Array]) -> dict[str, np.ndarray]:
    """The arrays on the host."""
    return {name: np.asarray(value) for name, value in jax.device_get(dict(params)).items()}
