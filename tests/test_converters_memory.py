"""The memory claim of `convert`, at a size that a test can afford."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [None, "float32"])
def test_peak_memory_stays_within_the_bound(tmp_path: Path, root: Path, dtype: str | None) -> None:
    command = [sys.executable, str(root / "examples" / "measure_convert_memory.py")]
    command += ["--gigabytes", "1", "--folder", str(tmp_path)]
    command += ["--dtype", dtype] if dtype else []
    environment = {**os.environ, "PYTHONPATH": str(root)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "within the bound" in result.stdout
    assert list(tmp_path.iterdir()) == []
