"""``quota-jax demo``: the whole path on the shipped small model, with answers to look at."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from quota_jax.cli.console import converters, progress, size, table
from quota_jax.cli.recipe import default_layers, describe_recipe
from quota_jax.errors import QuotaError

if TYPE_CHECKING:
    from quota_jax.recipe import Recipe
    from quota_jax.testbed.evaluate import Answer
    from quota_jax.testbed.scenes import Question, Scene

Items = Sequence[tuple["Scene", "Question"]]


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Ask the shipped small model about freshly drawn pictures, in full precision and in 4 bits.

    Converts the model from its Hugging Face form, calibrates it to 4 bits on a few other pictures,
    stores a recipe that drops visual tokens, and prints both models' answers next to the truth.
    Needs no network.

    For example:
      quota-jax demo --keep 0.3 --seed 7
    """

    out: Path = Path("demo_out")
    """Folder for pictures and checkpoints; those of an earlier demo are replaced."""
    pictures: int = 6
    """Scenes to draw; each is asked about presence, colour and position."""
    seed: int = 2026
    """Seed of the pictures and the questions."""
    bits: str = "W4A4KV4"
    """Bits of weights, activations and KV cache."""
    method: Literal["flatquant", "rtn"] = "flatquant"
    """flatquant learns from drawn pictures (a minute on a CPU); rtn rounds to nearest at once."""
    samples: int = 8
    """flatquant: calibration pictures to draw."""
    steps: int = 12
    """flatquant: optimizer steps for each block; in earnest take 128 samples and 480 steps."""
    keep: float = 0.3
    """Fraction of the visual tokens that is left."""

    def run(self) -> int:
        import jax

        from quota_jax.checkpoint import set_recipe
        from quota_jax.config import config_from_hf
        from quota_jax.quant.calibrate import calibrate
        from quota_jax.quantization import QuantizationConfig
        from quota_jax.recipe import Recipe, Selector
        from quota_jax.testbed import small_llava_path
        from quota_jax.testbed.evaluate import MAIN_TYPES, make_items

        if self.pictures < 1:
            raise QuotaError(f"--pictures must be at least 1, got {self.pictures}")
        if self.samples < 1:
            raise QuotaError(f"--samples must be at least 1, got {self.samples}")
        quantization = QuantizationConfig.parse(self.bits, method=self.method)
        source = small_llava_path()
        config = config_from_hf(_hf_config(source))
        recipe = Recipe.uniform(
            num_layers=config.text.num_layers,
            layers=default_layers(config),
            keep=self.keep,
            # Inputs that are not quantized have no residual to score by.
            selector=Selector(name="quota", redistribute=quantization.activation_bits == 16),
        )
        items = make_items(self.pictures, self.seed, MAIN_TYPES)
        self.out.mkdir(parents=True, exist_ok=True)
        full, small = self.out / "full", self.out / quantization.label
        for path in (full, small):
            _clear(path)

        start = time.perf_counter()
        with progress("converting") as step:
            converters().convert(source, full, progress=step)
        _say("convert", f"{source.name} -> {full}", start)
        start = time.perf_counter()
        with progress("quantizing") as step:
            calibrate(
                full,
                small,
                quantization,
                progress=lambda n, d, t: step(d, t, n),
                **self._learning(),
            )
        how = "round to nearest"
        if self.method == "flatquant":
            how = f"FlatQuant on {self.samples} drawn pictures, {self.steps} steps a block"
        _say("calibrate", f"{quantization.label}, {how} -> {small}", start)
        set_recipe(small, recipe, {"recipe_command": f"demo --keep {self.keep}"})
        print(f"\nrecipe    {100 * self.keep:g} % of the visual tokens are left in {small}")
        print(describe_recipe(recipe, config))

        print(f"\ngenerate  {len(items)} questions on {jax.devices()[0].device_kind}")
        answers = [_ask(path, items) for path in (full, small)]
        labels = ("full precision", f"{quantization.label}, {100 * self.keep:g} % of the tokens")
        columns = [rows for rows, *_ in answers]
        print("\n" + _answers(items, columns, labels))
        print("\n" + _summary((full, small), answers, recipe, config.reference_picture[1]))
        print("\n" + "\n".join(_save(self.out, items, columns, labels)))
        return 0

    def _learning(self) -> dict[str, Any]:
        """What FlatQuant looks at: pictures that are not asked about."""
        if self.method == "rtn":
            return {}
        from quota_jax.quant.calibrate_flatquant import FlatQuantOptions
        from quota_jax.quant.calibration_data import read_samples, write_drawn_samples

        drawn = write_drawn_samples(self.out / "calibration", self.samples, seed=self.seed + 1)
        options = FlatQuantOptions(steps=self.steps, batch_size=min(2, self.samples))
        return {"samples": read_samples(drawn), "options": options}


