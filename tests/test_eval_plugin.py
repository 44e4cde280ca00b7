"""lmms-eval, run offline as its users run it, gives the runner's answers and score.

Skipped where lmms-eval is not installed: it needs torch and some 30 packages more.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from converters import convert
from quota_jax.evaluate.lmms_manifest import manifest
from quota_jax.evaluate.runner import Evaluation
from quota_jax.evaluate.task import Settings
from quota_jax.recipe import Recipe
from tests.tiny_models import write_tiny_llava
from tests.tiny_task import TinyTask, write_questions

installed = pytest.mark.skipif(
    importlib.util.find_spec("lmms_eval") is None or importlib.util.find_spec("datasets") is None,
    reason="needs lmms-eval and datasets (see pyproject.toml, extra 'eval')",
)

TASK = """
task: tiny
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {data}/tiny.parquet
test_split: test
output_type: generate_until
doc_to_visual: !function functions.pictures
doc_to_text: !function functions.text
doc_to_target: parity
generation_kwargs: {{max_new_tokens: 5, temperature: 0, do_sample: false, until: ["cat"]}}
process_results: !function functions.results
metric_list:
  - {{metric: accuracy, aggregation: mean, higher_is_better: true}}
"""
FUNCTIONS = """
def pictures(doc):
    return doc["images"]

def text(doc, lmms_eval_specific_kwargs=None):
    return doc["prompt"]

def results(doc, results):
    return {"accuracy": float(len(results[0]) % 2 == doc["parity"])}
"""


def write_parquet(data: Path) -> None:
    from datasets import Dataset, Image, List

    rows = [json.loads(line) for line in (data / "tiny" / "tiny.jsonl").read_text().splitlines()]
    for row in rows:
        row["images"] = [str(data / "tiny" / name) for name in row["pictures"]]
    table = Dataset.from_list(rows).cast_column("images", List(Image()))
    table.to_parquet(data / "tiny.parquet")


@installed
def test_lmms_eval_gives_the_answers_and_the_score_of_the_runner(tmp_path: Path):
    convert(write_tiny_llava(tmp_path / "hf", num_layers=4, image_size=56), tmp_path / "ckpt")
    data = write_questions(tmp_path / "data", [2, 1, 2, 2, 2, 1, 2, 2, 1, 2])
    write_parquet(data)
    (data / "tiny.yaml").write_text(TASK.format(data=data))
    (data / "functions.py").write_text(FUNCTIONS)
    task = TinyTask(settings=Settings(max_new_tokens=5, until=("cat",)))
    evaluation = Evaluation(
        checkpoint=tmp_path / "ckpt",
        tasks=[task],
        data=data,
        out=tmp_path / "run",
        batch_size=2,
        recipe=Recipe.uniform(num_layers=4, layers=[1, 2], keep=0.3),
    )
    summary, _ = evaluation.run()
    options = f"checkpoint={tmp_path / 'ckpt'},keep=0.3,layers=1+2"
    command = [
        *(sys.executable, "-m", "lmms_eval", "--model", "quota_jax", "--model_args", options),
        *("--tasks", "tiny", "--include_path", str(data), "--batch_size", "3"),
        *("--log_samples", "--output_path", str(tmp_path / "lmms")),
    ]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        command, env={**os.environ, **offline}, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (samples,) = (tmp_path / "lmms").rglob("*samples_tiny.jsonl")
    logged = [json.loads(line) for line in samples.read_text().splitlines()]
    ours = [
        json.loads(line)["answer"]
        for line in (evaluation.out / "predictions.jsonl").read_text().splitlines()
    ]
    assert [row["filtered_resps"] for row in logged] == ours
    (results,) = (tmp_path / "lmms").rglob("*results.json")
    found = json.loads(results.read_text())["results"]["tiny"]["accuracy,none"]
    assert 100 * found == pytest.approx(summary.tasks["tiny"].score.value)


@installed
def test_the_installed_entry_point_is_found_by_lmms_eval() -> None:
    from lmms_eval.models.registry_v2 import ModelRegistryV2

    registry = ModelRegistryV2()
    registry.load_entrypoint_manifests()
    model = registry.get_model_class("quota_jax")
    assert (model.__name__, model.is_simple) == ("QuotaJax", False)


def test_the_entry_point_names_a_function_that_needs_no_lmms_eval(root: Path) -> None:
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    (value,) = project["entry-points"]["lmms_eval.models"].values()
    point = EntryPoint(name="quota_jax", value=value, group="lmms_eval.models")
    assert point.load() is manifest
