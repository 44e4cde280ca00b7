"""The model card of an exported folder, made from its JSON files."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quota_jax.errors import QuotaError
from quota_jax.testbed.learning.trainer import by_topic

TRAINING = "training.json"
CARD = "README.md"
_ABOUT = {
    "llava": (
        "Small LLaVA on drawn scenes",
        "LLaVA-1.5 (CLIP tower, feature layer -2, two-layer projector, LLaMA decoder)",
        "`USER: <image>\\nWhat color is the car? ASSISTANT:`",
    ),
    "qwen2_5_vl": (
        "Small Qwen2.5-VL on drawn scenes",
        "Qwen2.5-VL (window-attention tower, patch merger, decoder with multimodal rotation)",
        "the ChatML of its chat template, without a system message",
    ),
}
_ROWS = (
    ("seeing", "seeing"),
    ("picture zeroed", "blind"),
    ("majority answer", "majority"),
    ("held-out style", "held_out"),
)
_BENCHMARKS = textwrap.fill(
    "Test split of the seven drawn benchmarks. Of every ten of their pictures three are drawn in "
    "the held-out style, which training never showed, so that full precision leaves room above it.",
    100,
)


def table(columns: Sequence[str], rows: Mapping[str, Mapping[str, float]]) -> str:
    """A Markdown table of numbers; what a row lacks stays empty."""
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for label, values in rows.items():
        cells = (f"{values[name]:.1f}" if name in values else "" for name in columns)
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_card(folder: Path, scores: Sequence[Path] = ()) -> str:
    """Writes README.md of an exported folder and returns it.

    Args:
        scores: JSON files with more tables: {"title", "rows": {label: {column: number}}} and
            perhaps "columns" (their order), "text" (a paragraph above the table).

    Raises:
        QuotaError: a file is missing or has another form.
    """
    report = _read(folder / TRAINING)
    try:
        card = _card(report, [_section(path) for path in scores])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise QuotaError(f"{folder / TRAINING}: not a training report: {error!r}") from None
    partial = folder / (CARD + ".partial")
    partial.write_text(card, encoding="utf-8")
    partial.replace(folder / CARD)
    return card


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise QuotaError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise QuotaError(f"{path}: is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise QuotaError(f"{path}: must hold an object")
    return content


def _section(path: Path) -> str:
    content = _read(path)
    try:
        rows = content["rows"]
        columns = content.get("columns") or list(dict.fromkeys(c for r in rows.values() for c in r))
        text = f"{content['text']}\n\n" if content.get("text") else ""
        return f"## {content['title']}\n\n{text}{table(columns, rows)}"
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise QuotaError(f"{path}: not a table of scores: {error!r}") from None


def _weaknesses(report: Mapping[str, Any]) -> str:
    """The question types with the lowest scores, and what the held-out style costs."""
    seeing, blind = report["seeing"], report["blind"]
    weakest = sorted(seeing, key=lambda name: seeing[name])[:5]
    lines = [f"- {name}: {seeing[name]:.1f} % (blind {blind[name]:.1f} %)" for name in weakest]
    lost = {
        topic: value - by_topic(report["held_out"])[topic]
        for topic, value in by_topic(seeing).items()
    }
    worst = sorted(lost, key=lambda topic: -lost[topic])[:3]
    named = ", ".join(f"{topic} {lost[topic]:.1f}" for topic in worst)
    lines.append(f"- The held-out style costs most in (points): {named}.")
    lines.append("- Words outside its small vocabulary become `<unk>`; photographs mean nothing.")
    return "\n".join(lines)


def _card(report: Mapping[str, Any], sections: Sequence[str]) -> str:
    title, architecture, prompt = _ABOUT[report["family"]]
    rows = {label: report[key] for label, key in _ROWS}
    topics = {
        label: by_topic(scores) | {"mean": sum(scores.values()) / len(scores)}
        for label, scores in rows.items()
    }
    by_type = {
        name: {label: scores[name] for label, scores in rows.items() if name in scores}
        for name in report["seeing"]
    }
    sizes = ", ".join(f"{width} x {height}" for height, width in report["sizes"])
    about = _wrap(
        f"A {report['parameters'] / 1e6:.1f} M parameter model with exactly the architecture of "
        f"{architecture}, {report['decoder_layers']} decoder layers, trained from scratch on "
        "procedurally drawn scenes. It knows nothing but these scenes; it exists so that "
        "quantization and pruning can be tried and tested without a download."
    )
    data = _wrap(
        f"Pictures of {sizes} pixels (width x height) drawn during training, never repeated: 4 to "
        "14 objects of 18 to 80 px (30 kinds, 10 colors) that hide each other, up to 4 signs with "
        "numbers or words spelled letter by letter (letters of 10 to 30 px), clutter, and plain, "
        f"rotated and low-contrast styles. {report['num_questions']} questions per picture in the "
        "benchmarks' wordings (open, yes/no, choices with letters, hints), then a caption that "
        "names everything."
    )
    runs = [*report.get("earlier", []), report]
    recipe = "\n\n".join(f"{_run(run)}\n\n    {run['command']}" for run in runs)
    measure = _wrap(
        f"Exact match in percent on {report['eval_scenes']} scenes, one question of each type "
        'where the scene allows it. "Picture zeroed" is the same model without its eyes; '
        '"held-out style" draws the scenes in a way that training never shows.'
    )
    parts = [
        f"---\nlicense: apache-2.0\nlibrary_name: transformers\n"
        f"pipeline_tag: image-text-to-text\n---\n\n# {title}",
        about,
        f"Prompt: {prompt}",
        f"## Data\n\n{data}",
        f"## Recipe\n\n{recipe}",
        f"## Accuracy on unseen scenes\n\n{measure}",
        table(["mean", *by_topic(report["seeing"])], topics),
        table([label for label, _ in _ROWS], by_type),
        *([f"## On the drawn benchmarks\n\n{_BENCHMARKS}", *sections] if sections else []),
        f"## Known weaknesses\n\n{_weaknesses(report)}",
    ]
    return "\n\n".join(parts) + "\n"


def _run(report: Mapping[str, Any]) -> str:
    """What one training run did."""
    share = report.get("hint_share")
    hints = "" if share is None else f" {100 * share:.0f} % of the questions had a hint."
    return _wrap(
        f"{report['steps']} steps of {report['batch_size']} pictures ({report['pictures']} in all) "
        f"in {report['train_seconds']:.0f} s of training ({report['process_seconds']:.0f} s with "
        f"compilation and evaluation) on one {report['device']} with jax {report['jax']}, seed "
        f"{report['seed']}: Muon on matrices and AdamW elsewhere at {report['learning_rate']:g}, "
        f"falling over the last {100 * report['anneal_share']:.0f} % of the time; activations in "
        f"{report['dtype']}. Helper losses classified the patches (kind, color, letter); their "
        f"heads are not part of the model.{hints}"
    )


def _wrap(text: str) -> str:
    return textwrap.fill(text, 100)
