"""What `convert` and `export_hf` owe every model family, on its tiny checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from converters import convert, export_hf
from quota_jax.checkpoint import open_checkpoint
from quota_jax.errors import QuotaError
from tests import tiny_models, tiny_qwen
from tests.tiny_tensors import (
    DTYPES,
    assert_same_tensors,
    load_oracle,
    read_folder,
    write_tensors,
)

Tensors = dict[str, np.ndarray]
BUFFERS = ("position_ids", "inv_freq")


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """The tiny checkpoints of one model family; `spec` is the class of their specs."""

    spec: Any
    write: Callable[..., Path]
    config: Callable[[Any], dict[str, Any]]
    tensors: Callable[[Any], Tensors]
    layout_name: Callable[[str, str], str]


LLAVA = Family(
    spec=tiny_models.TinyLlava,
    write=tiny_models.write_tiny_llava,
    config=tiny_models.hf_config,
    tensors=tiny_models.hf_tensors,
    layout_name=tiny_models.layout_name,
)
QWEN = Family(
    spec=tiny_qwen.TinyQwen,
    write=tiny_qwen.write_tiny_qwen,
    config=tiny_qwen.hf_config,
    tensors=tiny_qwen.hf_tensors,
    layout_name=tiny_qwen.layout_name,
)


def check_round_trip(tmp_path: Path, family: Family, **fields: Any) -> None:
    """Tensors come back bit for bit under their names, other files unchanged, nothing else."""
    source = family.write(tmp_path / "hf", **fields)
    checkpoint = convert(source, tmp_path / "qj")
    back = export_hf(checkpoint, tmp_path / "back")
    assert_same_tensors(read_folder(source), read_folder(back), ignore=BUFFERS)
    for file in source.iterdir():
        if file.name == "config.json":
            assert json.loads((back / file.name).read_text()) == json.loads(file.read_text())
        elif ".safetensors" not in file.name:
            assert (back / file.name).read_bytes() == file.read_bytes(), file.name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "hf", "qj"]


def check_cast(tmp_path: Path, family: Family, wanted: str, **fields: Any) -> None:
    """All tensors are rounded to nearest even, and config.json names the new dtype."""
    spec = family.spec(**fields)
    checkpoint = convert(family.write(tmp_path / "hf", spec), tmp_path / "qj", dtype=wanted)
    assert open_checkpoint(checkpoint).dtype == DTYPES[wanted]
    back = export_hf(checkpoint, tmp_path / "back")
    expected = {name: array.astype(DTYPES[wanted]) for name, array in family.tensors(spec).items()}
    assert_same_tensors(expected, read_folder(back))
    config = json.loads((back / "config.json").read_text())
    key = "torch_dtype" if spec.old_config else "dtype"
    assert config == {**family.config(spec), key: wanted}


def check_layout_change(tmp_path: Path, family: Family, stored: str, wanted: str) -> None:
    """A checkpoint that came in one layout is written in another."""
    spec = family.spec(layout=stored, num_layers=1, vision_layers=2)
    checkpoint = convert(family.write(tmp_path / "hf", spec), tmp_path / "qj")
    back = export_hf(checkpoint, tmp_path / "back", layout=wanted)
    assert_same_tensors(family.tensors(replace(spec, layout=wanted)), read_folder(back))


def check_transformers_loads(tmp_path: Path, family: Family, **fields: Any) -> None:
    """No missing, unexpected or mismatched key (`load_oracle` asserts it); the source's values."""
    spec = family.spec(**fields)
    source = family.write(tmp_path / "hf", spec)
    back = export_hf(convert(source, tmp_path / "qj"), tmp_path / "back", max_shard_size=60_000)
    found = load_oracle(back).state_dict()
    expected = family.tensors(spec)
    for name in family.tensors(replace(spec, layout="saved", buffers=False)):
        loaded = found[family.layout_name(name, "memory")].numpy()
        np.testing.assert_array_equal(
            loaded,
            expected[family.layout_name(name, spec.layout)].astype(np.float32),
            err_msg=name,
        )


def refuse(source: Path, match: str, **options: Any) -> str:
    """`convert` fails with one matching line and leaves nothing behind; returns the line."""
    out = source.parent / "out"
    with pytest.raises(QuotaError, match=match) as caught:
        convert(source, out, **options)
    assert list(source.parent.iterdir()) == [source]
    message = str(caught.value)
    assert "\n" not in message
    return message


def changed(
    tmp_path: Path, change: Callable[[Tensors], object], family: Family = LLAVA, **fields: Any
) -> Path:
    """A checkpoint folder whose tensors went through `change`."""
    spec = family.spec(**fields)
    folder = family.write(tmp_path / "hf", spec)
    tensors = family.tensors(spec)
    change(tensors)
    write_tensors(folder, tensors)
    return folder


def change_config(folder: Path, section: str | None = None, **fields: Any) -> Path:
    """Replaces fields of a folder's config.json, or of a section of it."""
    config = json.loads((folder / "config.json").read_text())
    (config if section is None else config[section]).update(fields)
    (folder / "config.json").write_text(json.dumps(config))
    return folder
