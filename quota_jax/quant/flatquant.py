"""The mathematics of FlatQuant (Sun et al., ICML 2025, arXiv 2410.09426), free of models.

The input of a linear is multiplied by a learned invertible matrix before it is quantized, the
weight by its inverse transpose, so that both have fewer outliers and the product stays:
``x W^T = (x P) (W P^-T)^T``. P is a Kronecker product of two small matrices (section 3.1), each
``U diag(lambda) V^T`` with orthogonal U and V. Every function takes the array module ``xp``:
``jax.numpy`` in float32 to learn, ``numpy`` in float64 to fold.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

CLIP_START = 4.0
"""Clipping factors start at sigmoid(4) = 0.982."""
ALPHA = 0.3
"""Exponent of the activations in the first diagonal."""
STARTS = ("random", "identity")


def factor_pair(width: int) -> tuple[int, int]:
    """``a <= b`` with ``a b = width``: of the pairs of equal parity the one with the smallest gap.

    So does the authors' Fermat factorization. A width of the form 4k + 2 has no pair of equal
    parity (there their loop does not end): then the pair with the smallest gap.
    """
    pairs = [(a, width // a) for a in range(math.isqrt(width), 0, -1) if width % a == 0]
    return next((pair for pair in pairs if (pair[1] - pair[0]) % 2 == 0), pairs[0])


def kronecker(x: Any, left: Any, right: Any) -> Any:
    """``x (left kron right)`` over the last axis: ``left^T X right`` with x as a matrix."""
    matrix = x.reshape(*x.shape[:-1], left.shape[0], right.shape[0])
    return (left.T @ (matrix @ right)).reshape(x.shape)


def across_heads(x: Any, left: Any) -> Any:
    """``x (left kron I)`` over the last axis: mixes whole heads, as many as ``left`` has rows."""
    heads = x.reshape(*x.shape[:-1], left.shape[0], -1)
    return (left.T @ heads).reshape(x.shape)


def cayley(free: Any, xp: Any) -> Any:
    """The orthogonal ``(I - A/2)^-1 (I + A/2)``, A the skew matrix of ``free``'s strict lower
    triangle."""
    lower = xp.tril(free, -1)
    half = (lower - lower.T) / 2
    one = xp.eye(free.shape[0], dtype=free.dtype)
    return xp.linalg.solve(one - half, one + half)


def factor(params: dict[str, Any], xp: Any) -> tuple[Any, Any]:
    """``P = U diag(lambda) V^T`` and its inverse transpose ``U diag(1/lambda) V^T``."""
    left, right = cayley(params["u"], xp), cayley(params["v"], xp)
    return (left * params["lambda"]) @ right.T, (left / params["lambda"]) @ right.T


def start_factor(size: int, start: str, draw: np.random.Generator) -> dict[str, np.ndarray]:
    """Parameters of a factor: the identity, or a random rotation as the authors' code begins with.

    There the free parameter is a random orthogonal matrix, of which the strict lower triangle
    counts.
    """
    if start not in STARTS:
        raise ValueError(f"start {start!r} is not one of {STARTS}")
    free = np.zeros((2, size, size))
    if start == "random":
        free = np.stack([_orthogonal(size, draw) for _ in range(2)])
    return {"u": free[0], "v": free[1], "lambda": np.ones(size)}


def _orthogonal(size: int, draw: np.random.Generator) -> np.ndarray:
    q, r = np.linalg.qr(draw.standard_normal((size, size)))
    return q * np.sign(np.diag(r))


def start_diagonal(
    weight_max: np.ndarray, input_max: np.ndarray, alpha: float = ALPHA
) -> np.ndarray:
    """Logarithm of ``d = weight_max^(1 - alpha) / input_max^alpha`` per input channel.

    The input is multiplied by d. The authors learn d itself; its logarithm cannot change sign, and
    a step of the optimizer is relative, which outlier channels (small d) need.
    """
    weight = np.maximum(weight_max.astype(np.float64), 1e-5)
    inputs = np.maximum(input_max.astype(np.float64), 1e-5)
    return (1 - alpha) * np.log(weight) - alpha * np.log(inputs)


def sigmoid(x: Any, xp: Any) -> Any:
    return 1 / (1 + xp.exp(-x))


def clip_rows(weight: Any, logits: Any, xp: Any) -> Any:
    """Each row cut to ``[sigmoid(l_1) min, sigmoid(l_0) max]`` of itself; logits ``[2, N]``.

    Quantizing the result by its largest absolute value gives the clipped scale.
    """
    factors = sigmoid(logits, xp)
    high = xp.maximum(weight.max(-1), 0) * factors[0]
    low = xp.minimum(weight.min(-1), 0) * factors[1]
    return xp.clip(weight, low[:, None], high[:, None])
