"""Quantized checkpoints as Hugging Face folders: compressed-tensors, and this project's layout.

Both use the tensor names of compressed-tensors' "pack-quantized": ``weight_packed`` (int32, eight
codes ``q + 8`` a word along the inputs), ``weight_scale``, ``weight_zero_point``, ``weight_g_idx``
and ``weight_shape``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from converters.convert import Progress
from converters.export_hf import export_plan, new_folder, write_small_files
from converters.hf_writer import HfWriter, TensorSpec
from converters.quantized_tensors import packed_words, words_of
from converters.rules import Assignment, Plan
from pallas_kernels.packing import unpack_int4, unpack_uint4
from quota_jax.checkpoint import Checkpoint, open_checkpoint
from quota_jax.errors import QuotaError
from quota_jax.models.params import CACHE
from quota_jax.quantization import QuantizationConfig

_SIGN = np.uint8(0x88)
_NAMES = {
    "vision": ("re:.*vision_tower.*", "re:.*visual[.]blocks.*", "re:.*visual[.]patch_embed.*"),
    "projector": ("re:.*multi_modal_projector.*", "re:.*visual[.]merger.*"),
    "decoder": ("re:.*language_model.*", "re:^model[.]layers.*"),
}
ATTENTION = "decoder.layers.attn"
_TRANSFORMS = {"left": "flatquant_left", "right": "flatquant_right", "clip": "flatquant_clip"}

Tensors = dict[str, np.ndarray]
Convert = Callable[[Mapping[str, np.ndarray], Assignment], Tensors]
"""(a block's parameters, what one float weight is made of) -> tensors by name."""


def export_compressed_tensors(
    checkpoint_path: str | Path,
    out: str | Path,
    *,
    layout: str | None = None,
    max_shard_size: float = 5e9,
    progress: Progress | None = None,
) -> Path:
    """Writes a W4A16 checkpoint in compressed-tensors' "pack-quantized" format.

    The decoder's matrices are packed; those of vision tower and projector, token embeddings and
    head, if quantized, are written dequantized, since few programs run them in integers. Scales
    keep their dtype. See ``export_hf`` for the arguments.

    Raises:
        QuotaError: the format cannot hold the checkpoint: other bits, a quantized KV cache,
            transforms, groups that do not divide the inputs, or a zero point of 16.
    """
    checkpoint = open_checkpoint(checkpoint_path)
    quantization = checkpoint.quantization
    _check_format(checkpoint)
    plan = export_plan(checkpoint, layout)

    def convert(params: Mapping[str, np.ndarray], assignment: Assignment) -> Tensors:
        if assignment.param.startswith("decoder.layers."):
            return packed_tensors(params, assignment, quantization)
        weight = dequantized_weight(params, assignment, quantization)
        return dict(assignment.split(weight.astype(checkpoint.dtype)))

    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        **_scheme(quantization, ("vision", "projector")),
    }
    return _export(checkpoint, plan, out, convert, config, max_shard_size, progress)


def export_native(
    checkpoint_path: str | Path,
    out: str | Path,
    *,
    layout: str | None = None,
    max_shard_size: float = 5e9,
    progress: Progress | None = None,
) -> Path:
    """Writes any quantized checkpoint as safetensors with everything that inference needs.

    4-bit matrices as compressed-tensors packs them, 8-bit ones (token embeddings and head among
    them) as int8 ``weight``; scales [N, 1] or [N, G]. FlatQuant adds, for each matrix,
    ``flatquant_left`` and ``flatquant_right`` (the input is multiplied by left kron right; matrices
    with a common input repeat them) and ``flatquant_clip`` (factors of a token's largest and
    smallest value); AWQ ``input_scale``. An output projection without ``flatquant_right`` mixes
    whole heads. An attention block may have ``cache_key_transform`` (rotated keys are multiplied by
    it), ``cache_query_transform``, ``cache_clip`` (of keys and of values: factors of the largest
    and the smallest value) and ``cache_key_range`` (largest and smallest key of each channel before
    rotation). ``quant_method`` is "flatquant", or "quota_jax" without transforms: other programs
    refuse what they would run wrongly. See ``export_hf`` for the arguments.

    Raises:
        QuotaError: the checkpoint is not quantized.
    """
    checkpoint = open_checkpoint(checkpoint_path)
    quantization = checkpoint.quantization
    if quantization.weight_bits == 16:
        if quantization.has_integers:
            raise QuotaError(
                f"{checkpoint.path} is {quantization.label}: no export holds 8-bit embeddings or "
                "heads beside unquantized matrices"
            )
        raise QuotaError(f"{checkpoint.path} has no quantized weights: give --format hf")
    left_out = tuple(module for module in _NAMES if module not in quantization.modules)
    config = {
        "quant_method": "flatquant" if quantization.has_transforms else "quota_jax",
        "format": "pack-quantized" if quantization.packs else "int-quantized",
        "quantization_status": "compressed",
        **_scheme(quantization, left_out),
        "quota_jax": quantization.to_json(),
    }
    plan = export_plan(checkpoint, layout)

    def convert(params: Mapping[str, np.ndarray], assignment: Assignment) -> Tensors:
        return packed_tensors(params, assignment, quantization)

    return _export(checkpoint, plan, out, convert, config, max_shard_size, progress)


