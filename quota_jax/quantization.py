"""What is quantized, to how many bits, and by which method (static, hashable, stored as JSON)."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from quota_jax.config import build
from quota_jax.errors import QuotaError

MODULES = ("vision", "projector", "decoder")
METHODS = ("none", "rtn", "smoothquant", "flatquant")


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizationConfig:
    """Bits of weights, activations and KV cache; 16 means the stored floating-point dtype.

    Weights: symmetric per output channel. Activations: dynamic symmetric per token. Keys and
    values: asymmetric per token per head. Embeddings, patch embedding, norms and the head are never
    quantized. ``modules`` says which of vision tower, projector and decoder have quantized
    linears; the KV cache belongs to the decoder and follows ``kv_bits`` alone. Under method
    "flatquant" a quantized linear also holds two small matrices that transform its input and, where
    activations are quantized, two clipping factors.
    """

    method: str = "none"
    weight_bits: int = 16
    activation_bits: int = 16
    kv_bits: int = 16
    modules: tuple[str, ...] = MODULES

    none: ClassVar[QuantizationConfig]

    def __post_init__(self):
        if self.method not in METHODS:
            raise QuotaError(f"quantization method {self.method!r} is unknown; known: {METHODS}")
        for name in ("weight_bits", "activation_bits", "kv_bits"):
            if getattr(self, name) not in (4, 8, 16):
                raise QuotaError(f"{name} must be 4, 8 or 16, got {getattr(self, name)}")
        if self.weight_bits == 16 and self.activation_bits != 16:
            raise QuotaError(
                f"W16A{self.activation_bits} is not supported: quantized activations need "
                "quantized weights"
            )
        if unknown := [module for module in self.modules if module not in MODULES]:
            raise QuotaError(f"unknown module {unknown[0]!r}; known: {MODULES}")
        if self.method in ("smoothquant", "flatquant") and self.weight_bits == 16:
            raise QuotaError(f"method {self.method!r} needs quantized weights (4 or 8 bits)")
        if self.method == "none" and not self.is_none:
            raise QuotaError(f"method 'none' cannot carry {self.label}")

    @property
    def is_none(self) -> bool:
        return self.weight_bits == 16 and self.kv_bits == 16

    @property
    def label(self) -> str:
        """For example ``W4A8KV4``."""
        return f"W{self.weight_bits}A{self.activation_bits}KV{self.kv_bits}"

    def quantizes(self, module: str) -> bool:
        """Whether the linears of ``module`` are stored in integers."""
        return self.weight_bits < 16 and module in self.modules

    @classmethod
    def parse(
        cls, label: str, *, method: str = "rtn", modules: tuple[str, ...] = MODULES
    ) -> QuantizationConfig:
        """Reads ``W4A4KV4``-like labels; ``KV`` may be left out (16)."""
        match = re.fullmatch(r"W(\d+)A(\d+)(?:KV(\d+))?", label.strip().upper())
        if match is None:
            raise QuotaError(f"bits {label!r} do not read like W4A4KV4")
        weight, activation, kv = (int(group) if group else 16 for group in match.groups())
        return cls(
            method="none" if weight == kv == 16 else method,
            weight_bits=weight,
            activation_bits=activation,
            kv_bits=kv,
            modules=modules,
        )

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> QuantizationConfig:
        fields = dict(data)
        fields["modules"] = tuple(fields.get("modules", MODULES))
        return build(cls, fields, "quantization config")


QuantizationConfig.none = QuantizationConfig()
