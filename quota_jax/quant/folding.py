"""Where a block's transforms stand, and folding what was learned into its parameters.

A block is one vision layer, the projector, or one decoder layer, as stored in a checkpoint. Every
linear has one transform of its input; linears that share an input (q/k/v, gate/up) are one fused
linear here, so they share its activation clipping too (the paper's code has one for each).

Values have P_v: each head's are multiplied by one learned matrix, the same for all heads, so that
heads of queries that share a key/value head read the same. It goes into the value rows of q/k/v,
and its inverse transpose into the columns of the output projection, so it costs nothing online.
The output projection's own transform acts on what attention gives. As "heads" it is P_o, which
mixes the query heads: together with P_v the input is multiplied by ``P_o kron P_v``, as in the
paper. As "kronecker" it is a product over all heads' features like that of any other linear, on top
of P_v, which only values that are cached in few bits then have.

P_k multiplies each rotated key of the cache, its inverse transpose each rotated query. Rotation
stands between it and the weights, so both run online. Ranges of keys and of values have two learned
factors each.

Diagonals cost nothing online: that of an input fed by a norm goes into the norm's scale and bias,
that of ``down`` behind a gated product into the rows of ``up``. Where neither stands before a
linear (``o``, ``down`` behind a plain activation, LLaVA's projector) there is none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from quota_jax.models.params import CACHE, LINEARS
from quota_jax.quant.flatquant import (
    ALPHA,
    CLIP_START,
    across_heads,
    clip_rows,
    factor,
    factor_pair,
    kronecker,
    sigmoid,
    start_diagonal,
    start_factor,
)
from quota_jax.quantization import QuantizationConfig

Learned = dict[str, dict[str, Any]]
"""Linear -> what was found for it, each optional: diagonal, left, right, value, weight_clip,
input_clip; for ``CACHE``: key, cache_clip.

