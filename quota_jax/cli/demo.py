"""``quota-jax demo``: the whole path on a shipped small model, with answers to look at."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from quota_jax.cli.console import converters, progress, size, table
from quota_jax.cli.recipe import describe_recipe
from quota_jax.errors import QuotaError

if TYPE_CHECKING:
    from quota_jax.testbed.evaluate import Answer, Item


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Ask a shipped small model about freshly drawn pictures, in full precision and in 4 bits.

    Converts the model from its Hugging Face form, calibrates it to 4 bits on a few other pictures,
    stores a recipe that drops visual tokens, and prints both models' answers next to the truth.
    Needs no network.

    For example:
      quota-jax demo --model qwen2_5_vl --keep 0.3 --seed 7
    """

    model: Literal["llava", "qwen2_5_vl"] = "llava"
    """Architecture of the small model: LLaVA-1.5 or Qwen2.5-VL."""
    out: Path = Path("demo_out")
    """Folder for pictures and checkpoints; those of an earlier demo are replaced."""
    pictures: int = 4
    """Scenes to draw."""
    questions: int = 4
    """Questions about each picture; their kinds take turns."""
    seed: int = 2026
    """Seed of the pictures and the questions."""
    bits: str = "W4A4KV4"
    """Bits of weights, activations and KV cache."""
    method: Literal["flatquant", "rtn"] = "flatquant"
    """flatquant learns from drawn pictures (a minute or two on a CPU); rtn rounds to nearest at
    once."""
    samples: int = 8
    """flatquant: calibration pictures to draw."""
    steps: int = 12
    """flatquant: optimizer steps for each block; in earnest take 128 samples and 480 steps."""
    keep: float = 0.3
    """Fraction of the visual tokens that is left."""

    def run(self) -> int:
        import jax

        from quota_jax.checkpoint import set_recipe
        from quota_jax.cli.demo_sheet import draw_sheet
        from quota_jax.config import config_from_hf
        from quota_jax.prune.presets import candidates
        from quota_jax.quant.calibrate import calibrate
        from quota_jax.quantization import QuantizationConfig
        from quota_jax.recipe import Recipe, Selector
        from quota_jax.testbed import small_model_path
        from quota_jax.testbed.evaluate import make_items

        if self.samples < 1:
            raise QuotaError(f"--samples must be at least 1, got {self.samples}")
        quantization = QuantizationConfig.parse(self.bits, method=self.method)
        source = small_model_path(self.model)
        config = config_from_hf(_hf_config(source))
        recipe = Recipe.uniform(
            num_layers=config.text.num_layers,
            layers=candidates(config),
            keep=self.keep,
            # Inputs that are not quantized have no residual to score by.
            selector=Selector(name="quota", redistribute=quantization.activation_bits == 16),
        )
        items = make_items(
            self.pictures, self.seed, questions=self.questions, family=config.model_type
        )
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
                **self._learning(config.model_type),
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
        print("\n" + _summary((full, small), answers))
        for item in {item.picture: item for item in items}.values():
            item.image.save(self.out / f"scene_{item.picture}.png")
        sheet = self.out / "answers.png"
        draw_sheet(sheet, f"{source.name}, seed {self.seed}", labels, columns)
        print(f"\nwrote {self.out}/scene_*.png, and {sheet} with what was kept of each picture")
        return 0

    def _learning(self, family: str) -> dict[str, Any]:
        """What FlatQuant looks at: pictures that are not asked about."""
        if self.method == "rtn":
            return {}
        from PIL import Image

        from quota_jax.quant.calibrate_flatquant import FlatQuantOptions
        from quota_jax.quant.calibration_data import Sample
        from quota_jax.testbed import draw_samples

        samples = [
            Sample(turns=drawn.turns, image=Image.fromarray(drawn.pixels))
            for drawn in draw_samples(self.samples, seed=self.seed, family=family, questions=2)
        ]
        options = FlatQuantOptions(steps=self.steps, batch_size=min(2, self.samples))
        return {"samples": samples, "options": options}


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


def _ask(path: Path, items: Sequence[Item]) -> tuple[list[Answer], float, float]:
    """Answers, seconds of loading and compiling, seconds per answer after that."""
    import quota_jax as qj
    from quota_jax.testbed.evaluate import answer_items

    # At least two batches, so that one is answered without compiling.
    batch = min(8, -(-len(items) // 2))
    clock: list[float] = []
    start = time.perf_counter()
    vlm = qj.load(path, dtype="float32")
    answers = answer_items(vlm, items, batch_size=batch, clock=clock)
    whole = time.perf_counter() - start
    if len(clock) == 1:
        answer_items(vlm, items, batch_size=batch, clock=clock)
    later = sum(clock[1:]) / len(clock[1:])
    return answers, whole - later * -(-len(items) // batch), later / batch


def _answers(
    items: Sequence[Item], columns: Sequence[Sequence[Answer]], labels: Sequence[str]
) -> str:
    rows = []
    for item, *both in zip(items, *columns, strict=True):
        shown = [f"{answer.text.strip()}{'' if answer.correct else '  (wrong)'}" for answer in both]
        rows.append((f"scene_{item.picture}.png", item.question, item.answer, *shown))
    header = ("picture", "question", "truth", *labels)
    return table(header, rows, left=len(header))


def _summary(paths: Sequence[Path], answers: Sequence[tuple[list[Answer], float, float]]) -> str:
    from quota_jax.checkpoint import open_checkpoint

    rows = []
    for path, (given, first, each) in zip(paths, answers, strict=True):
        sizes = open_checkpoint(path).sizes()
        right = sum(answer.correct for answer in given)
        # Pictures may differ in size.
        left, all_tokens = (sum(counts) for counts in zip(*map(_tokens, given), strict=True))
        rows.append(
            (
                str(path),
                f"{right} of {len(given)}",
                f"{left / len(given):.0f} of {all_tokens / len(given):.0f}",
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


def _tokens(answer: Answer) -> tuple[int, int]:
    return int(answer.kept.sum()), answer.kept.size
