"""Folders like those of the shipped small models, of a few untrained layers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from converters.export_params import write_params
from quota_jax.testbed.learning.models import init_params, model_params, tiny_model
from quota_jax.testbed.learning.processor import folder_files, special_ids


def write_untrained(folder: Path, family: str, *, num_layers: int) -> Path:
    """Writes a Hugging Face folder with the real vocabulary, templates and picture sizes."""
    config = tiny_model(family)
    text = dataclasses.replace(config.text, num_layers=num_layers)
    config = dataclasses.replace(config, text=text)
    folder.mkdir(parents=True)
    params = model_params(init_params(config, 1))
    write_params(folder, params, config, text_fields=special_ids(family))
    for name, content in folder_files(family).items():
        (folder / name).write_bytes(content)
    return folder
