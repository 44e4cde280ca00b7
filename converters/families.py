"""Which rule table belongs to which model, and the checks on a Hugging Face config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from converters.llava_rules import LLAVA_RULES
from converters.qwen2_5_vl_rules import QWEN_RULES
from converters.rules import RuleTable
from converters.sources import Source
from quota_jax.config import ModelConfig, config_from_hf
from quota_jax.errors import QuotaError

_TABLES: dict[str, RuleTable] = {"llava": LLAVA_RULES, "qwen2_5_vl": QWEN_RULES}
_QUANTIZED = ("quantization_config", "compression_config")
_HEAD_COPY = "+lm_head"


def rules_of(config: ModelConfig) -> RuleTable:
    """The rule table of a model family."""
    return _TABLES[config.model_type]


def read_config(source: Source) -> tuple[dict[str, Any], ModelConfig]:
    """config.json as it is and as a model configuration.

    Quantized checkpoints, unknown model types and unusable values are refused, naming the file.
    """
    content = source.read_json("config.json")
    sections = [content, *(part for part in content.values() if isinstance(part, Mapping))]
    for section in sections:
        for key in _QUANTIZED:
            if section.get(key) is not None:
                method = (
                    section[key].get("quant_method") if isinstance(section[key], dict) else None
                )
                raise QuotaError(
                    f"{source.folder / 'config.json'} has {key} ({method or 'unnamed method'}): "
                    "quantized checkpoints are not read in this version; give the original weights"
                )
    try:
        return content, config_from_hf(content)
    except QuotaError as error:
        raise QuotaError(f"{source.folder / 'config.json'}: {error}") from None
    except (TypeError, ValueError, AttributeError) as error:  # a field of another type
        raise QuotaError(f"{source.folder / 'config.json'} is not usable: {error}") from None


def layout_label(layout: str, head_copy: bool) -> str:
    """What a checkpoint remembers of its source: layout, and whether it repeats a tied head."""
    return layout + _HEAD_COPY if head_copy else layout


def parse_layout(label: str | None) -> tuple[str, bool]:
    """The inverse of `layout_label`; None, a model that was made here, becomes "saved"."""
    name = label or "saved"
    return name.removesuffix(_HEAD_COPY), name.endswith(_HEAD_COPY)
