"""Trains a small model of the testbed on drawn scenes and writes it as a Hugging Face folder.

    python examples/train_small_vlm.py --family llava --minutes 12 --out runs/llava      # one GPU
    python examples/train_small_vlm.py --family qwen2_5_vl --minutes 12 --out runs/qwen  # one GPU
    python examples/train_small_vlm.py --family llava --tiny --out /tmp/tiny             # CPU
    python examples/train_small_vlm.py --check                    # CPU: lowers the real steps
    python examples/train_small_vlm.py --family llava --start runs/llava/model --hint-share 0.5 \\
        --minutes 8 --out runs/llava-2                            # goes on from a trained model

`--minutes` is the wall-clock time of the whole run: start, compilation, evaluation and export
included, summed over all processes with the same `--out`. A process that ends early (killed, or by
`--stop-after`) leaves its state; the same command goes on from it, and the learning rate falls to
its end whatever the limit. The model comes to OUT/model.
"""

from __future__ import annotations

import time

PROCESS_START = time.monotonic()

import argparse  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import shutil  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax  # noqa: E402

from converters import convert  # noqa: E402
from converters.export_params import write_params  # noqa: E402
from quota_jax.errors import QuotaError  # noqa: E402
from quota_jax.testbed.learning import flops  # noqa: E402
from quota_jax.testbed.learning.card import TRAINING, write_card  # noqa: E402
from quota_jax.testbed.learning.models import (  # noqa: E402
    SMALL_MODELS,
    count_parameters,
    model_params,
    tiny_model,
)
from quota_jax.testbed.learning.processor import folder_files, special_ids  # noqa: E402
from quota_jax.testbed.learning.start import read_start  # noqa: E402
from quota_jax.testbed.learning.state import Saved, load_state, save_state  # noqa: E402
from quota_jax.testbed.learning.step import TrainingConfig, init_state  # noqa: E402
from quota_jax.testbed.learning.trainer import Clock, Programs, Trainer, by_topic  # noqa: E402

