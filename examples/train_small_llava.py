"""Trains the small LLaVA of the testbed on drawn scenes and writes it as a Hugging Face folder.

    python examples/train_small_llava.py --minutes 7.5 --out small_llava   # one GPU
    python examples/train_small_llava.py --smoke --out /tmp/small_llava    # one GPU, two minutes
    python examples/train_small_llava.py --tiny --out /tmp/tiny_llava      # CPU, reduced model

`--minutes` counts from the start of the process and includes compilation, evaluation and export.
"""

from __future__ import annotations

import time

PROCESS_START = time.monotonic()

import argparse  # noqa: E402
import dataclasses  # noqa: E402
import json  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax  # noqa: E402

from quota_jax.config import LlavaConfig  # noqa: E402
from quota_jax.testbed.export import write_hf_folder  # noqa: E402
from quota_jax.testbed.questions import TYPES  # noqa: E402
from quota_jax.testbed.training import Trainer, TrainingConfig, model_params  # noqa: E402
from quota_jax.testbed.training_model import SMALL_LLAVA  # noqa: E402

RESERVE_SECONDS = 22.0
"""Kept back from the time limit for the last evaluation and the export."""


def tiny_model() -> LlavaConfig:
    """A two-layer model that a CPU trains in seconds; same vocabulary and pictures."""
    return dataclasses.replace(
        SMALL_LLAVA,
        vision=dataclasses.replace(
            SMALL_LLAVA.vision, hidden_size=32, intermediate_size=64, num_layers=3, num_heads=2
        ),
        text=dataclasses.replace(
            SMALL_LLAVA.text,
            hidden_size=64,
            intermediate_size=96,
            num_layers=2,
            num_heads=4,
            num_kv_heads=4,
            head_dim=16,
        ),
    )


def say(line: str) -> None:
    print(f"[{time.monotonic() - PROCESS_START:6.1f}] {line}", flush=True)


def table(report: dict[str, Any]) -> str:
    """The measured accuracies as a Markdown table."""
    lines = ["| | " + " | ".join(TYPES) + " |", "|---" * (len(TYPES) + 1) + "|"]
    for label, key in (
        ("seeing", "seeing"),
        ("picture zeroed", "blind"),
        ("majority answer", "majority"),
    ):
        lines.append(f"| {label} | " + " | ".join(f"{report[key][t]:.1f}" for t in TYPES) + " |")
    return "\n".join(lines)


def model_card(report: dict[str, Any], command: str) -> str:
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---

# Small LLaVA on drawn scenes

A {report["parameters"] / 1e6:.1f} M parameter model with exactly the architecture of LLaVA-1.5
(CLIP tower, feature layer -2, two-layer projector, LLaMA decoder of {report["decoder_layers"]}
layers, 336 px, 576 visual tokens), trained from scratch on procedurally drawn scenes. It knows
nothing but these scenes; it exists so that quantization and pruning can be tried and tested
without a download.

Prompt: `USER: <image>\\nWhat color is the car? ASSISTANT:`

Exact-match accuracy in percent on {report["eval_scenes"]} unseen scenes
({report["scene_text"]}), one question of each type per scene where the scene allows it:

{table(report)}

Trained {report["train_seconds"]:.0f} s ({report["steps"]} steps, {report["images"]} pictures)
on one {report["device"]} with jax {report["jax"]}, by

    {command}
"""


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--minutes", type=float, default=7.5, help="time limit of the whole process"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=64, help="pictures per step")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--attention", choices=("cudnn", "xla"), default="cudnn")
    parser.add_argument(
        "--eval-scenes", type=int, default=1024, help="scenes of the last evaluation"
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--smoke", action="store_true", help="a run of two minutes on a GPU")
    mode.add_argument("--tiny", action="store_true", help="a few steps of a reduced model on a CPU")
    parser.add_argument("--steps", type=int, default=None, help="stop after so many steps")
    args = parser.parse_args(argv)
    if args.tiny:
        args.batch_size, args.attention, args.eval_scenes = 4, "xla", 8
        args.steps = 12 if args.steps is None else args.steps
    if args.smoke:
        args.minutes, args.eval_scenes = min(args.minutes, 2.0), 256
    config = TrainingConfig(
        model=tiny_model() if args.tiny else SMALL_LLAVA,
        seed=args.seed,
        batch_size=args.batch_size,
        learning_rate=4e-3 if args.tiny else args.learning_rate,
        warmup_steps=1 if args.tiny else 150,
        attention=args.attention,
        dtype="float32" if args.tiny else "bfloat16",
        eval_scenes=min(64, args.eval_scenes),
    )
    device = jax.devices()[0]
    say(f"jax {jax.__version__} on {device.device_kind}")
    trainer = Trainer(config)
    say("compiled")
    began = time.monotonic()
    seconds = PROCESS_START + args.minutes * 60 - RESERVE_SECONDS - began
    if seconds <= 0:
        parser.error(f"--minutes {args.minutes} leaves no time to train")
    curve = trainer.run(seconds, max_steps=args.steps, log=say)
    trained = time.monotonic() - began
    say(f"trained {trained:.1f} s, {trainer.steps} steps")
    batches = max(1, args.eval_scenes // config.eval_scenes)
    seeing, most_common = trainer.evaluate(batches)
    blind, _ = trainer.evaluate(batches, seeing=False)
    params = {name: jax.device_get(value) for name, value in model_params(trainer.state).items()}
    report = {
        "seeing": seeing,
        "blind": blind,
        "majority": most_common,
        "parameters": sum(value.size for value in params.values()),
        "decoder_layers": config.model.text.num_layers,
        "eval_scenes": batches * config.eval_scenes,
        "scene_text": "2 to 9 objects of 26 to 104 px, letters of 14 to 44 px",
        "train_seconds": trained,
        "steps": trainer.steps,
        "images": trainer.steps * config.batch_size,
        "device": device.device_kind,
        "jax": jax.__version__,
        "seed": args.seed,
        "curve": curve,
    }
    command = f"python examples/train_small_llava.py --minutes {args.minutes:g} --seed {args.seed}"
    command += f" --batch-size {args.batch_size} --learning-rate {args.learning_rate:g}"
    say("accuracy\n" + table(report))
    sizes = write_hf_folder(
        args.out, params, config.model, card=model_card(report, command + " --out small_llava")
    )
    (args.out / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    say(f"wrote {args.out}: {sum(sizes.values())} bytes in {len(sizes)} files")
    return report


if __name__ == "__main__":
    main()