The diagonal is a logarithm, the clips are logits, the others the parameters of a factor.
"""

NORM_BEFORE = {"qkv": "norm1", "gate_up": "norm2", "up": "norm2", "linear_1": "norm"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """A linear with a transform, and where its diagonal goes ("" where there is none).

    values: the fused q/k/v whose values of ``head_dim`` features this output projection reads with
    a transform of their own; "" where they have none. heads: how many heads this projection's
    transform mixes; 0 where it is a Kronecker product.
    """

    linear: str
    norm: str = ""
    gated: str = ""
    values: str = ""
    head_dim: int = 0
    heads: int = 0

    @property
    def has_diagonal(self) -> bool:
        return bool(self.norm or self.gated)


def find_sites(
    names: Mapping[str, Any],
    quantization: QuantizationConfig,
    *,
    value_width: int = 0,
    heads: int = 0,
) -> tuple[Site, ...]:
    """The transforms of a block with these parameters, in their order.

    Args:
      value_width: features of a head whose values are transformed; 0 leaves them as they are.
      heads: of queries, which the output projection's transform mixes; 0: a Kronecker product.
    """
    sites = []
    for name in names:
        *path, kind = name.split(".")
        if kind != "weight" or path[-1] not in LINEARS or not quantization.quantizes(path[0]):
            continue
        linear = ".".join(path)
        above = ".".join(path[:2] if "layers" in path else path[:1])
        norm = f"{above}.{NORM_BEFORE.get(path[-1], '')}"
        gated = f"{above}.mlp.gate_up"
        values = f"{above}.attn.qkv" if path[-1] == "o" and value_width else ""
        sites.append(
            Site(
                linear=linear,
                norm=norm if f"{norm}.scale" in names else "",
                gated=gated if path[-1] == "down" and f"{gated}.weight" in names else "",
                values=values,
                head_dim=value_width if values else 0,
                heads=heads if path[-1] == "o" else 0,
            )
        )
    return tuple(sites)


def start(
    params: Mapping[str, Any],
    sites: tuple[Site, ...],
    input_max: Mapping[str, np.ndarray],
    quantization: QuantizationConfig,
    *,
    kind: str,
    seed: int,
) -> Learned:
    """What learning begins with.

    Args:
      input_max: largest absolute value of each input channel by linear; without, diagonals are 1.
      kind: "random" rotations or the "identity".
    """
    learned: Learned = {}
    draw = np.random.default_rng(seed)
    for site in sites:
        weight = np.abs(np.asarray(params[f"{site.linear}.weight"], np.float64))
        a, b = (site.heads, 0) if site.heads else factor_pair(weight.shape[1])
        found: dict[str, Any] = {"left": start_factor(a, kind, draw)}
        if b:
            found["right"] = start_factor(b, kind, draw)
        found["weight_clip"] = np.full((2, len(weight)), CLIP_START)
        if site.has_diagonal:
            width = params[f"{site.norm}.scale"].shape[0] if site.norm else weight.shape[1]
            found["diagonal"] = np.zeros(width)
            if site.linear in input_max:
                found["diagonal"] = diagonal_of(weight, input_max[site.linear], width, ALPHA)
        if quantization.activation_bits < 16:
            found["input_clip"] = np.full(2, CLIP_START)
        if site.values:
            found["value"] = start_factor(site.head_dim, kind, draw)
        learned[site.linear] = found
    return learned


def start_cache(quantization: QuantizationConfig, width: int, *, kind: str, seed: int) -> Learned:
    """What learning a decoder layer's cache begins with; empty where nothing of it is learned.

    Args:
      width: features of a head.
    """
    found: dict[str, Any] = {}
    if quantization.key_transform:
        found["key"] = start_factor(width, kind, np.random.default_rng([seed, 1]))
    if quantization.cache_clip:
        found["cache_clip"] = np.full((2, 2), CLIP_START)
    return {CACHE: found} if found else {}


def diagonal_of(weight: Any, input_max: Any, width: int, alpha: float) -> np.ndarray:
    """``start_diagonal`` of a linear. A norm that feeds several tokens side by side (Qwen's merger)
    has one for all of them: ``width`` is the norm's."""
    columns = np.abs(np.asarray(weight)).max(0).reshape(-1, width)
    return start_diagonal(columns.max(0), np.asarray(input_max).reshape(-1, width).max(0), alpha)


def fold(
    params: Mapping[str, Any],
    sites: tuple[Site, ...],
    learned: Learned,
    xp: Any,
    *,
    clip: bool = True,
) -> dict[str, Any]:
    """The block's parameters with everything learned in them (reference: section 1.6 of FlatQuant's
    ``reparameterize``).

    Without ``clip`` no weight is cut: the block then computes what the original one does.
    """
    out = dict(params)
    # First: transforms of rows change the ranges by which rows are cut.
    for site in sites:
        if "value" in learned[site.linear]:
            out |= _transform_values(out, site, factor(learned[site.linear]["value"], xp), xp)
    for site in sites:
        found, name = learned[site.linear], f"{site.linear}.weight"
        weight = out[name]
        if site.has_diagonal:
            diagonal = xp.exp(found["diagonal"])
            weight = weight / xp.tile(diagonal, weight.shape[1] // len(diagonal))
        if "left" in found:
            left, left_inverse = factor(found["left"], xp)
            out[f"{site.linear}.left"] = left
            if "right" in found:
                right, right_inverse = factor(found["right"], xp)
                out[f"{site.linear}.right"] = right
                weight = kronecker(weight, left_inverse, right_inverse)
            else:
                weight = across_heads(weight, left_inverse)
        if "weight_clip" in found and clip:
            weight = clip_rows(weight, found["weight_clip"], xp)
        out[name] = weight
        if "input_clip" in found:
            out[f"{site.linear}.clip"] = sigmoid(found["input_clip"], xp)
    # Afterwards: scaling a row commutes with clipping and quantizing it.
    for site in sites:
        if not site.has_diagonal:
            continue
        diagonal = xp.exp(learned[site.linear]["diagonal"])
        if site.gated:
            diagonal = xp.concatenate([xp.ones_like(diagonal), diagonal])
        stem = site.gated or site.norm
        for part in ("weight", "scale", "bias"):
            if (name := f"{stem}.{part}") in out:
                value = out[name]
                out[name] = value * (diagonal[:, None] if value.ndim == 2 else diagonal)
    cache = learned.get(CACHE, {})
    if "key" in cache:
        matrix, inverse = factor(cache["key"], xp)
        out[f"{CACHE}.key_transform"], out[f"{CACHE}.query_transform"] = matrix, inverse
    if "cache_clip" in cache:
        out[f"{CACHE}.clip"] = sigmoid(cache["cache_clip"], xp)
    return out


def _transform_values(
    params: Mapping[str, Any], site: Site, factors: tuple[Any, Any], xp: Any
) -> dict[str, Any]:
    """``v P`` of each head in the rows of q/k/v, ``P^-T`` in the columns of what reads them."""
    matrix, inverse = factors
    name = f"{site.linear}.weight"
    weight = params[name]
    heads = weight.reshape(len(weight), -1, site.head_dim)
    out = {name: (heads @ inverse).reshape(weight.shape)}
    # Rows are those of queries, as many as the projection has columns, of keys and of values.
    values = (len(params[f"{site.values}.weight"]) - weight.shape[1]) // 2
    for part in ("weight", "bias"):
        if (name := f"{site.values}.{part}") in params:
            rows = params[name]
            heads = rows[-values:].reshape(values // site.head_dim, site.head_dim, -1)
            moved = (matrix.T @ heads).reshape(rows[-values:].shape)
            out[name] = xp.concatenate([rows[:-values], moved])
    return out


def fold_exactly(
    params: Mapping[str, np.ndarray],
    sites: tuple[Site, ...],
    learned: Mapping[str, Any],
    *,
    clip: bool = True,
) -> dict[str, np.ndarray]:
    """``fold`` in float64. What changed is float32, the rest as it was."""
    wide = {name: np.asarray(value, np.float64) for name, value in params.items()}
    folded = fold(wide, sites, _widened(learned), np, clip=clip)
    return {
        name: params[name] if value is wide.get(name) else value.astype(np.float32)
        for name, value in folded.items()
    }


def _widened(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {key: _widened(value) for key, value in tree.items()}
    return np.asarray(tree, np.float64)