def _check_format(checkpoint: Checkpoint) -> None:
    quantization, where = checkpoint.quantization, checkpoint.path
    if not quantization.packs or quantization.activation_bits != 16:
        raise QuotaError(
            f"{where} is {quantization.label}: --format compressed-tensors writes W4A16 only; "
            "give --format native"
        )
    if quantization.kv_bits != 16:
        raise QuotaError(
            f"{where} has a {quantization.kv_bits}-bit KV cache, which the compressed-tensors "
            "format does not hold: quantize with KV16, or give --format native"
        )
    if quantization.has_transforms:
        raise QuotaError(
            f"{where} transforms its inputs (FlatQuant), which the compressed-tensors format does "
            "not hold: give --format native"
        )
    if not quantization.quantizes("decoder"):
        raise QuotaError(f"{where}: its decoder is not quantized: give --format native")
    if not quantization.group:
        return
    for block in checkpoint.block_names:
        for name, spec in checkpoint.block_specs(block).items():
            if name.startswith("decoder.") and name.endswith(".packed"):
                columns = 2 * spec.shape[1]
                if columns % quantization.group:
                    raise QuotaError(
                        f"{where}: {name.removesuffix('.packed')} has {columns} inputs, which "
                        f"groups of {quantization.group} do not divide: give --format native"
                    )


def _scheme(quantization: QuantizationConfig, left_out: tuple[str, ...]) -> dict[str, Any]:
    """``config_groups`` and ``ignore``."""
    weights = {
        # Those of the container: codes of 2 and 3 bits are stored as 4-bit ones.
        "num_bits": 4 if quantization.packs else quantization.weight_bits,
        "type": "int",
        "symmetric": quantization.symmetric,
        "strategy": "group" if quantization.group else "channel",
        "group_size": quantization.group or None,
        "dynamic": False,
        "actorder": "group" if quantization.act_order else None,
    }
    inputs = None
    if quantization.activation_bits < 16:
        inputs = {
            "num_bits": quantization.activation_bits,
            "type": "int",
            "symmetric": True,
            "strategy": "token",
            "dynamic": True,
        }
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": inputs,
        "output_activations": None,
    }
    ignore = ["lm_head", "re:.*lm_head", *(name for part in left_out for name in _NAMES[part])]
    return {"config_groups": {"group_0": group}, "ignore": ignore}


def packed_tensors(
    params: Mapping[str, np.ndarray], assignment: Assignment, quantization: QuantizationConfig
) -> Tensors:
    """The stored tensors of one parameter's matrices."""
    stem = assignment.param.removesuffix("weight")
    rows = {
        part: params[stem + part]
        for part in ("packed", "codes", "scale", "zeros")
        if stem + part in params
    }
    shared = {
        name: params[stem + part]
        for part, name in {**_TRANSFORMS, "input_scale": "input_scale"}.items()
        if stem + part in params
    }
    index = params.get(stem + "group_index")
    found: Tensors = {}
    start = 0
    for place, piece in enumerate(assignment.pieces):
        part = {name: value[start : start + piece.shape[0]] for name, value in rows.items()}
        start += piece.shape[0]
        tensors: Tensors = {"weight_shape": np.array(piece.shape, np.int64), **shared}
        if "codes" in part:
            tensors["weight"] = part["codes"]
        else:
            signed = quantization.symmetric
            tensors["weight_packed"] = packed_words(part["packed"] ^ _SIGN * signed)
        scale = part["scale"]
        tensors["weight_scale"] = scale[:, None] if scale.ndim == 1 else scale
        if "zeros" in part:
            if part["zeros"].max() > 15:
                raise QuotaError(
                    f"{piece.name}: a zero point of 16 (a GPTQ file's 15 + 1) does not fit 4 bits"
                )
            tensors["weight_zero_point"] = np.ascontiguousarray(words_of(part["zeros"].T).T)
        if index is not None:
            tensors["weight_g_idx"] = index[place]
        prefix = piece.name.removesuffix("weight")
        found |= {prefix + name: np.ascontiguousarray(value) for name, value in tensors.items()}
    return found


