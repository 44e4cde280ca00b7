"""One device, several devices and several processes give the same files."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from converters import convert
from quota_jax.errors import QuotaError
from quota_jax.evaluate.parallel import connect, local_mesh, put_rows
from quota_jax.evaluate.runner import Evaluation
from tests.tiny_models import write_tiny_llava
from tests.tiny_task import TinyTask, write_questions

BATCH = 2
FILES = ("run.json", "predictions.jsonl", "summary.json", "summary.md")


@pytest.mark.slow
def test_two_processes_of_eight_devices_write_what_one_device_writes(tmp_path: Path, root: Path):
    assert len(jax.local_devices()) == 1
    convert(write_tiny_llava(tmp_path / "hf", num_layers=2, image_size=56), tmp_path / "ckpt")
    # Batches of 16 rows: two full ones and one that leaves devices to filler rows alone; the second
    # process gets one of them.
    data = write_questions(tmp_path / "data", [2] * 35)
    evaluation = Evaluation(
        checkpoint=tmp_path / "ckpt",
        tasks=[TinyTask()],
        data=data,
        out=tmp_path / "one" / "run",
        batch_size=BATCH,
    )
    evaluation.run()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    many = tmp_path / "many" / "run"
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    children = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "tests.tiny_task"),
                *map(str, (tmp_path / "ckpt", data, many, BATCH, address, 2, process)),
            ],
            cwd=root,
            env={**os.environ, "XLA_FLAGS": flags},
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    errors = [child.communicate(timeout=180)[1] for child in children]
    assert [child.returncode for child in children] == [0, 0], errors
    for name in FILES:
        assert (many / name).read_bytes() == (evaluation.out / name).read_bytes(), name
    assert sorted(path.name for path in many.iterdir()) == sorted([*FILES, "timings.json"])
    times = (many / "timings.json").read_text()
    assert times.count('"devices": 8') == 2
    assert '"samples": 19' in times
    assert '"samples": 16' in times


def test_shards_are_laid_side_by_side() -> None:
    mesh = local_mesh(jax.devices()[:1])
    parts = [{"a": np.arange(6).reshape(2, 3) + shift} for shift in (0, 10)]
    joined = put_rows(mesh, parts)["a"]
    np.testing.assert_array_equal(joined, np.concatenate([part["a"] for part in parts]))
    assert joined.sharding.mesh == mesh


@pytest.mark.parametrize(("processes", "process"), [(None, 0), (2, None), (2, 2), (2, -1)])
def test_processes_are_counted_before_anything_is_joined(processes, process) -> None:
    with pytest.raises(QuotaError, match="process"):
        connect("127.0.0.1:1", processes, process)
