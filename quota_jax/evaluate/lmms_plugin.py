"""The model ``quota_jax`` of lmms-eval: its tasks and prompts, answered by the runner's engine.

    lmms_eval --model quota_jax --model_args checkpoint=llava-7b-w4a8,keep=0.3 --tasks pope

A *chat* model: lmms-eval gives messages (pictures, then text) and the checkpoint's own template
turns them into a prompt, as in ``quota-jax eval``. Only this module imports lmms-eval.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from tqdm import tqdm

from quota_jax.checkpoint import Checkpoint, open_checkpoint
from quota_jax.errors import QuotaError
from quota_jax.evaluate.engine import Answer, Engine
from quota_jax.evaluate.parallel import local_mesh, replicated
from quota_jax.evaluate.schedule import Request, encode, plan
from quota_jax.processing import Processor
from quota_jax.recipe import Recipe

MAX_NEW_TOKENS = 1024
"""Where a task names no limit, as for lmms-eval's own LLaVA."""


class QuotaJax(lmms):
    """A quota_jax checkpoint on all devices that jax sees; lmms-eval's ``device`` is not heeded.

    Model arguments (all but the first may be left out):
        checkpoint: folder of the checkpoint.
        recipe: file of a recipe, or ``none`` to keep all visual tokens; default the checkpoint's.
        keep: fraction of the visual tokens to keep instead, at ``layers`` (``2+3+4``), by default
            the paper's.
        dtype: float32, float16 or bfloat16; default the stored one.
        template: name of a chat template; default the checkpoint's own.
        batch_size: rows on one device. workers: threads that read pictures.
    """

    is_simple = False

    def __init__(
        self,
        checkpoint: str,
        recipe: str | None = None,
        keep: float | None = None,
        layers: str | int = "",
        dtype: str | None = None,
        template: str | None = None,
        batch_size: int | str | None = None,
        workers: int = min(8, os.cpu_count() or 1),
        device: str | None = None,
        max_batch_size: int | None = None,
        **unknown: Any,
    ):
        super().__init__()
        if unknown:
            raise QuotaError(f"quota_jax knows no model argument {min(unknown)!r}")
        opened = open_checkpoint(Path(checkpoint))
        mesh = local_mesh()
        self._template, self._workers = template, int(workers)
        self.engine = Engine(
            model=opened.load_model(dtype, sharding=replicated(mesh)),
            processor=Processor.from_folder(opened.assets_dir, opened.config),
            recipe=choose_recipe(opened, recipe, keep, layers),
            mesh=mesh,
            batch_size=_batch_size(batch_size),
            workers=self._workers,
        )

    def generate_until(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """Answers in the order of the requests."""
        wanted = [self._request(place, request) for place, request in enumerate(requests)]
        answers: dict[int, Answer] = {}
        with ThreadPoolExecutor(self._workers) as pool:
            prompts = encode(wanted, self.engine.processor, template=self._template, pool=pool)
        groups = plan(prompts, self.engine.rows)
        with tqdm(total=len(wanted), desc="quota_jax", disable=None) as bar:
            for group, part in self.engine.answer(prompts, groups):
                answers.update(zip(group.rows, part, strict=True))
                bar.update(len(part))
        results = []
        for place, request in enumerate(requests):
            answer = answers[place]
            self.cache_hook.add_partial("generate_until", request.args, answer.text)
            counts = TokenCounts(input_tokens=len(prompts[place].ids), output_tokens=answer.tokens)
            results.append(GenerationResult(text=answer.text, token_counts=counts))
        return results

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Not offered: no task that this model is for asks for it."""
        raise NotImplementedError("quota_jax answers generate_until tasks only")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not offered."""
        raise NotImplementedError("quota_jax answers generate_until tasks only")

    def _request(self, place: int, request: Any) -> Request:
        _, to_messages, options, doc_id, task, split = request.args
        document = Document(self.task_dict[task][split], doc_id, to_messages)
        return Request(
            name=f"{task} {doc_id}",
            conversation=document.conversation(f"{task}/{split}/{doc_id}"),
            **read_options(options, place),
        )


@dataclass(frozen=True, slots=True, eq=False)
class Document:
    """One row of a data set and how lmms-eval makes messages of it."""

    rows: Any
    place: int
    to_messages: Callable[[Any], Sequence[Mapping[str, Any]]]

    def messages(self) -> Sequence[Mapping[str, Any]]:
        """The messages, with pictures opened."""
        return self.to_messages(self.rows[self.place])

    def conversation(self, name: str) -> list[dict[str, Any]]:
        """The messages for `Request`: pictures are opened again when they are needed, so that not
        all pictures of a task are held at once."""
        turns, pictures = [], 0
        for message in self.messages():
            parts: list[dict[str, Any]] = []
            for part in message["content"]:
                if part["type"] == "text":
                    parts.append({"type": "text", "text": part["text"]})
                elif part["type"] == "image":
                    parts.append({"type": "image", "image": Picture(self, pictures, name)})
                    pictures += 1
                else:
                    raise QuotaError(f"{name}: quota_jax takes no {part['type']}")
            turns.append({"role": message["role"], "content": parts})
        return turns


@dataclass(frozen=True, slots=True)
class Picture:
    """The n-th picture of a document, as a picture source."""

    document: Document
    place: int
    name: str

    def load(self) -> Any:
        """The picture itself: a PIL image, or a path."""
        found = [
            part["url"]
            for message in self.document.messages()
            for part in message["content"]
            if part["type"] == "image"
        ]
        return found[self.place]


def read_options(options: Mapping[str, Any], place: int) -> dict[str, Any]:
    """A task's generation_kwargs as fields of `Request`; ``place`` seeds sampled answers.

    Raises:
        QuotaError: beam search is asked for.
    """
    if (options.get("num_beams") or 1) != 1:
        raise QuotaError("quota_jax has no beam search: num_beams must be 1")
    until = options.get("until") or ()
    temperature = float(options.get("temperature") or 0.0)
    sampled = temperature > 0 and options.get("do_sample", True)
    read: dict[str, Any] = {
        "max_new_tokens": int(options.get("max_new_tokens") or MAX_NEW_TOKENS),
        "until": (until,) if isinstance(until, str) else tuple(until),
    }
    if not sampled:
        return read
    return {
        **read,
        "temperature": temperature,
        "top_p": float(options.get("top_p") or 1.0),
        "top_k": int(options.get("top_k") or 0),
        "seed": place,
    }


def choose_recipe(
    checkpoint: Checkpoint, recipe: str | None, keep: float | None, layers: str | int
) -> Recipe:
    """The recipe that the model arguments ask for."""
    from quota_jax.cli.answering import RecipeOptions
    from quota_jax.cli.flops import read_recipe_file

    if recipe is not None and recipe != "none":
        if keep is not None or layers:
            raise QuotaError("the model arguments recipe and keep exclude each other")
        return read_recipe_file(Path(recipe), checkpoint.config)
    try:
        places = tuple(int(layer) for layer in str(layers).split("+") if layer)
    except ValueError:
        raise QuotaError(f"layers must be like 2+3+4, got {layers!r}") from None
    options = RecipeOptions(
        recipe_none=recipe == "none",
        keep=None if keep is None else float(keep),
        layers=places,
    )
    return options.recipe(checkpoint)


def _batch_size(value: int | str | None) -> int:
    try:
        return 1 if value is None else int(value)
    except ValueError:
        raise QuotaError(f"batch_size must be a number, got {value!r}") from None
