"""Reading and checking single fields of configurations."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from quota_jax.errors import QuotaError

ACTIVATIONS = ("gelu", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu")
T = TypeVar("T")


def build(cls: type[T], fields: Mapping[str, Any], what: str) -> T:
    """Constructs a config class from JSON fields; unknown, missing or unusable fields are named."""
    known = {field.name for field in dataclasses.fields(cls)}  # pyrefly: ignore
    if unknown := sorted(set(fields) - known):
        raise QuotaError(f"{what}: unknown field {unknown[0]!r}")
    try:
        return cls(**fields)
    except (TypeError, ValueError) as error:
        raise QuotaError(f"{what}: {error}") from None


def section(data: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The object ``data[name]``."""
    found = data.get(name)
    if not isinstance(found, Mapping):
        raise QuotaError(f"config has no {name!r} section")
    return found


def integer(data: Mapping[str, Any], name: str, default: int) -> int:
    """``data[name]``, or the default where it is absent or null."""
    value = data.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int):
        raise QuotaError(f"config field {name!r} must be an integer, got {value!r}")
    return value


def integers(data: Mapping[str, Any], name: str, default: tuple[int, ...]) -> tuple[int, ...]:
    """The list of integers ``data[name]``, or the default where it is absent or null."""
    value = data.get(name)
    if value is None:
        return default
    if not isinstance(value, list | tuple) or not all(type(item) is int for item in value):
        raise QuotaError(f"config field {name!r} must be a list of integers, got {value!r}")
    return tuple(value)


def check_positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise QuotaError(f"config field {name!r} must be a positive integer, got {value!r}")


def check_activation(name: str) -> None:
    if name not in ACTIVATIONS:
        raise QuotaError(f"activation {name!r} is not supported; known: {ACTIVATIONS}")
