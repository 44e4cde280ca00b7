"""The options of GRACE and the optimizer that they describe."""

from __future__ import annotations

import math
from dataclasses import dataclass

import optax

from quota_jax.errors import QuotaError
from quota_jax.quant.grace_student import Learned
from quota_jax.quantization import MODULES, QuantizationConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class GraceOptions:
    """The paper's values where they are known; marked (ours) where they are not.

    steps, batch_size: (ours). learning_rate, scale_learning_rate: of parameters, and of the
    logarithms of the scales. warmup, max_gradient_norm, weight_decay: share of the steps with
    rising rates, which then fall to 0 along a cosine; bound of the gradient's norm; of AdamW (ours,
    the fine-tuning recipe of LLaVA-1.5).

    temperature, target_weight, rest_weight: T, alpha and beta_d of the decoupled distillation.
    gated: positions weigh exp(-H / log V), with the teacher's entropy H at temperature 1 (ours), or
    all the same. beta, beta_rate, beta_target, beta_bounds, average_decay: start of the
    distillation's weight, and eta, tau, bounds and running mean of its controller.

    relational_weight, relational_warmup: omega, and the steps in which it rises from 0.

    start: scales begin at the best of 20 by squared error ("search"), or as round-to-nearest has
    them ("nearest": the first step sees exactly its model). targets: "answers" or all "text".
    learned: modules that learn; None (ours): the quantized ones and the projector. Embeddings and
    head never learn. seed: of the order of the batches, drawn anew for each pass over them.
    """

    steps: int = 1000
    batch_size: int = 8
    learning_rate: float = 1e-5
    scale_learning_rate: float = 2e-4
    warmup: float = 0.03
    max_gradient_norm: float = 1.0
    weight_decay: float = 0.0
    temperature: float = 2.0
    target_weight: float = 1.0
    rest_weight: float = 4.0
    gated: bool = True
    beta: float = 0.5
    beta_rate: float = 0.003
    beta_target: float = 3.0
    beta_bounds: tuple[float, float] = (0.1, 1.0)
    average_decay: float = 0.99
    relational_weight: float = 3.0
    relational_warmup: int = 400
    start: str = "search"
    targets: str = "answers"
    learned: tuple[str, ...] | None = None
    seed: int = 0

    def __post_init__(self):
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise QuotaError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "scale_learning_rate", "temperature", "max_gradient_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise QuotaError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in (
            "weight_decay", "target_weight", "rest_weight", "beta", "beta_rate", "beta_target",
            "relational_weight", "relational_warmup", "seed",
        ):  # fmt: skip
            if not 0 <= getattr(self, name) < math.inf:
                raise QuotaError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("warmup", "average_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise QuotaError(f"{name} must be from 0 to 1, got {getattr(self, name)}")
        if not 0 <= self.beta_bounds[0] <= self.beta_bounds[1]:
            raise QuotaError(f"beta_bounds must be in order, got {self.beta_bounds}")
        for name, known in (("start", ("search", "nearest")), ("targets", ("answers", "text"))):
            if getattr(self, name) not in known:
                raise QuotaError(f"{name} {getattr(self, name)!r} is unknown; known: {known}")
        if unknown := [name for name in self.learned or () if name not in MODULES]:
            raise QuotaError(f"unknown module {unknown[0]!r}; known: {MODULES}")
        if self.learned == ():
            raise QuotaError("learned names no module")

    def modules(self, quantization: QuantizationConfig) -> tuple[str, ...]:
        """The modules that learn."""
        if self.learned is not None:
            return tuple(name for name in MODULES if name in self.learned)
        return tuple(n for n in MODULES if n == "projector" or quantization.quantizes(n))

    def optimizer(self) -> optax.GradientTransformation:
        """Updates of ``Learned``."""

        def adamw(rate: float, decay: float) -> optax.GradientTransformation:
            schedule = optax.warmup_cosine_decay_schedule(
                0.0, rate, round(self.warmup * self.steps), self.steps
            )
            return optax.adamw(schedule, weight_decay=decay)

        return optax.chain(
            optax.clip_by_global_norm(self.max_gradient_norm),
            optax.multi_transform(
                {
                    "weights": adamw(self.learning_rate, self.weight_decay),
                    "scales": adamw(self.scale_learning_rate, 0.0),
                },
                Learned("weights", "scales"),  # pyrefly: ignore[bad-argument-type]
            ),
        )
