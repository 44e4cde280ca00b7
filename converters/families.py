"""Which rule table belongs to which model, and the checks on a Hugging Face config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from converters.llava_rules import LLAVA_RULES
from converters.quantized_config import Scheme, parse_scheme, split_config
from converters.qwen2_5_vl_rules import QWEN_RULES
from converters.rules import RuleTable
from converters.sources import Source
from quota_jax.config import ModelConfig, config_from_hf
from quota_jax.errors import QuotaError

_TABLES: dict[str, RuleTable] = {"llava": LLAVA_RULES, "qwen2_5_vl": QWEN_RULES}
_HEAD_COPY = "+lm_head"


def rules_of(config: ModelConfig) -> RuleTable:
    """The rule table of a model family."""
    return _TABLES[config.model_type]


def read_config(source: Source) -> tuple[dict[str, Any], ModelConfig]:
    """config.json as it is and as a model configuration.

    Quantized checkpoints, unknown model types and unusable values are refused, naming the file.
    """
    content, config, scheme = read_any_config(source)
    if scheme is not None:
        raise QuotaError(
            f"{source.folder / 'config.json'} describes quantized weights ({scheme.method}); give "
            "the original ones"
        )
    return content, config


def read_any_config(source: Source) -> tuple[dict[str, Any], ModelConfig, Scheme | None]:
    """config.json without its quantization, the model's configuration, and how matrices are
    quantized (None: not at all)."""
    where = source.folder / "config.json"
    content, found = split_config(source.read_json("config.json"))
    scheme = None
    if found is not None:
        key, section = found
        method = section.get("quant_method") if isinstance(section, Mapping) else None
        try:
            scheme = parse_scheme(section)
        except QuotaError as error:
            raise QuotaError(f"{where} has {key} ({method or 'unnamed method'}): {error}") from None
    try:
        return content, config_from_hf(content), scheme
    except QuotaError as error:
        raise QuotaError(f"{where}: {error}") from None
    except (TypeError, ValueError, AttributeError) as error:  # a field of another type
        raise QuotaError(f"{where} is not usable: {error}") from None


def layout_label(layout: str, head_copy: bool) -> str:
    """What a checkpoint remembers of its source: layout, and whether it repeats a tied head."""
    return layout + _HEAD_COPY if head_copy else layout


def parse_layout(label: str | None) -> tuple[str, bool]:
    """The inverse of `layout_label`; None, a model that was made here, becomes "saved"."""
    name = label or "saved"
    return name.removesuffix(_HEAD_COPY), name.endswith(_HEAD_COPY)
