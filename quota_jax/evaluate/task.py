"""What a benchmark is to the runner: questions to ask, and a score for the answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from quota_jax.errors import QuotaError

PROMPTS = ("lmms-eval", "llava")


class PictureSource(Protocol):
    """A picture that is opened when asked for: hashable, and cheap to hold by the ten thousand."""

    @property
    def name(self) -> str:
        """The file, and the row inside it, for messages."""
        ...

    def load(self) -> Image.Image:
        """The decoded picture.

        Raises:
            QuotaError: it is missing or damaged; the message holds its name.
        """
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Instance:
    """One question.

    key: unique in its task, the same in every run and on every machine. prompt: the user's text;
        the pictures go before it, and it holds no placeholder and no chat template. truth: what the
        scorer needs, made of JSON's types.
    """

    key: str
    prompt: str
    pictures: tuple[PictureSource, ...]
    truth: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Greedy generation: at most ``max_new_tokens``; text from the first ``until`` on is cut."""

    max_new_tokens: int
    until: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """All numbers of a task. Shares are percentages; MME's are its own points.

    headline: the metric that stands for the task in tables. units: one value per resampling unit (a
    question; MMBench's circular group; MME's image). strata: unit -> stratum, units left out being
    in the stratum "". weights: stratum -> weight, 1 where left out. Always

        metrics[headline] = sum over strata of weight * mean of the stratum's units

    chance: expected headline of an answer given without looking, as each task's module defines it.
    """

    headline: str
    metrics: Mapping[str, float]
    units: Mapping[str, float]
    chance: float
    strata: Mapping[str, str] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """One benchmark, read from ``DATA/<name>``."""

    name: str
    settings: Settings

    def read(
        self, data: Path, *, prompts: str = "lmms-eval", limit: int | None = None
    ) -> list[Instance]:
        """The questions, checked; pictures are found but not opened.

        Args:
            data: the folder of all tasks. This one's files are official ones, or the hub's parquet
                files, in ``data / name``; symbolic links must not leave ``data``.
            prompts: "lmms-eval" or "llava", whose wording the prompts have.
            limit: take about the first ``limit`` questions. Groups that are scored together stay
                whole, and tasks of several files take as much from each (`quota_jax.evaluate.tasks`
                says which): at most ``limit`` questions, or one group where that is larger.

        Raises:
            QuotaError: something is missing or malformed; the message names the file and the row.
        """
        if prompts not in PROMPTS:
            raise QuotaError(f"no prompts {prompts!r}; known: {', '.join(PROMPTS)}")
        if limit is not None and (isinstance(limit, bool) or limit < 1):
            raise QuotaError(f"limit must be at least 1, got {limit!r}")
        data = Path(data)
        if not data.is_dir():
            raise QuotaError(f"{data}: no such folder")
        if not (data / self.name).is_dir():
            raise QuotaError(f"{data / self.name}: no such folder (the data of task {self.name})")
        return self._read(data, prompts, limit)

    def score(self, instances: Sequence[Instance], answers: Sequence[str]) -> Scores:
        """Scores of the model's texts, ``answers[i]`` being that to ``instances[i]``.

        Blanks around an answer never count, as in lmms-eval.

        Raises:
            QuotaError: no instances, or another number of answers.
        """
        if not instances:
            raise QuotaError(f"{self.name}: no questions to score")
        if len(instances) != len(answers):
            raise QuotaError(f"{self.name}: {len(instances)} questions, {len(answers)} answers")
        return self._score(instances, [answer.strip() for answer in answers])

    @abstractmethod
    def _read(self, data: Path, prompts: str, limit: int | None) -> list[Instance]: ...

    @abstractmethod
    def _score(self, instances: Sequence[Instance], answers: Sequence[str]) -> Scores: ...
