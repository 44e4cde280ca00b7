"""GRACE's losses (arXiv 2601.22709): gated decoupled distillation, relational alignment of visual
tokens, and the controller of the distillation's weight. Arrays in, arrays out.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

_TINY = 1e-12


def cross_entropy(
    logits: Float[Array, "*rows V"], labels: Int[Array, "*rows"], weights: Float[Array, "*rows"]
) -> Float[Array, ""]:
    """Mean negative log-likelihood of the labels over the rows of weight 1."""
    chosen = _at(jax.nn.log_softmax(logits), labels)
    return -(chosen * weights).sum() / jnp.maximum(weights.sum(), 1)


def gates(teacher: Float[Array, "*rows V"]) -> Float[Array, "*rows"]:
    """``exp(-H / log V)`` with the entropy H of the teacher's distribution: 1 where it is certain,
    1/e where it knows nothing."""
    logs = jax.nn.log_softmax(teacher)
    entropy = -(jnp.exp(logs) * logs).sum(-1)
    return jnp.exp(-entropy / jnp.log(teacher.shape[-1]))


def decoupled(
    teacher: Float[Array, "*rows V"],
    student: Float[Array, "*rows V"],
    labels: Int[Array, "*rows"],
    *,
    temperature: float,
    target_weight: float,
    rest_weight: float,
) -> Float[Array, "*rows"]:
    """Decoupled knowledge distillation of each row.

    ``T^2 (a KL({p_label, 1 - p_label}) + b KL(p over the other entries, renormalized))``, both
    divergences of the student's distribution from the teacher's, at temperature T.
    """
    t_label, t_other, t_rest = _split(teacher / temperature, labels)
    s_label, s_other, s_rest = _split(student / temperature, labels)
    target = jnp.exp(t_label) * (t_label - s_label) + jnp.exp(t_other) * (t_other - s_other)
    rest = (jnp.exp(t_rest) * (t_rest - s_rest)).sum(-1)
    return temperature**2 * (target_weight * target + rest_weight * rest)


def gated_mean(
    losses: Float[Array, "*rows"], gate: Float[Array, "*rows"], weights: Float[Array, "*rows"]
) -> Float[Array, ""]:
    """``sum g l / sum g`` over the rows of weight 1."""
    gate = gate * weights
    return (gate * losses).sum() / jnp.maximum(gate.sum(), _TINY)


def relational(
    teacher: Float[Array, "B S D"], student: Float[Array, "B S E"], mask: Bool[Array, "B S"]
) -> Float[Array, ""]:
    """``1 - CKA`` of the Gram matrices of each sample's l2-normalized tokens, mean over the samples
    with at least two; 0 without any.

    CKA is the centred linear kernel alignment, from 0 to 1. ``mask`` says which tokens count.
    """
    first, second = (_centred_gram(x, mask) for x in (teacher, student))
    product = (first * second).sum((1, 2))
    norms = (jnp.square(first).sum((1, 2)), jnp.square(second).sum((1, 2)))
    # Below the root: its derivative at 0 is infinite.
    alignment = product * jax.lax.rsqrt(jnp.maximum(norms[0] * norms[1], _TINY))
    counts = (mask.sum(1) > 1).astype(jnp.float32)
    return ((1 - alignment) * counts).sum() / jnp.maximum(counts.sum(), 1)


def control(
    beta: Float[Array, ""],
    average: Float[Array, ""],
    loss: Float[Array, ""],
    first: Bool[Array, ""],
    *,
    rate: float,
    target: float,
    bounds: tuple[float, float],
    decay: float,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The next distillation weight and running mean of the distillation loss.

    ``beta <- clip(beta + rate (EMA - target), bounds)``; the running mean starts at the ``first``
    loss.
    """
    average = jnp.where(first, loss, decay * average + (1 - decay) * loss)
    return jnp.clip(beta + rate * (average - target), *bounds), average


def _at(values: Array, labels: Array) -> Array:
    return jnp.take_along_axis(values, labels[..., None], axis=-1)[..., 0]


def _split(logits: Array, labels: Array) -> tuple[Array, Array, Array]:
    """Log-probabilities of the label, of all others together, and of each other among them (there
    the label has one of about 0)."""
    other = jnp.arange(logits.shape[-1]) != labels[..., None]
    rest = jnp.where(other, logits, -1e30)
    of_rest = jax.nn.logsumexp(rest, axis=-1)
    total = jax.nn.logsumexp(logits, axis=-1)
    among = jnp.where(other, rest - of_rest[..., None], 0.0)
    # exp(0) of the label's own place must not count: it cancels, as both models have 0 there.
    return _at(logits, labels) - total, of_rest - total, among


def _centred_gram(x: Array, mask: Array) -> Array:
    x = jnp.where(mask[..., None], x.astype(jnp.float32), 0)
    x = x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), _TINY))
    # Centring the tokens centres the rows and columns of their Gram matrix.
    count = jnp.maximum(mask.sum(1), 1)[:, None, None]
    x = jnp.where(mask[..., None], x - x.sum(1, keepdims=True) / count, 0)
    return jnp.einsum("bsd,btd->bst", x, x, precision="highest")
