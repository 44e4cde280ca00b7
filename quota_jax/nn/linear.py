"""Linear layers of a stack: full precision, packed integers, or integers simulated from float
weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pallas_kernels.int4_matmul import int4_matmul, integer_matmul
from pallas_kernels.stable import matmul, rounded
from pallas_kernels.transform_quantize import Quantized, transform_quantize
from pallas_kernels.w4a16_matmul import w4a16_matmul
from quota_jax.quant.groups import Groups
from quota_jax.quant.quantizers import quantize_activation
from quota_jax.quant.straight_through import (
    pass_through,
    simulated_groups,
    simulated_product,
    simulated_weight,
)

SITES = ("left", "right", "clip")
"""Parameters of a linear's input quantizer."""

Observer = Callable[["Linear", Array], None]
_observer: ContextVar[Observer | None] = ContextVar("observer", default=None)


@contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Inside, ``observer`` is called with each linear and its input rows before any transform.

    For calibration, which traces a block inside the program that uses what was observed.
    """
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)


def take(parameter: nnx.Variable, layer: Array | int | None) -> Array:
    """The array of one layer of a stacked parameter, or the parameter itself."""
    value = parameter[...]
    return value if layer is None else jax.lax.dynamic_index_in_dim(value, layer, keepdims=False)


def kronecker(
    x: Float[Array, "M K"], left: Float[Array, "a a"], right: Float[Array, "b b"]
) -> Float[Array, "M K"]:
    """``x (left kron right)`` in float32; ``K = a b``. A row's bits depend on nothing beside it."""
    rows, (a, b) = x.shape[0], (left.shape[0], right.shape[0])
    x = rounded(matmul(x.astype(jnp.float32).reshape(-1, b), right.T)).reshape(rows, a, b)
    x = rounded(matmul(x.swapaxes(1, 2).reshape(-1, a), left.T)).reshape(rows, b, a)
    return x.swapaxes(1, 2).reshape(rows, -1)


def across_heads(x: Float[Array, "M K"], left: Float[Array, "N N"]) -> Float[Array, "M K"]:
    """``x (left kron I)`` in float32: mixes the heads of ``K / N`` features each. A row's bits
    depend on nothing beside it."""
    rows, heads = x.shape[0], left.shape[0]
    x = x.astype(jnp.float32).reshape(rows, heads, -1).swapaxes(1, 2)
    out = rounded(matmul(x.reshape(-1, heads), left.T)).reshape(x.shape)
    return out.swapaxes(1, 2).reshape(rows, -1)


