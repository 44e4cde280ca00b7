"""Lists of drawn scenes with questions and answers, for calibration and fine-tuning.

Scenes and questions come from the distribution that the small models learned from, with seeds of
their own: no scene of the benchmarks is among them. ``python -m quota_jax.testbed.samples`` writes
the list that ``quota-jax calibrate`` and ``finetune`` read.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from quota_jax.errors import QuotaError
from quota_jax.testbed.world.conversation import LETTER, SEVERAL, SINGLE_WORD, YES_OR_NO
from quota_jax.testbed.world.layout import (
    UNIFORMS_PER_SCENE,
    Difficulty,
    Layout,
    sample_layout,
)
from quota_jax.testbed.world.questions import (
    CHOICE,
    FORMS,
    TOPICS,
    UNIFORMS_PER_QUESTION,
    Questions,
    ask_layout,
    draw_requests,
)
from quota_jax.testbed.world.words import join_words

SIZES: dict[str, tuple[tuple[int, int], ...]] = {
    "llava": ((336, 336),),
    "qwen2_5_vl": ((336, 336), (280, 448), (448, 280)),
}
"""Height and width of the pictures that each family was trained on, in turn."""
_STREAM = 31
_CHUNK = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class DrawnQuestion:
    """A question as a user's turn, its answer, and the type in the training mix."""

    prompt: str
    answer: str
    kind: str


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class DrawnSample:
    """One picture, RGB uint8 [height, width, 3], and questions about it."""

    index: int
    pixels: np.ndarray
    questions: tuple[DrawnQuestion, ...]

    @property
    def turns(self) -> tuple[str, ...]:
        """Those of user and assistant one after the other."""
        return tuple(text for q in self.questions for text in (q.prompt, q.answer))


def draw_samples(
    count: int, *, seed: int = 0, family: str = "llava", questions: int = 4
) -> Iterator[DrawnSample]:
    """Draws ``count`` pictures with ``questions`` each; a longer draw begins with a shorter one.

    Texts are the same on every machine, pixels on one platform.

    Raises:
      QuotaError: a bad argument.
    """
    if family not in SIZES:
        raise QuotaError(f"no family {family!r}; known: {', '.join(SIZES)}")
    for name, value, least in (("count", count, 1), ("seed", seed, 0), ("questions", questions, 1)):
        if isinstance(value, bool) or value < least:
            raise QuotaError(f"{name} must be at least {least}, got {value}")
    return _draw(count, seed, SIZES[family], questions)


def _draw(
    count: int, seed: int, sizes: tuple[tuple[int, int], ...], number: int
) -> Iterator[DrawnSample]:
    from quota_jax.testbed.world.renderer import render_nhwc

    for start in range(0, count, _CHUNK * len(sizes)):
        chunk: dict[int, DrawnSample] = {}
        for place, size in enumerate(sizes):
            # Always whole chunks: one compiled program for each size.
            indices = [start + place + i * len(sizes) for i in range(_CHUNK)]
            draws = [np.random.default_rng([_STREAM, seed, index]) for index in indices]

            def uniforms(width: int, draws=draws) -> np.ndarray:
                return np.stack([rng.random(width, dtype=np.float32) for rng in draws])

            layout = sample_layout(uniforms(UNIFORMS_PER_SCENE), Difficulty(), size=size)
            asked = ask_questions(layout, uniforms, number)
            pictures = np.asarray(render_nhwc(Layout(*map(np.asarray, layout)), size))
            for index, pixels, found in zip(indices, pictures, asked, strict=True):
                chunk[index] = DrawnSample(index=index, pixels=pixels, questions=found)
        yield from (chunk[index] for index in sorted(chunk) if index < count)


def ask_questions(
    layout: Layout, uniforms: Callable[[int], np.ndarray], number: int
) -> list[tuple[DrawnQuestion, ...]]:
    """``number`` questions of the training mix about each scene, worded as the benchmarks word
    them.

    Args:
      uniforms: draws [B, n] uniform numbers.
    """
    topics, forms = draw_requests(uniforms(number))
    questions = ask_layout(layout, uniforms(number * UNIFORMS_PER_QUESTION), topics, forms)
    variants = uniforms(number * 4).reshape(-1, number, 4)
    return [
        tuple(_question(questions, row, column, variants[row, column]) for column in range(number))
        for row in range(len(topics))
    ]


