"""What is quantized, to how many bits, and by which method (static, hashable, stored as JSON)."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from quota_jax.config import build
from quota_jax.errors import QuotaError
from quota_jax.quant.groups import Groups

MODULES = ("vision", "projector", "decoder")
METHODS = (
    "none",
    "rtn",
    "smoothquant",
    "flatquant",
    "gptq",
    "flatquant+gptq",
    "awq",
    "compressed-tensors",
)
SCALE_DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizationConfig:
    """Bits of weights, activations and KV cache; 16 means the stored floating-point dtype.

    Weights: symmetric per output channel. Activations: dynamic symmetric per token. Keys and
    values: asymmetric per token per head. Embeddings, patch embedding, norms and the head are never
    quantized. ``modules`` says which of vision tower, projector and decoder have quantized
    linears; the KV cache belongs to the decoder and follows ``kv_bits`` alone. Under method
    "flatquant" a quantized linear also holds two small matrices that transform its input and, where
    activations are quantized, two clipping factors. "compressed-tensors" says where weights were
    read from, where their method is not known.

    With 16-bit activations weights may have a scale for each ``group`` of input channels (0: for
    each output channel), and zero points (not ``symmetric``). Such scales are stored in
    ``scale_dtype``; None is the dtype of the model's other matrices. ``act_order``: a stored index
    says which group an input channel belongs to (GPTQ). ``input_scales`` names the linears that
    multiply their input by a stored scale of each channel (AWQ, where no layer before can).
    """

    method: str = "none"
    weight_bits: int = 16
    activation_bits: int = 16
    kv_bits: int = 16
    modules: tuple[str, ...] = MODULES
    group: int = 0
    symmetric: bool = True
    scale_dtype: str | None = None
    act_order: bool = False
    input_scales: tuple[str, ...] = ()

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
        if self.method not in ("none", "rtn") and self.weight_bits == 16:
            raise QuotaError(f"method {self.method!r} needs quantized weights (4 or 8 bits)")
        if self.method == "none" and not self.is_none:
            raise QuotaError(f"method 'none' cannot carry {self.label}")
        self._check_groups()

    def _check_groups(self) -> None:
        if self.group < 0:
            raise QuotaError(f"group must be a number of input channels, got {self.group}")
        grouped = self.group > 0 or not self.symmetric
        if (grouped or self.act_order) and (self.activation_bits < 16 or self.weight_bits == 16):
            raise QuotaError(
                f"W{self.weight_bits}A{self.activation_bits} has one symmetric scale for each "
                "output channel: groups and zero points need W4A16 or W8A16"
            )
        if not self.symmetric and self.weight_bits != 4:
            raise QuotaError("zero points are supported for 4-bit weights only")
        if grouped and self.has_transforms:
            raise QuotaError(f"method {self.method!r} has no group scales and no zero points")
        if self.act_order and not self.group:
            raise QuotaError("act_order needs groups")
        if self.method == "awq" and self.activation_bits < 16:
            raise QuotaError("method 'awq' quantizes weights only: give W4A16 or W8A16")
        if self.input_scales and self.method != "awq":
            raise QuotaError(f"input_scales belong to method 'awq', not {self.method!r}")
        if self.scale_dtype not in (None, *SCALE_DTYPES):
            raise QuotaError(f"scale_dtype {self.scale_dtype!r} is unknown; known: {SCALE_DTYPES}")
        if self.scale_dtype is not None and not grouped:
            raise QuotaError("scales of output channels are float32: scale_dtype needs groups")

    @property
    def is_none(self) -> bool:
        return self.weight_bits == 16 and self.kv_bits == 16

    @property
    def label(self) -> str:
        """For example ``W4A8KV4``, or ``W4A16KV16G128`` with groups of 128."""
        group = f"G{self.group}" if self.group else ""
        return f"W{self.weight_bits}A{self.activation_bits}KV{self.kv_bits}{group}"

    @property
    def groups(self) -> Groups | None:
        """The grid of weights with group scales or zero points; None for plain output channels."""
        if not self.group and self.symmetric:
            return None
        return Groups(
            bits=self.weight_bits,
            size=self.group,
            symmetric=self.symmetric,
            scale_dtype=self.scale_dtype,
        )

    @property
    def grid(self) -> Groups:
        """The grid of any quantized weight."""
        return self.groups or Groups(bits=self.weight_bits, scale_dtype="float32")

    @property
    def has_transforms(self) -> bool:
        """Whether quantized linears transform their input (FlatQuant)."""
        return self.method.startswith("flatquant")

    def quantizes(self, module: str) -> bool:
        """Whether the linears of ``module`` are stored in integers."""
        return self.weight_bits < 16 and module in self.modules

    @classmethod
    def parse(
        cls,
        label: str,
        *,
        method: str = "rtn",
        modules: tuple[str, ...] = MODULES,
        symmetric: bool = True,
    ) -> QuantizationConfig:
        """Reads ``W4A4KV4``-like labels; ``KV`` may be left out (16), and ``G128`` for groups."""
        match = re.fullmatch(r"W(\d+)A(\d+)(?:KV(\d+))?(?:G(\d+))?", label.strip().upper())
        if match is None:
            raise QuotaError(f"bits {label!r} do not read like W4A4KV4 or W4A16G128")
        weight, activation, kv = (int(bits) if bits else 16 for bits in match.groups()[:3])
        return cls(
            method="none" if weight == kv == 16 else method,
            weight_bits=weight,
            activation_bits=activation,
            kv_bits=kv,
            modules=modules,
            group=int(match[4] or 0),
            symmetric=symmetric,
        )

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> QuantizationConfig:
        fields = dict(data)
        for name, default in (("modules", MODULES), ("input_scales", ())):
            fields[name] = tuple(fields.get(name, default))
        return build(cls, fields, "quantization config")


QuantizationConfig.none = QuantizationConfig()
