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
    "luq",
    "grace",
    "compressed-tensors",
)
WEIGHT_BITS = (2, 3, 4, 8, 16)
SCALE_DTYPES = ("float32", "float16", "bfloat16")
KEY_QUANTIZATIONS = ("token", "channel")
OUTPUT_TRANSFORMS = ("kronecker", "heads")


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizationConfig:
    """Bits of weights, activations and KV cache; 16 means the stored floating-point dtype.

    Weights: symmetric per output channel. Activations: dynamic symmetric per token. Keys and
    values: asymmetric per token per head. Patch and position embeddings and norms are never
    quantized; ``embedding_bits`` and ``head_bits`` are those of token embeddings and output head, 8
    with one scale for each entry of the vocabulary. ``modules`` says which of vision tower,
    projector and decoder have quantized linears; the KV cache belongs to the decoder and follows
    ``kv_bits`` alone. Under method "flatquant" a quantized linear also holds two small matrices
    that transform its input and, where activations are quantized, two clipping factors.
    "compressed-tensors" says where weights were read from, where their method is not known.

    With 16-bit activations weights may have a scale for each ``group`` of input channels (0: for
    each output channel), and zero points (not ``symmetric``). Such scales are stored in
    ``scale_dtype``; None is the dtype of the model's other matrices. ``act_order``: a stored index
    says which group an input channel belongs to (GPTQ). ``input_scales`` names the linears that
    multiply their input by a stored scale of each channel (AWQ, where no layer before can).

    Weights of 2 and 3 bits are stored as 4-bit ones: only their grid is coarser. ``layer_bits`` are
    the weights' bits in each decoder layer (LUQ); ``weight_bits`` is then 4, those of the other
    modules.

    ``key_quantization``: keys of a cache in less than 16 bits get their scales by "token", after
    rotation, or by "channel", before it (KVQuant), from stored ranges. FlatQuant has more:
    ``output_transform`` of the output projections' inputs is a "kronecker" product over all
    features, or mixes whole "heads" (P_o; P_v is folded into the weights). With ``key_transform``
    (P_k) rotated keys are transformed before they are quantized, and queries inversely;
    with ``cache_clip`` ranges of keys and values are cut by stored factors.
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
    embedding_bits: int = 16
    head_bits: int = 16
    layer_bits: tuple[int, ...] = ()
    key_quantization: str = "token"
    output_transform: str = "kronecker"
    key_transform: bool = False
    cache_clip: bool = False

    none: ClassVar[QuantizationConfig]

    def __post_init__(self):
        if self.method not in METHODS:
            raise QuotaError(f"quantization method {self.method!r} is unknown; known: {METHODS}")
        for name, known in (
            ("weight_bits", WEIGHT_BITS),
            ("activation_bits", (4, 8, 16)),
            ("kv_bits", (4, 8, 16)),
            ("embedding_bits", (8, 16)),
            ("head_bits", (8, 16)),
        ):
            if getattr(self, name) not in known:
                listed = f"{', '.join(map(str, known[:-1]))} or {known[-1]}"
                raise QuotaError(f"{name} must be {listed}, got {getattr(self, name)}")
        if self.weight_bits == 16 and self.activation_bits != 16:
            raise QuotaError(
                f"W16A{self.activation_bits} is not supported: quantized activations need "
                "quantized weights"
            )
        if unknown := [module for module in self.modules if module not in MODULES]:
            raise QuotaError(f"unknown module {unknown[0]!r}; known: {MODULES}")
        if self.method not in ("none", "rtn") and self.weight_bits == 16:
            raise QuotaError(f"method {self.method!r} needs quantized weights (8 bits or fewer)")
        if self.method == "none" and not self.is_none:
            raise QuotaError(f"method 'none' cannot carry {self.label}")
        self._check_groups()
        self._check_layers()
        self._check_cache()

    def _check_cache(self) -> None:
        for name, known in (
            ("key_quantization", KEY_QUANTIZATIONS),
            ("output_transform", OUTPUT_TRANSFORMS),
        ):
            if getattr(self, name) not in known:
                raise QuotaError(f"{name} {getattr(self, name)!r} is unknown; known: {known}")
        if self.output_transform != "kronecker" and not self.has_transforms:
            raise QuotaError(f"output_transform belongs to 'flatquant', not {self.method!r}")
        for name in ("key_transform", "cache_clip"):
            if getattr(self, name) and not (self.has_transforms and self.kv_bits < 16):
                raise QuotaError(f"{name} belongs to method 'flatquant' with KV4 or KV8")
        if self.key_quantization == "channel":
            if self.kv_bits == 16:
                raise QuotaError("keys by channel need a cache of 4 or 8 bits (KV4 or KV8)")
            if self.key_transform:
                raise QuotaError(
                    "key_transform changes keys after their rotation, keys by channel are "
                    "quantized before it: give one of them"
                )

    def _check_layers(self) -> None:
        if self.method == "luq" and (self.weight_bits != 4 or "decoder" not in self.modules):
            raise QuotaError("method 'luq' needs 4-bit weights, of the decoder among others")
        if self.layer_bits and self.method != "luq":
            raise QuotaError(f"layer_bits belong to method 'luq', not {self.method!r}")
        if unknown := [bits for bits in self.layer_bits if bits not in (2, 3, 4)]:
            raise QuotaError(f"a layer of method 'luq' has 2, 3 or 4 bits, not {unknown[0]}")

    def _check_groups(self) -> None:
        if self.group < 0:
            raise QuotaError(f"group must be a number of input channels, got {self.group}")
        grouped = self.group > 0 or not self.symmetric
        if (grouped or self.act_order) and (self.activation_bits < 16 or self.weight_bits == 16):
            raise QuotaError(
                f"W{self.weight_bits}A{self.activation_bits} has one symmetric scale for each "
                "output channel: groups and zero points need W4A16 or W8A16"
            )
        if not self.symmetric and self.weight_bits > 4:
            raise QuotaError("zero points are supported for 2- to 4-bit weights only")
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
        bits = (self.weight_bits, self.kv_bits, self.embedding_bits, self.head_bits)
        return set(bits) == {16}

    @property
    def label(self) -> str:
        """For example ``W4A8KV4``, ``W4A16KV16G128`` with groups of 128, or ``W4A4KV4E8H8`` with
        8-bit embeddings and head."""
        group = f"G{self.group}" if self.group else ""
        embedding = f"E{self.embedding_bits}" if self.embedding_bits < 16 else ""
        head = f"H{self.head_bits}" if self.head_bits < 16 else ""
        bits = f"W{self.weight_bits}A{self.activation_bits}KV{self.kv_bits}"
        return bits + group + embedding + head

    @property
    def table_bits(self) -> dict[str, int]:
        """Bits of the parameters with one row for each entry of the vocabulary."""
        return {"decoder.embed": self.embedding_bits, "decoder.head": self.head_bits}

    @property
    def has_integers(self) -> bool:
        """Whether any parameters are stored in integers."""
        return self.weight_bits < 16 or 8 in self.table_bits.values()

    @property
    def packs(self) -> bool:
        """Whether two weights share a byte: those of 4 bits and fewer."""
        return self.weight_bits <= 4

    def at(self, block: str) -> QuantizationConfig:
        """What a checkpoint block by itself is quantized by: under ``layer_bits`` a decoder layer
        has its own ``weight_bits``."""
        if self.method != "luq":
            return self
        bits, (kind, _, rest) = self.weight_bits, block.partition("_layer_")
        if kind == "decoder" and rest and self.layer_bits:
            bits = self.layer_bits[int(rest)]
        return dataclasses.replace(self, method="gptq", weight_bits=bits, layer_bits=())

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

    @property
    def has_cache_parameters(self) -> bool:
        """Whether decoder layers hold something of their cache: P_k, clipping, ranges of keys."""
        return self.key_transform or self.cache_clip or self.key_quantization == "channel"

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
        """Reads ``W4A4KV4``-like labels; ``KV`` may be left out (16), and so may ``G128`` for
        groups, ``E8`` for 8-bit token embeddings and ``H8`` for an 8-bit head."""
        pattern = r"W(\d+)A(\d+)(?:KV(\d+))?(?:G(\d+))?(?:E(\d+))?(?:H(\d+))?"
        match = re.fullmatch(pattern, label.strip().upper())
        if match is None:
            raise QuotaError(f"bits {label!r} do not read like W4A4KV4 or W4A16G128")
        weight, activation, kv = (int(bits) if bits else 16 for bits in match.groups()[:3])
        embedding, head = (int(bits or 16) for bits in match.groups()[4:])
        return cls(
            method="none" if {weight, kv, embedding, head} == {16} else method,
            weight_bits=weight,
            activation_bits=activation,
            kv_bits=kv,
            modules=modules,
            group=int(match[4] or 0),
            symmetric=symmetric,
            embedding_bits=embedding,
            head_bits=head,
        )

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> QuantizationConfig:
        fields = dict(data)
        for name, default in (("modules", MODULES), ("input_scales", ()), ("layer_bits", ())):
            fields[name] = tuple(fields.get(name, default))
        return build(cls, fields, "quantization config")


QuantizationConfig.none = QuantizationConfig()