def dequantized_weight(
    params: Mapping[str, np.ndarray], assignment: Assignment, quantization: QuantizationConfig
) -> np.ndarray:
    """The float32 matrix of one 4-bit parameter, for its input before any ``input_scale``, or of
    8-bit token embeddings or head."""
    grid = quantization.grid
    stem = assignment.param.removesuffix("weight")
    if assignment.param.removesuffix(".weight") in quantization.table_bits:
        scale = params[stem + "scale"].astype(np.float32)
        return params[stem + "codes"].astype(np.float32) * scale[:, None]
    codes = (unpack_int4 if grid.symmetric else unpack_uint4)(jnp.asarray(params[stem + "packed"]))
    scale = jnp.asarray(params[stem + "scale"])
    zeros, index, inputs = (
        jnp.asarray(params[stem + part]) if stem + part in params else None
        for part in ("zeros", "group_index", "input_scale")
    )
    parts: tuple[int, ...] = ()
    if index is not None:
        parts = tuple(piece.shape[0] for piece in assignment.pieces)
        if len(parts) != len(index):
            # One matrix in the file is several parts here, all with the same groups.
            index = index[:1]
    scale = scale[:, None] if scale.ndim == 1 else scale
    weight = grid.dequantize(codes, scale, zeros, index, parts)
    return np.asarray(weight if inputs is None else weight * inputs)


def _cache_tensors(params: Mapping[str, np.ndarray], assignment: Assignment) -> Tensors:
    """What a decoder layer holds of its cache, beside its attention's matrices."""
    attention = assignment.pieces[0].name.removesuffix(".weight").rpartition(".")[0]
    return {
        f"{attention}.cache_{name.removeprefix(f'{CACHE}.')}": value
        for name, value in params.items()
        if name.startswith(f"{CACHE}.")
    }


def _tensors(
    params: Mapping[str, np.ndarray],
    assignments: Sequence[Assignment],
    convert: Convert,
    plan: Plan,
) -> Iterator[tuple[str, np.ndarray]]:
    """(name, array) of all tensors of a block."""
    for assignment in assignments:
        if assignment.param in params:
            found = dict(assignment.split(params[assignment.param]))
        else:
            found = convert(params, assignment)
        if assignment.param == f"{ATTENTION}.qkv.weight":
            found |= _cache_tensors(params, assignment)
        for name, value in found.items():
            yield name, value
            if plan.tied_copy is not None:
                head, embedding = (tied.removesuffix("weight") for tied in plan.tied_copy)
                if name.startswith(embedding):
                    yield head + name.removeprefix(embedding), value


def _export(
    checkpoint: Checkpoint,
    plan: Plan,
    out: str | Path,
    convert: Convert,
    config: Mapping[str, Any],
    max_shard_size: float,
    progress: Progress | None,
) -> Path:
    """Writes the folder; one block of the checkpoint is held at a time."""
    with new_folder(out) as (folder, finish):
        specs: dict[str, TensorSpec] = {}
        for block, assignments in plan.blocks.items():
            # Shapes come from a dry run on arrays without memory.
            stored = {
                name: np.broadcast_to(np.zeros((), spec.dtype), spec.shape)
                for name, spec in checkpoint.block_specs(block).items()
            }
            for name, value in _tensors(stored, assignments, convert, plan):
                specs[name] = TensorSpec(shape=value.shape, dtype=value.dtype)
        writer = HfWriter(folder, specs, max_shard_size)
        for done, (block, assignments) in enumerate(plan.blocks.items(), start=1):
            params = checkpoint.read_block(block)
            for name, value in _tensors(params, assignments, convert, plan):
                writer.write(name, value)
            if progress is not None:
                progress(done, len(plan.blocks), block)
        writer.finish()
        write_small_files(checkpoint, folder, config)
        finish()
    return Path(out).absolute()