RESERVE_SECONDS = 30.0
"""Kept back from the time limit for the last evaluation and the export."""
SHARD_BYTES = 14e6
FAST_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""For a CPU, where a few steps of a tiny model are nothing beside their compilation."""
SETTINGS: dict[str, dict[str, Any]] = {
    "llava": {"sizes": ((336, 336),), "num_questions": 8, "text_length": 382},
    "qwen2_5_vl": {
        "sizes": ((336, 336), (280, 448), (448, 280)),
        "num_questions": 8,
        "text_length": 413,
    },
}


def say(line: str) -> None:
    print(f"[{time.monotonic() - PROCESS_START:6.1f}] {line}", flush=True)


def real_config(family: str, **changes: Any) -> TrainingConfig:
    """The configuration of the shipped models; ``changes`` that are None are left out."""
    given = {name: value for name, value in changes.items() if value is not None}
    return TrainingConfig(model=SMALL_MODELS[family], **(SETTINGS[family] | given))


def tiny_config(family: str, seed: int, **changes: Any) -> TrainingConfig:
    """A reduced model that a CPU trains in seconds."""
    return TrainingConfig(
        model=tiny_model(family),
        sizes=((336, 336),) if family == "llava" else ((224, 280),),
        seed=seed,
        batch_size=2,
        num_questions=2,
        text_length=120,
        learning_rate=4e-3,
        warmup_steps=1,
        attention="xla",
        dtype="float32",
        eval_scenes=1,
        **changes,
    )


def export(
    out: Path, trainer: Trainer, family: str, report: dict[str, Any], scores: list[Path]
) -> Path:
    """Writes OUT/model beside and renames it: a model that is there is whole."""
    folder, partial = out / "model", out / "model.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    params = jax.device_get(model_params(trainer.state.params))
    write_params(
        partial,
        params,
        trainer.config.model,
        max_shard_size=SHARD_BYTES,
        text_fields=special_ids(family),
    )
    for name, content in folder_files(family).items():
        (partial / name).write_bytes(content)
    (partial / TRAINING).write_text(json.dumps(report, indent=1) + "\n")
    write_card(partial, scores)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return folder


def check(families: list[str]) -> None:
    """Lowers the real programs for an H100 and prints what they cost."""
    from quota_jax.testbed.learning.gpu_check import check_programs

    for family in families:
        config = real_config(family)
        rate = flops.pictures_per_second(config)
        count = count_parameters(config.model)
        say(f"{family}: {count} parameters, {2 * count / 1e6:.2f} MB in bfloat16")
        for size in config.sizes:
            each = flops.flops_per_picture(config, size)
            length = flops.sequence_length(config, size)
            say(f"  {size}: {length} tokens, {each / 1e9:.1f} GFLOP per picture")
        say(f"  about {rate:.0f} pictures/s at {flops.MEASURED_RATE / 1e12:.0f} TFLOP/s")
        for name, calls in check_programs(config).items():
            say(f"  {name}: lowers for CUDA, {calls} calls of cuDNN's attention")


def train(args: argparse.Namespace) -> dict[str, Any] | None:
    """Trains as far as this process may; the report once the run is complete."""
    out: Path = args.out
    model = tiny_model(args.family) if args.tiny else SMALL_MODELS[args.family]
    start = None
    if args.start:
        with tempfile.TemporaryDirectory() as scratch:
            start = read_start(args.start, convert(args.start, Path(scratch) / "start"), model)
    changes: dict[str, Any] = {"hint_share": args.hint_share}
    if start is not None:  # it has seen easy scenes
        changes |= {"start": start.checksum, "curriculum_share": 0.0}
    config = (
        tiny_config(args.family, args.seed, **changes)
        if args.tiny
        else real_config(
            args.family,
            seed=args.seed,
            batch_size=args.batch_size,
            num_questions=args.num_questions,
            learning_rate=args.learning_rate,
            attention=args.attention,
            **changes,
        )
    )
    saved = load_state(out, config)
    if saved is None and args.resume:
        raise QuotaError(f"{out} holds no run to go on with")
    budget = 60 * args.minutes
    used = saved.used if saved else 0.0
    reserve = 0.0 if args.tiny else RESERVE_SECONDS
    if used >= budget - reserve:
        raise QuotaError(f"{out} was trained for {used / 60:.1f} minutes: give more --minutes")
    clock = Clock(
        budget=budget,
        reserve=reserve,
        started=PROCESS_START,
        used_before=used,
        trained_before=saved.trained if saved else 0.0,
    )
    device = jax.devices()[0]
    say(f"jax {jax.__version__} on {device.device_kind}")
    if config.attention == "cudnn" and device.platform != "gpu":
        raise QuotaError("attention 'cudnn' needs an NVIDIA GPU: give --attention xla or --tiny")
    if saved:
        say(f"goes on at step {saved.steps}, {used:.0f} s of {budget:.0f} s used")
    first = init_state(config, start.params) if start else None
    trainer = Trainer(
        config,
        Programs.compile(config, FAST_COMPILE if args.tiny else None),
        state=saved.state if saved else first,
        steps=saved.steps if saved else 0,
        curve=saved.curve if saved else None,
    )
    say("compiled")
    if clock.left <= 0:
        raise QuotaError(f"--minutes {args.minutes:g} leaves no time to train")

    def save() -> None:
        save_state(
            out,
            config,
            Saved(
                state=trainer.state,
                steps=trainer.steps,
                used=clock.used,
                trained=clock.trained,
                curve=trainer.curve,
            ),
        )

    stop = 60 * args.stop_after if args.stop_after else float("inf")
    finished = trainer.run(clock, stop_after=stop, max_steps=args.steps, log=say, save=save)
    trained = clock.trained
    if not finished and args.steps is None:
        say(f"stopped at step {trainer.steps}; the same command goes on")
        return None
    batches = max(1, args.eval_scenes // config.eval_scenes)
    seeing, most_common = trainer.evaluate(batches)
    blind, _ = trainer.evaluate(batches, seeing=False)
    held_out, _ = trainer.evaluate(batches, held_out=True)
    parts = ["python examples/train_small_vlm.py", f"--family {args.family}"]
    parts += ["--start EARLIER/model"] if start else []
    parts += [f"--hint-share {args.hint_share:g}"] if args.hint_share is not None else []
    parts += [f"--num-questions {args.num_questions}"] if args.num_questions else []
    parts += [f"--minutes {args.minutes:g}", f"--seed {args.seed}", "--out OUT"]
    report: dict[str, Any] = {
        "family": args.family,
        "parameters": count_parameters(config.model),
        "decoder_layers": config.model.text.num_layers,
        "sizes": config.sizes,
        "num_questions": config.num_questions,
        "batch_size": config.batch_size,
        "learning_rate": config.learning_rate,
        "anneal_share": config.anneal_share,
        "hint_share": config.hint_share,
        "seed": config.seed,
        "dtype": config.dtype,
        "steps": trainer.steps,
        "pictures": trainer.steps * config.batch_size,
        "train_seconds": trained,
        "process_seconds": clock.used,
        "annealed": finished,
        "device": device.device_kind,
        "jax": jax.__version__,
        "command": " ".join(parts),
        "eval_scenes": batches * config.eval_scenes,
        "seeing": seeing,
        "blind": blind,
        "majority": most_common,
        "held_out": held_out,
        "curve": trainer.curve,
        "earlier": start.reports if start else [],
    }
    for name in ("seeing", "blind", "held_out"):
        scores = by_topic(report[name])
        say(f"{name}: " + "  ".join(f"{topic} {value:.1f}" for topic, value in scores.items()))
    folder = export(out, trainer, args.family, report, args.scores)
    size = sum(path.stat().st_size for path in folder.iterdir())
    say(f"wrote {folder}: {size} bytes in {len(list(folder.iterdir()))} files")
    return report


def main(argv: list[str] | None = None) -> dict[str, Any] | None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", choices=sorted(SMALL_MODELS))
    parser.add_argument("--out", type=Path, help="folder of the run")
    parser.add_argument("--minutes", type=float, default=12.0, help="time limit of the whole run")
    parser.add_argument("--stop-after", type=float, help="minutes after which this process stops")
    parser.add_argument("--resume", action="store_true", help="refuse to start a new run")
    parser.add_argument("--steps", type=int, help="end after so many steps, annealed or not")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, help="pictures per step")
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--start", type=Path, help="folder of a trained model to start from")
    parser.add_argument("--num-questions", type=int, help="questions per picture")
    parser.add_argument("--hint-share", type=float, help="share of the questions with a hint")
    parser.add_argument("--attention", choices=("cudnn", "xla"))
    parser.add_argument(
        "--eval-scenes", type=int, default=512, help="scenes of the last evaluation"
    )
    parser.add_argument("--tiny", action="store_true", help="a few steps of a reduced model")
    parser.add_argument("--check", action="store_true", help="lower the real steps for CUDA")
    parser.add_argument("--card", action="store_true", help="only write OUT/model/README.md again")
    parser.add_argument(
        "--scores", type=Path, nargs="*", default=[], help="JSON tables for the model card"
    )
    args = parser.parse_args(argv)
    if args.check:
        check([args.family] if args.family else list(SMALL_MODELS))
        return None
    if args.out is None:
        parser.error("--out is needed")
    if args.card:
        write_card(args.out / "model", args.scores)
        return None
    if args.family is None:
        parser.error("--family is needed")
    if args.tiny:
        args.steps = 4 if args.steps is None else args.steps
        args.eval_scenes = 1
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(args.out.absolute() / "cache"))
    return train(args)


if __name__ == "__main__":
    try:
        main()
    except QuotaError as error:
        sys.exit(f"error: {error}")