def _question(questions: Questions, row: int, column: int, variant: np.ndarray) -> DrawnQuestion:
    topic, form = TOPICS[questions.topic[row, column]], FORMS[questions.form[row, column]]
    return DrawnQuestion(
        prompt=word_prompt(questions, row, column, variant),
        answer=join_words(questions.answers[row, column]),
        kind=f"{topic}/{form}",
    )


def word_prompt(questions: Questions, row: int, column: int, variant: Any) -> str:
    """The text that ``prompt_words`` gives as ids, with the benchmarks' capitals and line breaks.

    Args:
      variant: [4] uniform numbers, of the same meaning as there.
    """
    hint = join_words(questions.hint[row, column])
    answer = join_words(questions.answers[row, column])
    question = join_words(questions.words[row, column])
    options = questions.options[row, column, : questions.num_options[row, column]]
    lines = []
    if hint:
        sentences = " ".join(f"{_capital(part.strip())}." for part in hint.split(".") if part)
        lines.append(f"Context: {sentences}" if variant[0] < 0.7 else sentences)
    lines.append(_capital(question))
    if questions.form[row, column] == CHOICE:
        if variant[1] < 0.4:
            lines.append(SEVERAL)
        lines += [
            f"{letter}. {join_words(option)}"
            for letter, option in zip("ABCDE", options, strict=False)
        ]
        lines.append(LETTER)
    else:
        please = answer in ("yes", "no") and variant[3] < 0.3
        lines.append(YES_OR_NO if please else SINGLE_WORD)
    return "\n".join(lines)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def write_samples(
    out: str | Path,
    count: int,
    *,
    seed: int = 0,
    family: str = "llava",
    questions: int = 4,
    progress: Callable[[int], object] | None = None,
) -> Path:
    """Writes ``out``, a JSON list, and the pictures beside it; returns the list's path.

    For ``calib.json`` the pictures lie in ``calib_pictures``. The list comes last: it is there only
    if all pictures are.

    Args:
      progress: called with 1 after each sample.

    Raises:
      QuotaError: a bad argument, or something is in the way.
    """
    from PIL import Image

    from quota_jax.quant.sample_lists import new_list

    out = Path(out)
    drawn = draw_samples(count, seed=seed, family=family, questions=questions)
    if out.suffix != ".json":
        raise QuotaError(f"{out}: the list's name must end in .json")
    with new_list(out) as (folder, stem, entries):
        for sample in drawn:
            name = f"{sample.index:05d}.png"
            Image.fromarray(sample.pixels).save(folder / name)
            entries.append(
                {
                    "source": f"drawn scene {seed}/{sample.index}",
                    "image": f"{stem}/{name}",
                    "turns": list(sample.turns),
                }
            )
            if progress:
                progress(1)
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """Writes a list; exit status 0 done, 2 bad input, 130 interrupted."""
    # Pictures are drawn on the CPU, whatever else is there: the same pixels everywhere.
    os.environ["JAX_PLATFORMS"] = "cpu"
    parser = argparse.ArgumentParser(
        prog="python -m quota_jax.testbed.samples",
        description="Write drawn pictures with questions and answers as a list for calibration.",
        epilog="example: python -m quota_jax.testbed.samples calib.json --count 128 --seed 0",
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="the list, NAME.json; must not exist")
    parser.add_argument("--count", type=int, default=128, help="pictures; default 128")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument("--family", default="llava", help=f"one of {', '.join(SIZES)}")
    parser.add_argument("--questions", type=int, default=4, help="about each picture; default 4")
    arguments = parser.parse_args(argv)
    try:
        from tqdm import tqdm

        with tqdm(total=max(arguments.count, 0), desc="drawing", unit="picture") as bar:
            write_samples(
                arguments.out,
                arguments.count,
                seed=arguments.seed,
                family=arguments.family,
                questions=arguments.questions,
                progress=bar.update,
            )
    except QuotaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130
    print(f"wrote {arguments.out}: {arguments.count} samples")
    return 0


if __name__ == "__main__":
    sys.exit(main())
