"""From the quantized matrices of a Hugging Face checkpoint to packed parameters of this project."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from converters.blocks import DTYPES
from converters.hf_reader import TensorInfo, some
from converters.quantized_tensors import MIDDLE, QuantizedTensors
from converters.rules import Assignment, Plan, RuleTable, assign
from quota_jax.errors import QuotaError
from quota_jax.models.params import JOINED, LINEARS
from quota_jax.quantization import MODULES, QuantizationConfig

_SIGN = np.uint8(0x88)
"""Turns two unsigned nibbles q + 8 into two's complement q."""


def without_zero_biases(
    tensors: QuantizedTensors, table: RuleTable, config: Any, blocks: Mapping[str, Any]
) -> dict[str, TensorInfo]:
    """The tensors to plan with: some quantizers add biases of zeros that the model does not
    have."""
    layouts = [assign(table, config, blocks, layout) for layout in table.layouts]
    known = {name for plan in layouts for name in plan.names()}
    infos = dict(tensors.infos)
    for weight in tensors:
        bias = f"{weight.removesuffix('weight')}bias"
        if bias in infos and bias not in known and not tensors.reader.read(bias).any():
            del infos[bias]
    return infos


def quantization_of(plan: Plan, tensors: QuantizedTensors, where: str) -> QuantizationConfig:
    """What a plan's quantized matrices are, as a configuration.

    Reads the zero points and group indices of all of them, which are small.

    Raises:
      QuotaError: matrices are quantized that cannot be here, or only some of a module are.
    """
    if plan.tied_copy and plan.tied_copy[0] in tensors:
        raise QuotaError(f"{where}: {plan.tied_copy[0]}: a quantized head is not supported")
    state: dict[str, dict[bool, str]] = {}
    for assignments in plan.blocks.values():
        for assignment in assignments:
            *path, kind = assignment.param.split(".")
            names = [piece.name for piece in assignment.pieces]
            found = [name for name in names if name in tensors]
            if found and (kind != "weight" or path[-1] not in LINEARS):
                raise QuotaError(f"{where}: {some(found)}: a quantized {path[-1]} is not supported")
            if kind == "weight" and path[-1] in LINEARS:
                for name in names:
                    state.setdefault(path[0], {}).setdefault(name in tensors, name)
    for module, seen in state.items():
        if len(seen) == 2:
            raise QuotaError(
                f"{where}: {module}: {seen[True]} is quantized but {seen[False]} is not; all "
                "matrices of a module must be quantized, or none"
            )
    scheme = tensors.scheme
    symmetric = all((tensors.zero(name) == MIDDLE).all() for name in tensors)
    in_order = all(
        (tensors.index(name) == tensors.in_order(tensors.infos[name].shape[1])).all()
        for name in tensors
    )
    dtypes = {tensors.scale_dtype(name).name for name in tensors}
    grouped = scheme.group > 0 or not symmetric
    return QuantizationConfig(
        method=scheme.method,
        weight_bits=4,
        modules=tuple(module for module in MODULES if True in state.get(module, {})),
        group=scheme.group,
        symmetric=symmetric,
        # Several dtypes meet in float32, exactly.
        scale_dtype=(dtypes.pop() if len(dtypes) == 1 else "float32") if grouped else None,
        act_order=not in_order,
    )


def is_quantized(assignment: Assignment, tensors: QuantizedTensors) -> bool:
    """Whether a parameter is made of quantized matrices."""
    return assignment.pieces[0].name in tensors


def read_quantized(
    tensors: QuantizedTensors, assignment: Assignment, quantization: QuantizationConfig
) -> dict[str, np.ndarray]:
    """The parameters that stand for one float weight, its matrices joined along the rows."""
    pieces = [tensors.read(piece.name) for piece in assignment.pieces]
    stem = assignment.param.removesuffix("weight")
    packed = np.concatenate([piece.packed for piece in pieces])
    scale = np.concatenate([piece.scale.astype(np.float32) for piece in pieces])
    found = {"packed": packed ^ _SIGN if quantization.symmetric else packed, "scale": scale}
    if quantization.groups is None:
        found["scale"] = scale[:, 0]
    else:
        found["scale"] = scale.astype(DTYPES[quantization.scale_dtype or "float32"])
        if not quantization.symmetric:
            found["zeros"] = np.concatenate([piece.zero for piece in pieces])
        if quantization.act_order:
            parts = JOINED.get(stem.split(".")[-2], 1)
            index = np.stack([piece.index for piece in pieces])
            # One matrix in the file may be several parts here (a fused q/k/v).
            found["group_index"] = np.repeat(index, parts // len(pieces), axis=0)
    return {stem + part: value for part, value in found.items()}
