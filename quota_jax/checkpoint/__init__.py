"""The checkpoint folder: written block by block, resumable, renamed into place once complete.

This package is the only place that knows Orbax. ``format`` says what lies where, ``writer`` and
``reader`` are the two sides, ``stacking`` fills the device buffers of a model.
"""

from quota_jax.checkpoint.format import FORMAT_VERSION, PARTIAL_SUFFIX
from quota_jax.checkpoint.reader import Checkpoint, Sizes, open_checkpoint, set_recipe
from quota_jax.checkpoint.writer import CheckpointWriter

__all__ = [
    "FORMAT_VERSION",
    "PARTIAL_SUFFIX",
    "Checkpoint",
    "CheckpointWriter",
    "Sizes",
    "open_checkpoint",
    "set_recipe",
]