class Linear(nnx.Module):
    """``y = x W^T + b`` with ``W`` as ``[out, in]``, or ``[L, out, in]`` and a layer index.

    Holds one of ``weight`` (float), ``packed`` + ``scale`` (4 bit), ``codes`` + ``scale`` (8 bit).
    With ``weight`` and ``weight_bits < 16`` it *simulates*: it quantizes the weight on the fly and
    multiplies integer values, so that simulated and packed results are bit-identical. A ``scale``
    beside the ``weight`` is its quantizer's; without one the range of the weight gives it.

    With ``groups`` the scale is ``[N, G]``, ``zeros`` (unsigned, ``[N, G]``) may stand beside it,
    and ``group_index`` ``[parts, K]`` where an input channel's group is not its place; ``parts``
    are the heights of the matrices that are joined along N. The product is then that of the input
    and the weight dequantized to the input's dtype (packed ones: see ``w4a16_matmul``).

    FlatQuant adds ``left`` and ``right``, the factors of the transform of the input (the weight is
    stored in the transformed basis), and ``clip``, factors of a token's largest and smallest value.
    ``left`` alone mixes whole heads of the input (P_o).
    AWQ adds ``input_scale`` ``[K]``, a factor of each input channel, where no layer before took it.
    """

    weight: nnx.Param
    packed: nnx.Param
    codes: nnx.Param
    scale: nnx.Param
    bias: nnx.Param
    left: nnx.Param
    right: nnx.Param
    clip: nnx.Param
    zeros: nnx.Param
    group_index: nnx.Param
    input_scale: nnx.Param

    def __init__(
        self,
        params: Mapping[str, Any],
        *,
        weight_bits: int = 16,
        activation_bits: int = 16,
        groups: Groups | None = None,
        parts: tuple[int, ...] = (),
    ):
        for name, value in params.items():
            setattr(self, name, nnx.Param(value))
        self.names = tuple(params)
        self.weight_bits = weight_bits
        self.activation_bits = activation_bits
        self.groups = groups
        self.parts = parts

    def __call__(self, x: Float[Array, "*rows K"], layer: Array | int | None = None) -> Array:
        rows = x.reshape(-1, x.shape[-1])
        if (observer := _observer.get()) is not None:
            observer(self, rows)
        if self.obstacle is None:
            out = self.multiply(self.quantize(rows, layer), layer, x.dtype)
        elif "packed" in self.names:
            out = self._weight_only(self.transformed(rows, layer), layer, x.dtype)
        else:
            out = rounded(self._product(self.transformed(rows, layer), layer))
            if "bias" in self.names:
                out = out + take(self.bias, layer).astype(jnp.float32)
        return out.astype(x.dtype).reshape(*x.shape[:-1], out.shape[-1])

    @property
    def obstacle(self) -> str | None:
        """Why ``quantize`` and ``multiply`` cannot run; None if they can."""
        if "packed" not in self.names:
            return "weights are not packed"
        if self.activation_bits == 16:
            return "activations are not quantized"
        if self.groups is not None:
            return "weights have group scales"
        return None

    def quantize(
        self, x: Float[Array, "M width"], layer: Array | int | None, **before: Any
    ) -> Quantized:
        """The integers that ``multiply`` takes, of the input in its transformed basis; ``before``:
        see ``transform_quantize`` (a sum, a norm or a gate in the same launch, for linears without
        an ``input_scale``)."""
        if "input_scale" in self.names:
            assert not before, "an input scale comes after what stands before"
            x = self._scaled(x, layer)
        given = {name: getattr(self, name)[...] for name in SITES if name in self.names}
        if "right" in given:
            # A widened weight (``models.alignment``); the transform has the true width.
            true = given["left"].shape[-1] * given["right"].shape[-1]
            before["padding"] = 2 * self.packed.shape[-1] - true
        return transform_quantize(x, layer, bits=self.activation_bits, **given, **before)

    def multiply(
        self, rows: Quantized, layer: Array | int | None, dtype: Any, *, biased: bool = True
    ) -> Float[Array, "M N"]:
        """The product of quantized rows in ``dtype``, in float32 if a bias is left out."""
        has_bias = "bias" in self.names
        return int4_matmul(
            rows.codes,
            rows.scale,
            self.packed[...],
            self.scale[...],
            layer,
            bias=self.bias[...] if has_bias and biased else None,
            out_dtype=jnp.float32 if has_bias and not biased else dtype,
        )

    def _weight_only(self, x: Float[Array, "M K"], layer, dtype: Any) -> Float[Array, "M N"]:
        """Float input, packed weights."""

        def given(name):
            return getattr(self, name)[...] if name in self.names else None

        return w4a16_matmul(
            x,
            self.packed[...],
            self.scale[...],
            given("zeros"),
            layer,
            group_size=0 if self.groups is None else self.groups.size,
            group_index=given("group_index"),
            parts=self.parts,
            bias=given("bias"),
            out_dtype=dtype,
        )

    def transformed(self, x: Float[Array, "M K"], layer: Array | int | None) -> Array:
        """The input in the basis in which it is quantized."""
        if "input_scale" in self.names:
            x = self._scaled(x, layer)
        if "left" not in self.names:
            return x
        if "right" not in self.names:
            return across_heads(x, take(self.left, layer))
        return kronecker(x, take(self.left, layer), take(self.right, layer))

    def _scaled(self, x: Float[Array, "M K"], layer: Array | int | None) -> Float[Array, "M K"]:
        return rounded(x.astype(jnp.float32) * take(self.input_scale, layer)).astype(x.dtype)

    def clipping(self, layer: Array | int | None) -> Float[Array, " 2"] | None:
        """The learned clipping of the input's quantizer, if there is one."""
        return take(self.clip, layer) if "clip" in self.names else None

    def _product(self, x: Float[Array, "M K"], layer) -> Float[Array, "M N"]:
        if self.weight_bits == 16:
            return matmul(x, take(self.weight, layer).astype(x.dtype))
        if self.groups is not None:
            return matmul(x, self._dequantized(self.groups, layer).astype(x.dtype))
        if self.activation_bits == 16:
            codes, scale = self._integers(layer)
            return matmul(x.astype(jnp.float32), codes.astype(jnp.float32)) * scale[None, :]
        clip = self.clipping(layer)
        if "weight" in self.names:
            bits = self.weight_bits, self.activation_bits
            return simulated_product(x, take(self.weight, layer), clip, *bits, self._step(layer))
        values, row_scale = quantize_activation(x, self.activation_bits, clip)
        return integer_matmul(values, row_scale, *self._integers(layer))

    def _dequantized(self, groups: Groups, layer) -> Float[Array, "N K"]:
        """The weight of one layer in float32, from group scales."""
        if "weight" in self.names:
            weight = take(self.weight, layer)
            if (step := self._step(layer)) is not None:
                return simulated_groups(weight, step, groups)
            quantized = groups.dequantize(*groups.quantize(weight))
            return pass_through(weight.astype(jnp.float32), quantized)
        index = take(self.group_index, layer) if "group_index" in self.names else None
        codes, scale = take(self.codes, layer), take(self.scale, layer)
        return groups.dequantize(codes, scale, None, index, self.parts)

    def _integers(self, layer) -> tuple[Array, Array]:
        """Codes [N, K] and float32 scales [N] of one layer."""
        if "codes" in self.names:
            return take(self.codes, layer), take(self.scale, layer)
        return simulated_weight(take(self.weight, layer), self.weight_bits, self._step(layer))

    def _step(self, layer) -> Float[Array, "*scales"] | None:
        """The learned scales of a simulated weight, if it has any (GRACE)."""
        return take(self.scale, layer) if "scale" in self.names else None
