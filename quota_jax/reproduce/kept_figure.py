"""Fig. 4 on any study: which tokens of some questions' pictures a variant keeps, layer by layer."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from quota_jax.checkpoint import open_checkpoint
from quota_jax.checkpoint.format import encode_json, write_file
from quota_jax.errors import QuotaError
from quota_jax.evaluate.task import Instance
from quota_jax.figures.canvas import check_plots
from quota_jax.figures.kept_plot import draw_kept, stage_name
from quota_jax.figures.pictures import pixel_scale, seen_pictures, token_cells
from quota_jax.generation import generate
from quota_jax.processing import Processor
from quota_jax.prune.kept import kept_tokens
from quota_jax.reproduce.study import Row, Study

MAX_NEW_TOKENS = 32


def draw_kept_tokens(
    study: Study,
    row: Row,
    folder: Path,
    name: str,
    *,
    count: int,
    provenance: Mapping[str, Any],
) -> tuple[Path, Path]:
    """Draws the tokens kept for ``count`` questions into NAME.png, and writes them into NAME.json.

    Questions are the first ones of the tasks, in turn, each about another picture; its answer under
    the recipe stands beside it.

    Raises:
      QuotaError: the row prunes nothing, or there are no such questions.
    """
    check_plots()
    if count < 1:
        raise QuotaError(f"at least one picture is needed, not {count}")
    questions = list(chosen_questions(study, count))
    if not questions:
        raise QuotaError(f"{study.data}: no question about a picture")
    checkpoint = open_checkpoint(study.checkpoint(row.weights))
    recipe = (study.recipe(row) or checkpoint.recipe).canonical()
    if not recipe.stages:
        raise QuotaError(f"{row.label}: keeps every token, there is nothing to draw")
    model, config = checkpoint.load_model(), checkpoint.config
    processor = Processor.from_folder(checkpoint.assets_dir, config)
    scale = pixel_scale(processor.pictures.image_processor)
    pictures, cells, labels, told = [], [], [], []
    kept: list[list[np.ndarray]] = [[] for _ in recipe.stages]
    offset = 0
    for task, each in questions:
        parts = [{"type": "image", "image": picture.load()} for picture in each.pictures]
        content = [*parts, {"type": "text", "text": each.prompt}]
        batch = processor.chat(
            [[{"role": "user", "content": content}]], max_new_tokens=MAX_NEW_TOKENS
        )
        out = generate(
            model,
            batch,
            recipe=recipe,
            max_new_tokens=MAX_NEW_TOKENS,
            stop_ids=processor.stop_ids,
        )
        answer = processor.decode(out.tokens, out.lengths)[0].strip()
        own = token_cells(config, batch)[0]
        stages = [found.places[0] for found in kept_tokens(model, batch, recipe)]
        told.append(
            {
                "task": task,
                "key": each.key,
                "prompt": each.prompt,
                "answer": answer,
                "visual_tokens": int((own[:, 0] >= 0).sum()),
                "kept": [len(places) for places in stages],
            }
        )
        for places, found in zip(kept, stages, strict=True):
            places.append(found + offset)
        own[:, 0] += len(pictures)
        cells.append(own)
        seen = seen_pictures(config, batch, *scale)
        asked, answer = (textwrap.shorten(x, 160, placeholder=" …") for x in (each.prompt, answer))
        labels += [f"{task}\n\n{asked}\n\n→ {answer}", *[""] * (len(seen) - 1)]
        pictures += seen
        offset += len(own)
    names = [stage_name(stage) for stage in recipe.stages]
    folder.mkdir(parents=True, exist_ok=True)
    files = folder / f"{name}.png", folder / f"{name}.json"
    draw_kept(
        pictures,
        np.concatenate(cells),
        [(stage, np.concatenate(places)) for stage, places in zip(names, kept, strict=True)],
        files[0],
        title=f"{config.model_type}, {row.label}: visual tokens kept after each candidate layer",
        labels=labels,
    )
    content = {"figure": name, "row": row.label, "run": row.run_name, **provenance}
    content |= {"recipe": recipe.to_json(), "stages": names, "questions": told}
    write_file(files[1], encode_json(content, str(files[1])))
    return files


def chosen_questions(study: Study, count: int) -> Iterator[tuple[str, Instance]]:
    """The first ``count`` questions about different pictures; tasks take turns."""
    waiting = [(name, iter(study.questions[name])) for name in study.questions]
    seen: set[tuple[str, ...]] = set()
    while waiting and len(seen) < count:
        for name, rest in list(waiting):
            for each in rest:
                names = tuple(picture.name for picture in each.pictures)
                if names and names not in seen:
                    break
            else:
                waiting.remove((name, rest))
                continue
            seen.add(names)
            yield name, each
            if len(seen) == count:
                return
