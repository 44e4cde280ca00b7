"""GRACE (arXiv 2601.22709): fine-tunes a quantized student on the full-precision model's answers.

Quantization-aware training with learned scales (LSQ). The loss is

    CE + beta GDKD + omega RCKA

with the cross entropy of the targets, gated decoupled distillation from the teacher's logits (beta
follows a controller) and the alignment of visual tokens with the teacher's in the penultimate
decoder layer. The student's forward is the integer simulation of what is deployed: quantized
activations and KV cache too, where the paper quantizes the weights of the language model only, and
pruned as a recipe says. The teacher reads all tokens.

Teacher, float32 master parameters, their gradients and two moments are all in device memory at
once, about 20 bytes a parameter and the activations: models of up to some hundred million
parameters on one GPU. A 7B model needs more memory than one GPU has.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from quota_jax.checkpoint import Checkpoint, CheckpointWriter, open_checkpoint
from quota_jax.errors import QuotaError
from quota_jax.models.params import check_quantization, flatten_params
from quota_jax.processing import Processor
from quota_jax.quant.calibration_data import Sample, digest
from quota_jax.quant.grace_data import Targets, make_training_batches
from quota_jax.quant.grace_options import GraceOptions
from quota_jax.quant.grace_state import load_state, save_state
from quota_jax.quant.grace_step import METRICS, State, Task, simulated_params, train_step
from quota_jax.quant.grace_student import Student, host
from quota_jax.quantization import QuantizationConfig
from quota_jax.recipe import Recipe

__all__ = ["METRICS", "GraceOptions", "finetune"]


def finetune(
    source: str | Path,
    out: str | Path,
    quantization: QuantizationConfig,
    samples: Sequence[Sample],
    *,
    options: GraceOptions | None = None,
    recipe: Recipe | None = None,
    save_every: int = 100,
    progress: Callable[[int, int, Mapping[str, float]], None] | None = None,
) -> list[dict[str, float]]:
    """Trains a student of the full-precision checkpoint ``source`` and writes it to ``out``.

    A killed run leaves ``out``.partial with the last saved state; the same call goes on from there
    and ends with the same arrays (same machine and versions).

    Args:
      quantization: of method "grace".
      recipe: what the student prunes while it learns; it is stored with the result. None: nothing,
        and the source's recipe is stored.
      save_every: steps between saved states.
      progress: called with (steps done, steps in all, metrics) after each step.

    Returns:
      The metrics of every step, see METRICS.

    Raises:
      QuotaError: the source is quantized; the quantization, the recipe or the samples do not suit;
        the loss is not finite.
    """
    options = options or GraceOptions()
    checkpoint = open_checkpoint(source)
    quantization = _checked(checkpoint, quantization, recipe, options)
    if save_every < 1:
        raise QuotaError(f"save_every must be at least 1, got {save_every}")
    if not samples:
        raise QuotaError("fine-tuning needs samples")
    processor = Processor.from_folder(checkpoint.assets_dir, checkpoint.config)
    batches = make_training_batches(processor, samples, options.batch_size, options.targets)
    task = Task(
        config=checkpoint.config,
        student=Student(
            quantization=quantization,
            learned=options.modules(quantization),
            dtype=checkpoint.dtype.name,
        ),
        options=options,
        recipe=(recipe or Recipe.none(checkpoint.config.text.num_layers)).canonical(),
    )
    told = {
        "method": "grace",
        "options": dataclasses.asdict(options) | {"learned": task.student.learned},
        "samples": len(samples),
        "data": digest(samples),
    }
    if recipe is not None:
        told["recipe"] = recipe.to_json()
    told = json.loads(json.dumps(told))
    with CheckpointWriter(
        out,
        config=checkpoint.config,
        quantization=quantization,
        recipe=recipe or checkpoint.recipe,
        provenance={**checkpoint.provenance, "calibration": told},
        assets={
            path.name: path.read_bytes()
            for path in sorted(Path(checkpoint.assets_dir).iterdir())
            if path.is_file()
        },
        fingerprint=_fingerprint(checkpoint, quantization, told),
        hf_config=checkpoint.hf_config,
        hf_layout=checkpoint.hf_layout,
    ) as writer:
        params, history = _train(checkpoint, writer, task, batches, save_every, progress)
        for name in checkpoint.block_names:
            if name in writer.finished:
                continue
            number = name.rpartition("_")[2]
            layer = int(number) if number.isdigit() else None
            block = task.student.pack(checkpoint.read_block(name), params, layer)
            writer.write_block(name, block)
        writer.finish()
    return [dict(zip(METRICS, map(float, row), strict=True)) for row in history]


def _train(
    checkpoint: Checkpoint,
    writer: CheckpointWriter,
    task: Task,
    batches: list[tuple[Any, Targets]],
    save_every: int,
    progress: Callable[[int, int, Mapping[str, float]], None] | None,
) -> tuple[dict[str, np.ndarray], list[list[float]]]:
    """All steps that a saved state does not have; the simulated student on the host."""
    options = task.options
    stored = flatten_params(checkpoint.load_model())
    learned, kept = task.student.begin(host(stored), options.start)
    # The teacher computes in float32, as the student does, with the stored values.
    teacher = {name: jnp.asarray(value, jnp.float32) for name, value in stored.items()}
    del stored
    zero = jnp.zeros((), jnp.float32)
    state = State(
        learned=learned,
        optimizer=options.optimizer().init(learned),
        beta=zero + jnp.clip(options.beta, *options.beta_bounds),
        average=zero,
        step=jnp.zeros((), jnp.int32),
    )
    state, history = load_state(writer, state)
    for step in range(len(history), options.steps):
        batch, targets = batches[_place(step, len(batches), options.seed)]
        state, found = train_step(state, kept, teacher, batch, targets, task=task)
        metrics = {name: float(found[name]) for name in METRICS}
        if not math.isfinite(metrics["loss"]):
            raise QuotaError(f"fine-tuning diverged: the loss of step {step + 1} is not finite")
        history.append(list(metrics.values()))
        done = step + 1
        if done % save_every == 0 or done == options.steps:
            save_state(writer, state, history)
        if progress:
            progress(done, options.steps, metrics)
    return host(simulated_params(state.learned, kept, task=task)), history


def _place(step: int, count: int, seed: int) -> int:
    """Which batch a step reads: another order in each pass."""
    order = np.random.default_rng([seed, step // count]).permutation(count)
    return int(order[step % count])


def _checked(
    checkpoint: Checkpoint,
    quantization: QuantizationConfig,
    recipe: Recipe | None,
    options: GraceOptions,
) -> QuantizationConfig:
    """The quantization with the dtype of group scales; refuses what cannot be trained."""
    if not checkpoint.quantization.is_none:
        raise QuotaError(
            f"{checkpoint.path} is already quantized ({checkpoint.quantization.label}): the "
            "teacher is the full-precision checkpoint"
        )
    if quantization.method != "grace":
        raise QuotaError(f"method {quantization.method!r} is not one that fine-tunes: use 'grace'")
    if not quantization.symmetric or quantization.act_order or quantization.layer_bits:
        raise QuotaError("method 'grace' learns symmetric scales of fixed bits")
    if quantization.key_quantization != "token":
        raise QuotaError("method 'grace' quantizes keys by token")
    if quantization.groups is not None and quantization.scale_dtype is None:
        quantization = dataclasses.replace(quantization, scale_dtype=checkpoint.dtype.name)
    check_quantization(checkpoint.config, quantization)
    layers = checkpoint.config.text.num_layers
    if recipe is not None and recipe.num_layers != layers:
        raise QuotaError(
            f"the recipe is for {recipe.num_layers} decoder layers, the model has {layers}"
        )
    if (
        recipe is not None
        and options.relational_weight
        and any(stage.layer == layers - 1 for stage in recipe.stages)
    ):
        raise QuotaError(
            "the recipe prunes in the last layer, before which the relational loss reads the "
            "visual tokens: give relational_weight 0"
        )
    return quantization


def _fingerprint(
    checkpoint: Checkpoint, quantization: QuantizationConfig, told: Mapping[str, Any]
) -> str:
    identity = [checkpoint.fingerprint, quantization.to_json(), told]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
