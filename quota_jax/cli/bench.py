"""``quota-jax bench``: speed, memory and power at a preset's shape, or of a checkpoint."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from quota_jax.cli.bench_tables import answer_table, describe, floor_table, speed_table
from quota_jax.errors import QuotaError

if TYPE_CHECKING:
    from quota_jax.bench import BenchResult
    from quota_jax.bench.first_answer import ColdAndWarm
    from quota_jax.bench.peer import PeerResult
    from quota_jax.bench.roofline import Peaks
    from quota_jax.checkpoint import Checkpoint
    from quota_jax.config import ModelConfig
    from quota_jax.models.vision_language import VisionLanguageModel
    from quota_jax.quantization import QuantizationConfig
    from quota_jax.recipe import Recipe

PRESET, BITS, KEEP, METHOD = "llava_1_5_7b", ("W4A4KV4", "W4A8KV4", "W16A16KV16"), (0.3, 1.0), "rtn"


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Time to the first token, decoding speed, memory and power on this machine.

    A preset has random weights: shapes, bytes and times are real, answers are not. Smaller models
    run first, because the peak memory is that of the process so far. Where the device's peaks are
    known, measured times stand beside the least that they allow.

    For example:
      quota-jax bench --preset llava-1.5-7b --bits W4A4KV4 W16A16KV16 --keep 1 0.3
    """

    preset: str | None = None
    """llava-1.5-7b (the default), llava-1.5-13b, qwen2.5-vl-3b or qwen2.5-vl-7b; also with
    underscores."""
    checkpoint: Path | None = None
    """A checkpoint instead, with its own weights and precision, and its recipe unless --keep is
    given."""
    bits: tuple[str, ...] | None = None
    """Precisions to run, W16A16KV16 being bfloat16; default W4A4KV4 W4A8KV4 W16A16KV16."""
    method: str | None = None
    """Method of the quantized models: rtn (the default), or flatquant, whose transforms take
    time."""
    keep: tuple[float, ...] | None = None
    """Fractions of the visual tokens that the recipe leaves; 1 keeps all. Default 0.3 1."""
    batch: tuple[int, ...] = (1,)
    """Batch sizes."""
    text: int = 64
    """Text tokens of a prompt."""
    new: int = 64
    """Tokens to decode."""
    layers: int | None = None
    """Decoder layers; None takes the preset's."""
    first_answer: bool = False
    """Also time new processes from their start to their first answer, without and with compiled
    programs in JAX's cache: each precision at the first --keep and --batch. The weights of a
    checkpoint are read, those of a preset made on the device."""
    peer: Literal["transformers"] | None = None
    """Also run the same work, unpruned in bfloat16, in transformers on torch (source checkouts
    only)."""
    bandwidth: float | None = None
    """TB/s of the device's memory, where it is unknown or to replace what is known."""
    peak: tuple[float, float] | None = None
    """The device's 10^12 operations per second in bfloat16 and in int8, likewise."""
    plot: Path | None = None
    """Draw the roofline into this file (.png, .pdf or .svg)."""
    json: Path | None = None
    """File for the numbers."""

    def run(self) -> int:
        from quota_jax.bench import measure

        self._check()
        subject, precisions = self._subject, self._precisions
        recipes = [recipe for _, recipe in self._recipes]
        platform, kind = self._device
        peaks = self._peaks(kind)
        # First those that need the device for themselves: later this process holds its memory.
        peers = self._peers(platform)
        answers = self._first_answers()
        results: list[BenchResult] = []
        for quantization in precisions:
            load, model = timed(lambda q=quantization: self._model(q))
            for batch in self.batch:
                for recipe in recipes:
                    result = measure(
                        model,
                        recipe,
                        batch_size=batch,
                        text_tokens=self.text,
                        new_tokens=self.new,
                        load=load,
                    )
                    results.append(result)
                    print(f"done: {describe(result)}", file=sys.stderr, flush=True)
            del model
        title = self._title(results[0], kind)
        print(title)
        print(speed_table(results, peers))
        if peaks is None:
            print(f"\nno roofline: {kind} is not known; give --bandwidth and --peak")
        else:
            print(f"\n{floor_table(results, peaks)}")
        if answers:
            print(f"\n{answer_table(answers)}")
        if self.plot is not None and peaks is not None:
            draw(results, peaks, self.plot, title)
            print(f"wrote {self.plot}")
        if self.json is not None:
            self._write(self.json, subject, kind, results, peers, answers, peaks)
            print(f"wrote {self.json}")
        return 0

    def _check(self) -> None:
        """Refuses bad options before anything long."""
        from quota_jax.generation import room_for

        for name in ("bits", "keep", "batch"):
            if getattr(self, name) == ():
                raise QuotaError(f"--{name} needs at least one value")
        if min(self.text, self.new, *self.batch) < 1:
            raise QuotaError("--text, --new and --batch must be at least 1")
        if self.text < 5:
            raise QuotaError(f"--text must be at least 5, got {self.text}")
        room_for(self.new + 1)
        if self.layers is not None and self.layers < 1:
            raise QuotaError(f"--layers must be at least 1, got {self.layers}")
        if self.checkpoint is not None:
            for name in ("preset", "bits", "method", "layers"):
                if getattr(self, name) is not None:
                    raise QuotaError(f"--checkpoint and --{name} exclude each other")
        if self.json is not None:
            if not self.json.parent.is_dir():
                raise QuotaError(f"{self.json.parent}: no such folder")
            if self.json.is_dir():
                raise QuotaError(f"{self.json}: is a folder")
        if self.plot is not None:
            from quota_jax.figures.canvas import check_plots

            check_plots(self.plot)
        if self.peer is not None:
            from quota_jax.bench.peer import check_peer

            check_peer()

    @cached_property
    def _opened(self) -> Checkpoint | None:
        from quota_jax.checkpoint import open_checkpoint

        return None if self.checkpoint is None else open_checkpoint(self.checkpoint)

    @cached_property
    def _subject(self) -> tuple[str, ModelConfig]:
        """What is measured: the preset's or the checkpoint's name, and its configuration."""
        from quota_jax.bench import find_preset

        if self._opened is not None:
            return self._opened.path.name, self._opened.config
        name, config = find_preset(self.preset or PRESET)
        if self.layers is not None:
            text = dataclasses.replace(config.text, num_layers=self.layers)
            config = dataclasses.replace(config, text=text)
        return name, config

    @cached_property
    def _precisions(self) -> list[QuantizationConfig]:
        from quota_jax.quantization import QuantizationConfig

        if self._opened is not None:
            return [self._opened.quantization]
        method = self.method or METHOD
        return [QuantizationConfig.parse(bits, method=method) for bits in self.bits or BITS]

    @cached_property
    def _recipes(self) -> list[tuple[float, Recipe]]:
        from quota_jax.prune.presets import candidates
        from quota_jax.recipe import Recipe

        _, config = self._subject
        if self._opened is not None and self.keep is None:
            recipe = self._opened.recipe
            return [(recipe.stages[-1].keep if recipe.stages else 1.0, recipe)]
        depth = config.text.num_layers
        return [
            (
                keep,
                Recipe.none(depth)
                if keep == 1
                else Recipe.uniform(num_layers=depth, layers=candidates(config), keep=keep),
            )
            for keep in (KEEP if self.keep is None else self.keep)
        ]

    @cached_property
    def _device(self) -> tuple[str, str]:
        """Platform and name of the device. Asked for in a process of its own where others need its
        memory before this one does."""
        from quota_jax.bench.first_answer import find_device

        return find_device(apart=self.first_answer or self.peer is not None)

    def _peaks(self, kind: str) -> Peaks | None:
        from quota_jax.bench.roofline import peaks_of

        peaks = peaks_of(kind, bandwidth=self.bandwidth, peak=self.peak)
        if peaks is None and self.plot is not None:
            raise QuotaError(f"--plot: {kind} is not known; give --bandwidth and --peak")
        return peaks

    def _model(self, quantization: QuantizationConfig) -> VisionLanguageModel:
        import jax.numpy as jnp

        from quota_jax.bench import random_model

        if self._opened is not None:
            return self._opened.load_model()
        return random_model(self._subject[1], quantization, jnp.bfloat16)

    def _peers(self, platform: str) -> list[PeerResult]:
        from quota_jax.bench.peer import measure_peer

        if self.peer is None:
            return []
        peers = measure_peer(
            self._subject[1],
            platform=platform,
            batch_sizes=self.batch,
            text_tokens=self.text,
            new_tokens=self.new,
        )
        for each in peers:
            print(f"done: {describe(each)}", file=sys.stderr, flush=True)
        return peers

    def _first_answers(self) -> list[ColdAndWarm]:
        from quota_jax.bench.first_answer import time_first_answer

        found = []
        for quantization in self._precisions if self.first_answer else ():
            source: dict[str, Any] = {"checkpoint": self.checkpoint}
            if self.checkpoint is None:
                source = {"config": self._subject[1], "quantization": quantization}
            answer = time_first_answer(
                self._recipes[0][1],
                batch_size=self.batch[0],
                text_tokens=self.text,
                new_tokens=self.new,
                **source,
            )
            found.append(answer)
            print(
                f"done: {answer.label}, first answer after {answer.cold.total:.1f} s, then "
                f"{answer.warm.total:.1f} s",
                file=sys.stderr,
                flush=True,
            )
        return found

    def _title(self, result: BenchResult, kind: str) -> str:
        import jax

        weights = f"random weights, {self.method or METHOD}"
        if self._opened is not None:
            weights = f"stored weights, {self._opened.quantization.method}"
        return (
            f"{self._subject[0]}, {result.visual_tokens} visual + {self.text} text tokens, "
            f"{kind}, jax {jax.__version__}, {weights}"
        )

    def _write(
        self,
        path: Path,
        subject: tuple[str, ModelConfig],
        kind: str,
        results: list[BenchResult],
        peers: list[PeerResult],
        answers: list[ColdAndWarm],
        peaks: Peaks | None,
    ) -> None:
        import jax

        from quota_jax.checkpoint.format import encode_json, write_file

        name, opened = subject[0], self._opened
        rows = []
        for result in results:
            row = dataclasses.asdict(result)
            if peaks is not None:
                row["first_token_floor"] = peaks.seconds(result.prefill_work)
                row["decode_step_floor"] = peaks.seconds(result.decode_work)
            rows.append(row)
        content = {
            "preset": name if opened is None else None,
            "checkpoint": None if opened is None else name,
            "method": (self.method or METHOD) if opened is None else opened.quantization.method,
            "device": kind,
            "jax": jax.__version__,
            "peaks": None if peaks is None else dataclasses.asdict(peaks),
            "results": rows,
            "peer": [dataclasses.asdict(each) for each in peers],
            "first_answers": [dataclasses.asdict(each) for each in answers],
        }
        write_file(path, encode_json(content, str(path)))


def timed(make: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds until all arrays of what ``make`` gives are on the device, and what it gives."""
    import time

    import jax

    begun = time.perf_counter()
    made = jax.block_until_ready(make())
    return time.perf_counter() - begun, made


def draw(results: list[BenchResult], peaks: Peaks, path: Path, title: str) -> None:
    from quota_jax.figures.roofline_plot import Point, draw_roofline

    points = []
    for result in results:
        row = {"series": result.label, "kept": result.keep, "batch_size": result.batch_size}
        for stage, work, seconds in (
            ("prefill", result.prefill_work, result.first_token),
            ("decode", result.decode_work, result.decode_step),
        ):
            rate = work.operations / seconds
            points.append(Point(**row, stage=stage, x=work.intensity, y=rate))
    draw_roofline(points, peaks, path, title=title)