def _hf_config(folder: Path) -> dict:
    """config.json of a Hugging Face folder."""
    from quota_jax.processing.hugging_face import read_json

    return read_json(folder / "config.json") or {}


def _clear(path: Path) -> None:
    """Removes an earlier demo's checkpoint, and nothing else."""
    from quota_jax.checkpoint import PARTIAL_SUFFIX

    shutil.rmtree(path.with_name(path.name + PARTIAL_SUFFIX), ignore_errors=True)
    if not path.exists():
        return
    if not (path / "manifest.json").is_file():
        raise QuotaError(f"{path} exists and is no checkpoint of an earlier demo; choose --out")
    shutil.rmtree(path)


def _say(what: str, text: str, start: float) -> None:
    print(f"{what:<9} {text}, {time.perf_counter() - start:.1f} s")


def _ask(path: Path, items: Items) -> tuple[list[Answer], float, float]:
    """Answers, seconds until the first ones (loading and compiling), seconds per later answer."""
    import quota_jax as qj
    from quota_jax.testbed.evaluate import answer_items

    batch = min(6, len(items))
    start = time.perf_counter()
    vlm = qj.load(path, dtype="float32")
    answer_items(vlm, items[:batch], batch_size=batch)
    first = time.perf_counter() - start
    start = time.perf_counter()
    answers = answer_items(vlm, items, batch_size=batch)
    return answers, first, (time.perf_counter() - start) / len(items)


def _answers(items: Items, columns: Sequence[Sequence[Answer]], labels: Sequence[str]) -> str:
    rows = []
    for (scene, question), *both in zip(items, *columns, strict=True):
        shown = [f"{answer.text.strip()}{'' if answer.correct else '  (wrong)'}" for answer in both]
        rows.append((f"scene_{scene.index}.png", question.text, question.answer, *shown))
    header = ("picture", "question", "truth", *labels)
    return table(header, rows, left=len(header))


def _summary(
    paths: Sequence[Path],
    answers: Sequence[tuple[list[Answer], float, float]],
    recipe: Recipe,
    tokens: int,
) -> str:
    from quota_jax.checkpoint import open_checkpoint
    from quota_jax.recipe import kept

    left = kept(tokens, recipe.stages[-1].keep) if recipe.stages else tokens
    counts = (tokens, left)
    rows = []
    for path, count, (given, first, each) in zip(paths, counts, answers, strict=True):
        sizes = open_checkpoint(path).sizes()
        right = sum(answer.correct for answer in given)
        rows.append(
            (
                str(path),
                f"{right} of {len(given)}",
                f"{count} of {tokens}",
                size(sizes["logical"]),
                size(sizes["disk"]),
                f"{first:.1f} s",
                f"{1000 * each:.0f} ms",
            )
        )
    header = (
        "checkpoint",
        "right",
        "visual tokens at the end",
        "arrays",
        "disk",
        "load + compile",
        "per answer",
    )
    return table(header, rows)


def _save(
    out: Path, items: Items, columns: Sequence[Sequence[Answer]], labels: Sequence[str]
) -> list[str]:
    """Writes each picture and one sheet of all with their answers; returns what it wrote."""
    from PIL import Image, ImageDraw, ImageFont

    scenes = {scene.index: scene for scene, _ in items}
    for index, scene in scenes.items():
        scene.pil.save(out / f"scene_{index}.png")
    edge, text_width, line = 240, 520, 24
    sheet = Image.new("RGB", (edge + text_width, (edge + 16) * len(scenes)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for row, (index, scene) in enumerate(scenes.items()):
        top = row * (edge + 16) + 8
        sheet.paste(scene.pil.resize((edge, edge)), (8, top))
        asked = [rows for rows in zip(items, *columns, strict=True) if rows[0][0].index == index]
        for (_, question), *answers in asked:
            pen.text((edge + 24, top), f"{question.text}  ({question.answer})", "black", font)
            for name, answer in zip(labels, answers, strict=True):
                top += line
                color = "#1a7f37" if answer.correct else "#cf222e"
                pen.text((edge + 44, top), f"{name}: {answer.text.strip()}", color, font)
            top += line + 6
    sheet.save(out / "answers.png")
    return [f"wrote {len(scenes)} pictures to {out}/scene_*.png", f"wrote {out / 'answers.png'}"]
