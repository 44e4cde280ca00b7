"""MME (Fu et al. 2023, arXiv 2306.13394): two yes-or-no questions about each picture.

Files: a folder per category with ``images/*`` and ``questions_answers_YN/*.txt``, or with all of
these flat; or parquet. A text file holds two lines: question, tab, Yes or No. A limit takes as many
pictures of each category.

Metrics, in MME's points:

- ``perception`` and ``cognition``: sums over categories of ``<category>/score``; ``total``: both.
- ``<category>/score`` = ``<category>/accuracy`` (percent of questions) +
  ``<category>/accuracy_plus`` (percent of pictures with both right). All of them by lmms-eval's
  parser.
- ``official_perception``, ``official_cognition``, ``official_total``: by the parser of MME's own
  script, which knows no "y" and keeps full stops.

Headline: ``total``; a unit is a picture, worth 0, 50 or 200, its stratum the category. Chance: a
coin for each question, 50 + 25 points a category.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from quota_jax.errors import QuotaError
from quota_jax.evaluate.answers import mme_official_yes_no, mme_yes_no
from quota_jax.evaluate.pictures import find_picture, inside
from quota_jax.evaluate.task import Instance, PictureSource, Scores, Settings, Task
from quota_jax.evaluate.tasks.numbers import percent
from quota_jax.evaluate.tasks.parquet import no_files, parquet_files, read_table
from quota_jax.evaluate.tasks.pope import SHORT_ANSWER
from quota_jax.evaluate.tasks.records import Row, read_text
from quota_jax.evaluate.tasks.subset import first, grouped

PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
CATEGORIES = PERCEPTION + COGNITION
PARQUET = ("data/test-*.parquet", "test-*.parquet", "*.parquet")
SUFFIXES = (".jpg", ".png", ".jpeg")
REQUEST = "Please answer yes or no."


@dataclass(frozen=True, kw_only=True)
class Mme(Task):
    """lmms-eval takes one blank and `REQUEST` out of the question, LLaVA all blanks before it."""

    def _read(self, data: Path, prompts: str, limit: int | None) -> list[Instance]:
        folder = data / self.name
        folders = sorted(
            entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")
        )
        if files := parquet_files(data, folder, PARQUET):
            return self._read_parquet(files, prompts, limit)
        if not folders:
            raise no_files(folder, "folders of categories", PARQUET)
        for entry in folders:
            if entry.name not in CATEGORIES:
                raise QuotaError(f"{entry}: no category of MME; known: {', '.join(CATEGORIES)}")
        order = sorted(folders, key=lambda entry: CATEGORIES.index(entry.name))
        parts = [_read_category(data, entry) for entry in order]
        return [
            _instance(
                each.row,
                each.category,
                each.image,
                each.turn,
                find_picture(data, [each.pictures], each.image, each.row.where, suffixes=SUFFIXES),
                prompts,
            )
            for each in first(parts, limit)
        ]

    @staticmethod
    def _read_parquet(files: Sequence[Path], prompts: str, limit: int | None) -> list[Instance]:
        table = read_table(files)
        pairs = []
        for place, row in enumerate(table.rows):
            category = row.one_of("category", CATEGORIES)
            image = PurePosixPath(row.text("question_id")).stem
            pairs.append(((category, image), place))
        groups = grouped(pairs)
        for group in groups:
            if len(group) != 2:
                raise table.rows[group[0]].fail(f"expected 2 questions a picture, {len(group)} are")
        names = dict.fromkeys(key for key, _ in pairs)
        parts = grouped(
            (category, [(place, category, image, turn) for turn, place in enumerate(group)])
            for (category, image), group in zip(names, groups, strict=True)
        )
        return [
            _instance(
                table.rows[place],
                category,
                image,
                turn,
                table.picture(place),
                prompts,
            )
            for place, category, image, turn in first(parts, limit)
        ]

    def _score(self, instances: Sequence[Instance], answers: Sequence[str]) -> Scores:
        metrics: dict[str, float] = {}
        units, strata = _units(instances, answers, mme_yes_no)
        official, _ = _units(instances, answers, mme_official_yes_no)
        for prefix, values in (("", units), ("official_", official)):
            for name, categories in (
                ("perception", PERCEPTION),
                ("cognition", COGNITION),
                ("total", CATEGORIES),
            ):
                metrics[prefix + name] = sum(_category_scores(values, strata, categories).values())
        for name, score in _category_scores(units, strata, CATEGORIES).items():
            own = [value for key, value in units.items() if strata[key] == name]
            plus = percent(value == 200 for value in own)
            metrics[f"{name}/score"] = score
            metrics[f"{name}/accuracy"] = score - plus
            metrics[f"{name}/accuracy_plus"] = plus
        return Scores(
            headline="total",
            metrics=metrics,
            units=units,
            strata=strata,
            chance=75.0 * len(set(strata.values())),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Question:
    """A line of a text file. image: the picture's name without suffix, in the folder pictures."""

    row: Row
    category: str
    image: str
    turn: int
    pictures: Path


