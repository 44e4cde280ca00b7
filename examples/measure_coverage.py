"""What each selector keeps of the picture: the object that the question is about, or clutter?

    python examples/measure_coverage.py --family llava --pictures 64 --out coverage.json

Drawn scenes, each with the question for the color of one object whose kind is there once. Every
selector keeps what the LLM FLOPs of QUOTA's recipe at ``--keep`` allow it; the tables say, for the
last stage, which share of the asked object's tokens was kept, which share of all kept tokens shows
an object or a sign, and how many questions were answered. Beside it: how the norms of the visual
features and of 4-bit rounding errors of objects compare with those of the rest, which the scores of
QUOTA and QAPruner build on. Full precision, but for the row of QUOTA with its residual (weights
rounded to 4 bits, activations to 8). Last, fresh questions of all kinds, and the selectors that
number tokens anew once more with positions kept.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

import quota_jax as qj
from converters import convert
from quota_jax.cli.console import table
from quota_jax.errors import QuotaError
from quota_jax.prune.presets import llm_flops_ratio, peer_recipe
from quota_jax.quant.calibrate import calibrate
from quota_jax.quant.calibration_data import Sample, make_batches
from quota_jax.quantization import QuantizationConfig
from quota_jax.recipe import MERGING, Recipe
from quota_jax.reproduce.rows import equal
from quota_jax.reproduce.tables import PEERS
from quota_jax.testbed import small_model_path
from quota_jax.testbed.evaluate import Item, answer_items, make_items, score
from quota_jax.testbed.scenes import Scene, SceneObject, draw_scenes
from quota_jax.testbed.world.conversation import SINGLE_WORD

SEED = 4242
LOW = "W4A8KV4"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", default="llava", choices=["llava", "qwen2_5_vl"])
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--keep", type=float, default=0.3)
    parser.add_argument("--out", type=Path, help="file for the numbers (JSON)")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        full = convert(small_model_path(options.family), Path(folder) / "full")
        low = calibrate(full, Path(folder) / "low", QuantizationConfig.parse(LOW))
        models = {"": qj.load(full), LOW: qj.load(low)}
    scenes, asked = draw_questions(options.pictures)
    others = make_items(options.pictures, SEED, family=options.family)
    items = [question(place, *each) for place, each in enumerate(zip(scenes, asked, strict=True))]
    found: dict[str, Any] = {"norms": norms(models[""], scenes, items), "selectors": {}}
    for name, bits, recipe in recipes(models[""].config, options.keep):
        answers = answer_items(models[bits], items, batch_size=16, recipe=recipe)
        kept = [answer.kept for answer in answers]
        shown = [
            objects_and_signs(scene, grid.shape) for scene, grid in zip(scenes, kept, strict=True)
        ]
        own = [
            covered(scene.size, [each], grid.shape)
            for scene, each, grid in zip(scenes, asked, kept, strict=True)
        ]
        found["selectors"][name] = {
            "asked object kept": mean(k[o].mean() for k, o in zip(kept, own, strict=True)),
            "kept tokens on objects": mean(
                s[k].mean() for k, s in zip(kept, shown, strict=True) if k.any()
            ),
            "all tokens on objects": mean(s.mean() for s in shown),
            "tokens kept": mean(k.mean() for k in kept),
            "colors answered": score(answers).percent / 100,
            "all kinds answered": score(
                answer_items(models[bits], others, batch_size=16, recipe=recipe)
            ).percent
            / 100,
        }
        print(name, found["selectors"][name], file=sys.stderr, flush=True)
    print(report(found))
    if options.out:
        settings = {"family": options.family, "pictures": options.pictures, "keep": options.keep}
        options.out.write_text(json.dumps({**settings, **found}, indent=1) + "\n")


def draw_questions(count: int) -> tuple[list[Scene], list[SceneObject]]:
    """Scenes with an object whose kind is there once, and that object."""
    scenes, asked = [], []
    for scene in draw_scenes(SEED, 4 * count):
        kinds = Counter(each.kind for each in scene.objects)
        single = [each for each in scene.objects if kinds[each.kind] == 1]
        if single and len(scenes) < count:
            scenes.append(scene)
            asked.append(single[len(scenes) % len(single)])
    if len(scenes) < count:
        raise QuotaError(f"only {len(scenes)} of {4 * count} scenes have such an object")
    return scenes, asked


def question(place: int, scene: Scene, target: SceneObject) -> Item:
    text = f"what color is the {target.kind} ?"
    return Item(
        picture=place,
        image=scene.image(),
        kind="color/open",
        question=text,
        prompt=f"{text}\n{SINGLE_WORD}",
        answer=target.color,
    )


def recipes(config: Any, keep: float) -> list[tuple[str, str, Recipe]]:
    """Name, precision and recipe of all that is compared."""
    plain = equal(config, keep)
    ratio = llm_flops_ratio(config, plain)
    found = [("quota", "", plain), ("quota without magnitude", "", without_magnitude(plain))]
    found.append((f"quota with residual ({LOW})", LOW, peer_recipe("quota", config, keep=keep)))
    for name in PEERS:
        if name == "vtw" or (name == "visionzip" and config.model_type != "llava"):
            continue  # keeps no visual token; needs a class token
        recipe = peer_recipe(name, config, target_flops_ratio=ratio)
        found.append((name, "", recipe))
        if recipe.positions == "renumber" and name not in MERGING:
            kept = dataclasses.replace(recipe, positions="keep")
            found.append((f"{name}, positions kept", "", kept))
    return found


def without_magnitude(recipe: Recipe) -> Recipe:
    def changed(stage):
        weights = stage.selector.weights.without("magnitude")
        selector = dataclasses.replace(stage.selector, weights=weights)
        return dataclasses.replace(stage, selector=selector)

    return dataclasses.replace(recipe, stages=tuple(map(changed, recipe.stages)))


def covered(
    size: tuple[int, int], objects: Sequence[SceneObject], grid: tuple[int, int]
) -> np.ndarray:
    """bool [rows, columns]: tokens whose patch the square of an object covers by a fifth at least,
    and the one at its centre."""
    (height, width), (rows, columns) = size, grid
    shown = np.zeros(grid, bool)
    for each in objects:
        shown[int(each.y * rows / height), int(each.x * columns / width)] = True
        share_y = overlap(each.y, each.size / 2, height / rows, rows)
        share_x = overlap(each.x, each.size / 2, width / columns, columns)
        shown |= np.outer(share_y, share_x) >= 0.2
    return shown


def overlap(centre: float, half: float, step: float, count: int) -> np.ndarray:
    """The share of each of ``count`` cells of length ``step`` inside ``centre +- half``."""
    low = np.arange(count) * step
    inside = np.minimum(low + step, centre + half) - np.maximum(low, centre - half)
    return np.clip(inside, 0, step) / step


def objects_and_signs(scene: Scene, grid: tuple[int, int]) -> np.ndarray:
    """Tokens that show an object, or the letters of a sign (about 0.7 of their height wide)."""
    shown = covered(scene.size, scene.objects, grid)
    (height, width), (rows, columns) = scene.size, grid
    for sign in scene.signs:
        half = 0.35 * sign.height * len(sign.text)
        share_y = overlap(sign.y, sign.height / 2, height / rows, rows)
        share_x = overlap(sign.x, half, width / columns, columns)
        shown |= np.outer(share_y, share_x) >= 0.2
    return shown


def norms(vlm: Any, scenes: Sequence[Scene], items: Sequence[Item]) -> dict[str, float]:
    """Means over objects and signs, over those of the rest: the norm of the decoder's visual
    inputs, and the error of rounding them to 4 bits with a scale each."""
    samples = [Sample(turns=(item.prompt,), image=item.image) for item in items]
    ratios: dict[str, list[float]] = {"norm": [], "4-bit error": []}
    place = 0
    made = make_batches(vlm.processor, samples, 16)
    for batch, count in zip(made.batches, made.counts, strict=True):
        features = np.asarray(vlm.model.visual_features(batch.pixels), np.float32)
        features = features.reshape(-1, features.shape[-1])
        for index in np.asarray(batch.visual_index)[:count]:
            own = features[index[index >= 0]]
            rows = round(len(own) ** 0.5 * (scenes[place].size[0] / scenes[place].size[1]) ** 0.5)
            grid = rows, len(own) // rows
            step = np.abs(own).max(1, keepdims=True) / 7
            error = np.linalg.norm(own - np.round(own / step) * step, axis=1)
            shown = objects_and_signs(scenes[place], grid).ravel()
            for name, value in (("norm", np.linalg.norm(own, axis=1)), ("4-bit error", error)):
                ratios[name].append(float(value[shown].mean() / value[~shown].mean()))
            place += 1
    return {name: mean(values) for name, values in ratios.items()}


def mean(values: Any) -> float:
    return float(np.mean(list(values)))


def report(found: dict[str, Any]) -> str:
    """The numbers as tables."""
    names = (
        *("asked object kept", "kept tokens on objects", "tokens kept"),
        *("colors answered", "all kinds answered"),
    )
    rows = [
        (name, *(f"{100 * entry[each]:.0f} %" for each in names))
        for name, entry in found["selectors"].items()
    ]
    share = next(iter(found["selectors"].values()))["all tokens on objects"]
    lines = [
        f"{name} of objects and signs over the rest: {value:.2f}"
        for name, value in found["norms"].items()
    ]
    return "\n".join(
        [table(("selector", *names), rows), f"on objects: {100 * share:.0f} % of all", *lines]
    )


if __name__ == "__main__":
    main()
