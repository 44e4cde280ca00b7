"""What config.json says about weights that are already quantized to four bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quota_jax.errors import QuotaError

CONFIG_KEYS = ("quantization_config", "compression_config")


@dataclass(frozen=True, kw_only=True, slots=True)
class Scheme:
    """How quantized matrices are stored.

    layout: "awq" (GEMM), "gptq" or "compressed-tensors" (pack-quantized). method: what
    ``QuantizationConfig`` calls it. group: input channels of a group, 0 for whole rows.
    zero_offset: what is added to stored zero points (1 in the first GPTQ format).
    """

    layout: str
    group: int
    zero_offset: int = 0

    @property
    def method(self) -> str:
        return self.layout


def split_config(content: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, Any] | None]:
    """config.json without any quantization, and (key, section) of the first that it has."""
    found: list[tuple[str, Any]] = []

    def without(part: Mapping[str, Any]) -> dict[str, Any]:
        found.extend((key, part[key]) for key in CONFIG_KEYS if part.get(key) is not None)
        return {key: value for key, value in part.items() if key not in CONFIG_KEYS}

    plain = without(content)
    for key, value in plain.items():
        if isinstance(value, Mapping):
            plain[key] = without(value)
    return plain, found[0] if found else None


def parse_scheme(section: Any) -> Scheme:
    """The scheme of a quantization section.

    Raises:
      QuotaError: another method, other bits, or options that no 4-bit weights with 16-bit
        activations have; the text continues a sentence.
    """
    if not isinstance(section, Mapping):
        raise QuotaError(f"is {type(section).__name__}, not an object")
    method = section.get("quant_method")
    if method in ("awq", "gptq"):
        bits = section.get("bits", section.get("w_bit"))
        if bits != 4 or isinstance(bits, bool):
            raise QuotaError(f"bits are {bits!r}; only 4 is read")
        group = _group(section.get("group_size", section.get("q_group_size")))
        if method == "awq":
            version = str(section.get("version", "gemm")).lower()
            if version != "gemm":
                raise QuotaError(f"version is {version!r}; only 'gemm' is read")
            return Scheme(layout="awq", group=group)
        stored = section.get("checkpoint_format") or "gptq"
        if stored not in ("gptq", "gptq_v2") or section.get("is_marlin_format"):
            raise QuotaError(f"checkpoint_format is {stored!r}; only 'gptq', 'gptq_v2' are read")
        return Scheme(layout="gptq", group=group, zero_offset=int(stored == "gptq"))
    if method == "compressed-tensors" or (method is None and "config_groups" in section):
        return _compressed_tensors(section)
    raise QuotaError("only awq, gptq and compressed-tensors are read")


def _compressed_tensors(section: Mapping[str, Any]) -> Scheme:
    for key in ("kv_cache_scheme", "transform_config", "sparsity_config"):
        value = section.get(key)
        if value and not (isinstance(value, Mapping) and value.get("format") == "dense"):
            raise QuotaError(f"{key} is not supported")
    groups = section.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise QuotaError("config_groups is missing")
    schemes = {_weights(section, group) for group in groups.values()}
    if len(schemes) > 1:
        raise QuotaError("config_groups differ in their weights; only one kind is read")
    return schemes.pop()


def _weights(section: Mapping[str, Any], group: Any) -> Scheme:
    """One entry of config_groups."""
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping):
        raise QuotaError("an entry of config_groups has no weights")
    stored = group.get("format") or section.get("format")
    if stored != "pack-quantized":
        raise QuotaError(f"format is {stored!r}; only 'pack-quantized' is read")
    for key in ("input_activations", "output_activations"):
        if group.get(key) is not None:
            raise QuotaError(f"{key} are quantized; only 16-bit activations are read")
    bits, kind = weights.get("num_bits"), weights.get("type", "int")
    if bits != 4 or isinstance(bits, bool) or kind != "int":
        raise QuotaError(
            f"weights have {bits!r} bits of type {kind!r}; only 4 bits of int are read"
        )
    strategy = weights.get("strategy") or ("group" if weights.get("group_size") else "channel")
    if strategy not in ("group", "channel"):
        raise QuotaError(f"strategy is {strategy!r}; only 'group' and 'channel' are read")
    size = weights.get("group_size") if strategy == "group" else -1
    return Scheme(layout="compressed-tensors", group=_group(size))


def _group(size: Any) -> int:
    """Input channels of a group; -1 stands for whole rows."""
    if isinstance(size, bool) or not isinstance(size, int) or (size < 1 and size != -1):
        raise QuotaError(f"group_size is {size!r}; it must be -1 or positive")
    return max(size, 0)