def _read_category(data: Path, folder: Path) -> list[list[_Question]]:
    """Pairs of questions of one category, by name of the picture."""
    nested = folder / "questions_answers_YN"
    questions, pictures = (nested, folder / "images") if nested.is_dir() else (folder, folder)
    inside(data, questions, str(folder))
    paths = sorted(questions.glob("*.txt"))
    if not paths:
        raise QuotaError(f"{questions}: holds no question (*.txt)")
    pairs = []
    for path in paths:
        lines = [
            (number, line)
            for number, line in enumerate(read_text(data, path).splitlines(), 1)
            if line.strip()
        ]
        if len(lines) != 2:
            raise QuotaError(f"{path}: expected 2 questions, one a line, got {len(lines)}")
        pair = []
        for turn, (number, line) in enumerate(lines):
            where = f"{path}: line {number}"
            cells = line.split("\t")
            if len(cells) != 2:
                raise QuotaError(f"{where}: expected question, tab and answer")
            row = Row(where=where, fields={"question": cells[0], "answer": cells[1].strip()})
            pair.append(
                _Question(
                    row=row, category=folder.name, image=path.stem, turn=turn, pictures=pictures
                )
            )
        pairs.append(pair)
    return pairs


def _instance(
    row: Row, category: str, image: str, turn: int, picture: PictureSource, prompts: str
) -> Instance:
    question = row.text("question").strip()
    if prompts == "llava":
        question = question.replace(REQUEST, "").strip()
    else:
        question = question.replace(f" {REQUEST}", "")
    return Instance(
        key=f"{category}/{image}/{turn}",
        prompt=question + SHORT_ANSWER,
        pictures=(picture,),
        truth={
            "answer": row.one_of("answer", ("Yes", "No")).lower(),
            "category": category,
            "image": image,
        },
    )


def _units(
    instances: Sequence[Instance], answers: Sequence[str], parse: Callable[[str], str]
) -> tuple[dict[str, float], dict[str, str]]:
    """Points and category of every picture."""
    hits: dict[str, list[bool]] = {}
    strata = {}
    for each, answer in zip(instances, answers, strict=True):
        unit = f"{each.truth['category']}/{each.truth['image']}"
        strata[unit] = each.truth["category"]
        hits.setdefault(unit, []).append(parse(answer) == each.truth["answer"])
    for unit, pair in hits.items():
        if len(pair) != 2:
            raise QuotaError(
                f"mme: picture {unit} has {len(pair)} questions, 2 are scored together"
            )
    return {unit: 50.0 * sum(pair) + 100.0 * all(pair) for unit, pair in hits.items()}, strata


def _category_scores(
    units: Mapping[str, float], strata: Mapping[str, str], categories: Sequence[str]
) -> dict[str, float]:
    found = {}
    for category in categories:
        own = [value for unit, value in units.items() if strata[unit] == category]
        if own:
            found[category] = sum(own) / len(own)
    return found


TASK = Mme(name="mme", settings=Settings(max_new_tokens=16))
