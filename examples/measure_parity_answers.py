"""Whether the shipped small models answer as transformers on torch does, in float32.

    python -m quota_jax.testbed.benchmarks bench-test --split test
    python examples/measure_parity_answers.py --data bench-test --write

Questions are spread evenly over the seven benchmarks and inside each. Both sides start from the
shipped folder and the picture file: chat template, tokenizer, image processor, greedy generation.
What is compared is the text of the answer. `--write` leaves the table beside the model, in the form
that the model card takes (`train_small_vlm.py --card --scores`). Needs the extra `oracle` (torch).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import numpy as np

import quota_jax as qj
from converters import convert
from quota_jax.errors import QuotaError
from quota_jax.evaluate.engine import Engine, cut
from quota_jax.evaluate.parallel import local_mesh
from quota_jax.evaluate.runner import user_turn
from quota_jax.evaluate.schedule import Request, encode, plan
from quota_jax.evaluate.tasks import TASKS
from quota_jax.testbed import small_model_path

FILE = "agreement.json"
LONGEST = 16
"""New tokens at most; the models' answers are shorter."""


def pick_requests(data: Path, count: int) -> list[tuple[str, Request]]:
    """``count`` questions with the name of their task, from first to last of each."""
    picked = []
    shares = np.diff(np.linspace(0, count, len(TASKS) + 1).astype(int))
    for (name, task), share in zip(TASKS.items(), shares, strict=True):
        instances = task.read(data)
        if len(instances) < share:
            raise QuotaError(f"{name}: {data} holds {len(instances)} questions, wanted {share}")
        for place in np.linspace(0, len(instances) - 1, share).round().astype(int):
            request = Request(
                name=f"{name} {instances[place].key}",
                conversation=[user_turn(instances[place])],
                max_new_tokens=min(LONGEST, task.settings.max_new_tokens),
                until=task.settings.until,
            )
            picked.append((name, request))
    return picked


def say(who: str, done: int, total: int) -> None:
    print(f"{who}: {done} of {total} answers", file=sys.stderr, flush=True)


def our_answers(folder: Path, requests: Sequence[Request], batch_size: int) -> list[str]:
    """Greedy answers of this library, through the runner's engine."""
    with tempfile.TemporaryDirectory() as temporary:
        vlm = qj.load(convert(folder, Path(temporary) / "checkpoint"), dtype="float32")
    engine = Engine(
        model=vlm.model,
        processor=vlm.processor,
        recipe=vlm.recipe,
        mesh=local_mesh(),
        batch_size=batch_size,
    )
    prompts = encode(requests, vlm.processor)
    texts: dict[int, str] = {}
    for group, answers in engine.answer(prompts, plan(prompts, batch_size)):
        texts |= {row: answer.text for row, answer in zip(group.rows, answers, strict=True)}
        say("quota_jax", len(texts), len(prompts))
    return [texts[row] for row in range(len(prompts))]


def their_answers(folder: Path, requests: Sequence[Request]) -> Iterator[str]:
    """Greedy answers of transformers on torch, one question at a time."""
    import torch
    from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    pictures: Any = AutoImageProcessor.from_pretrained(folder, backend="pil")
    model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    image = model.config.image_token_id
    for request in requests:
        message = dict(request.conversation[0])
        (source,) = (part["image"] for part in message["content"] if part["type"] == "image")
        made = pictures(source.load(), return_tensors="pt")
        inputs: dict[str, Any] = {"pixel_values": made["pixel_values"]}
        if "image_grid_thw" in made:
            inputs["image_grid_thw"] = made["image_grid_thw"]
            visual = int(made["image_grid_thw"].prod()) // pictures.merge_size**2
        else:
            visual = (model.config.vision_config.image_size // 14) ** 2
        text = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
        token = tokenizer.convert_ids_to_tokens(image)
        ids = tokenizer(text.replace(token, token * visual), return_tensors="pt")["input_ids"]
        inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if "image_grid_thw" in inputs:
            inputs["mm_token_type_ids"] = (ids == image).long()
            model.model.rope_deltas = None
        with torch.no_grad():
            tokens = model.generate(
                **inputs, max_new_tokens=request.max_new_tokens, do_sample=False
            )
        answer = tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True)
        yield cut(answer, request.until)


def compare(folder: Path, picked: Sequence[tuple[str, Request]], batch_size: int) -> dict[str, Any]:
    """The share of identical answers in percent, in all and by task, and what differs."""
    requests = [request for _, request in picked]
    ours = our_answers(folder, requests, batch_size)
    asked, same, different = Counter[str](), Counter[str](), []
    for number, ((task, request), own, their) in enumerate(
        zip(picked, ours, their_answers(folder, requests), strict=True), 1
    ):
        asked[task] += 1
        same[task] += own == their
        if own != their:
            different.append({"question": request.name, "quota_jax": own, "transformers": their})
        if number % 25 == 0:
            say("transformers", number, len(picked))
    row = {"all": 100 * same.total() / asked.total()}
    row |= {task: 100 * same[task] / asked[task] for task in asked}
    return {"rows": {"identical answers": row}, "asked": dict(asked), "different": different}


def describe(found: dict[str, Any]) -> dict[str, Any]:
    """The table as a section of the model card."""
    import torch
    import transformers

    total, wrong = sum(found["asked"].values()), len(found["different"])
    text = (
        f"Greedy answers in float32 on {total} questions of the test split, by this library (jax "
        f"{jax.__version__}) and by transformers {transformers.__version__} on torch "
        f"{torch.__version__}: {total - wrong} of {total} are the same text. In percent:"
    )
    return {"title": "Agreement with transformers", "text": text, **found}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the drawn benchmarks")
    parser.add_argument("--samples", type=int, default=500, help="questions in all")
    parser.add_argument("--models", nargs="+", default=["llava", "qwen2_5_vl"])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--write", action="store_true", help=f"write {FILE} beside each model")
    args = parser.parse_args(argv)
    if args.samples < len(TASKS):
        raise QuotaError(f"--samples must be at least {len(TASKS)}, got {args.samples}")
    picked = pick_requests(args.data, args.samples)
    for family in args.models:
        folder = small_model_path(family)
        found = describe(compare(folder, picked, args.batch_size))
        print(f"{family}: {found['text']}")
        print(json.dumps({key: found[key] for key in ("rows", "different")}, indent=1))
        if args.write:
            (folder / FILE).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except QuotaError as error:
        sys.exit(f"error: {error}")
