"""Speed, memory and power of a model at its real shape.

``shapes`` makes models with random weights and prompts for them, ``programs`` compiles them,
``measurement`` times them; ``work`` and ``roofline`` say how fast the device could be at best,
``first_answer`` times a process from its start, ``peer`` runs another library. With random weights
shapes, bytes and times are real, answers are not.
"""

from quota_jax.bench.measurement import BenchResult, filled_state, measure, measure_decoding
from quota_jax.bench.shapes import example_batch, find_preset, random_model

__all__ = [
    "BenchResult",
    "example_batch",
    "filled_state",
    "find_preset",
    "measure",
    "measure_decoding",
    "random_model",
]
