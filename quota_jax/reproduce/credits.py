"""What each question of a row earned, so small that a table can hold it: with that, rows can be
compared after the answers themselves are gone.

The credits of one task are a string, `VALUES NUMBER`. VALUES: the different values of its units
(`Scores.units`), ascending, between commas. NUMBER: all units as one number in hexadecimal. Its
digits, in base len(VALUES) or 2, are places in VALUES, the first unit being the highest digit:
`0.0,100.0 5` of four units are 0, 100, 0 and 100.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence

from quota_jax.errors import QuotaError
from quota_jax.evaluate.task import Instance, Scores


def encode_credits(scores: Mapping[str, Scores]) -> dict[str, str]:
    """The credits of all tasks of a run."""
    return {name: _encode(list(task.units.values())) for name, task in scores.items()}


def decode_credits(
    credits: Mapping[str, str],
    headlines: Mapping[str, float],
    like: Mapping[str, Scores],
    where: str,
) -> dict[str, Scores]:
    """Scores whose figures and intervals equal those of the run that the credits are of.

    headlines: the run's. like: scores of any run over the same questions, for all that does not
    depend on answers. Of the metrics only the headline comes back.

    Raises:
      QuotaError: the credits are of other units, or damaged.
    """
    found = {}
    for name, task in like.items():
        try:
            values = _decode(credits[name], len(task.units))
            headline = headlines[name]
        except (KeyError, ValueError, IndexError, AttributeError):
            raise QuotaError(
                f"{where}: the credits of {name} are not those of {len(task.units)} units"
            ) from None
        found[name] = dataclasses.replace(
            task,
            units=dict(zip(task.units, values, strict=True)),
            metrics={task.headline: headline},
        )
    return found


def _encode(values: Sequence[float]) -> str:
    kinds = sorted({float(value) for value in values})
    places = {kind: place for place, kind in enumerate(kinds)}
    base, number = max(2, len(kinds)), 0
    for value in values:
        number = number * base + places[float(value)]
    return f"{','.join(map(repr, kinds))} {number:x}"


def _decode(text: str, count: int) -> list[float]:
    kinds, rest = text.split(" ")
    values, number = [float(kind) for kind in kinds.split(",")], int(rest, 16)
    base, found = max(2, len(values)), []
    for _ in range(count):
        number, place = divmod(number, base)
        found.append(values[place])
    if number:
        raise ValueError(text)
    return found[::-1]


def digest_questions(questions: Mapping[str, Sequence[Instance]]) -> dict[str, str]:
    """Per task, a digest of the questions and truths in their order, without the pictures."""
    digests = {}
    for name, part in questions.items():
        told = [[each.key, each.prompt, dict(each.truth)] for each in part]
        content = json.dumps(told, sort_keys=True).encode()
        digests[name] = hashlib.sha256(content).hexdigest()[:12]
    return digests
