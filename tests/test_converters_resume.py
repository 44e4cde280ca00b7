"""A killed `convert` leaves nothing or a folder that resumes to the same bytes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from converters import convert, export_hf
from quota_jax.checkpoint import open_checkpoint
from quota_jax.errors import QuotaError
from tests.tiny_models import assert_same_tensors, read_folder, write_tiny_llava

# Kills itself right before the n-th flush or rename: the points between which files change state.
CHILD = """
import os, signal, sys
from converters import convert

left = int(sys.argv[3])

def counted(function):
    def call(*arguments, **options):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return call

for name in ("fsync", "replace", "rename"):
    setattr(os, name, counted(getattr(os, name)))
print("ready", flush=True)
convert(sys.argv[1], sys.argv[2], progress=lambda *step: print(*step, flush=True))
print("calls", int(sys.argv[3]) - left, flush=True)
"""


def start(source: Path, out: Path, kill_at: int, root: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, str(source), str(out), str(kill_at)]
    # A process that is killed must not share the compilation cache: half an entry would stay, and
    # what it reads there would be counted with its own files.
    environment = {**os.environ, "PYTHONPATH": str(root), "JAX_ENABLE_COMPILATION_CACHE": "0"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def assert_nothing_loadable(out: Path) -> None:
    for path in (out, out.with_name(out.name + ".partial")):
        with pytest.raises(QuotaError):
            open_checkpoint(path)


def finished_blocks(out: Path) -> int:
    """Blocks that the partial folder holds in full."""
    journal = out.with_name(out.name + ".partial") / ".journal"
    return sum(file.name != "session.json" for file in journal.glob("*.json"))


def contents(checkpoint: Path) -> dict[str, list[tuple[str, str, tuple[int, ...], bytes]]]:
    """Every parameter's name, dtype, shape and bytes, by block."""
    opened = open_checkpoint(checkpoint)
    return {
        block: [
            (name, array.dtype.name, array.shape, array.tobytes())
            for name, array in sorted(opened.read_block(block).items())
        ]
        for block in opened.block_names
    }


@pytest.mark.slow
def test_killed_at_seeded_random_points(tmp_path: Path, root: Path) -> None:
    source = write_tiny_llava(tmp_path / "hf", num_layers=3, num_shards=2, dtype="bfloat16")
    undisturbed = tmp_path / "undisturbed"
    child = start(source, undisturbed, 10**9, root)
    output, _ = child.communicate(timeout=120)
    assert child.returncode == 0
    calls = int(output.split()[-1])
    assert calls > 50

    out = tmp_path / "out"
    rng = random.Random(20)
    for _ in range(4):  # each child takes up what the one before left
        child = start(source, out, rng.randint(1, calls // 5), root)
        child.communicate(timeout=120)
        assert child.returncode == -signal.SIGKILL
        assert_nothing_loadable(out)
    done = finished_blocks(out)
    steps: list[str] = []
    convert(source, out, progress=lambda done, total, name: steps.append(name))
    assert 0 < done < len(steps)
    assert contents(out) == contents(undisturbed)
    open_checkpoint(out).verify_checksums()
    assert not out.with_name("out.partial").exists()
    assert_same_tensors(read_folder(source), read_folder(export_hf(out, tmp_path / "back")))

    killed = 0
    for kill_at in rng.sample(range(calls - 8, calls + 1), 2):  # around the final rename
        late = tmp_path / f"late{kill_at}"
        child = start(source, late, kill_at, root)
        child.communicate(timeout=120)
        # Orbax's threads do not always make the same number of calls: it may have come through.
        assert child.returncode in (0, -signal.SIGKILL)
        assert child.returncode or late.exists()
        killed += child.returncode != 0
        if not late.exists():
            assert_nothing_loadable(late)
            convert(source, late)
        assert contents(late) == contents(undisturbed)
        open_checkpoint(late).verify_checksums()
    assert killed


def test_killed_by_the_clock(tmp_path: Path, root: Path) -> None:
    """A signal from outside lands anywhere, also inside a write."""
    source = write_tiny_llava(tmp_path / "hf", num_layers=12)
    out = tmp_path / "out"
    child = start(source, out, 10**9, root)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    child.stdout.readline()  # the first block is done
    time.sleep(random.Random(21).uniform(0, 0.2))
    child.kill()
    child.communicate()
    if child.returncode == -signal.SIGKILL:
        assert_nothing_loadable(out)
        convert(source, out)
    assert_same_tensors(read_folder(source), read_folder(export_hf(out, tmp_path / "back")))


def test_a_changed_source_or_option_starts_anew(tmp_path: Path) -> None:
    source = write_tiny_llava(tmp_path / "hf", seed=1)

    class Stop(Exception):
        pass

    def stop_at(step: int):
        def progress(done: int, total: int, name: str) -> None:
            if done == step:
                raise Stop

        return progress

    out = tmp_path / "out"
    with pytest.raises(Stop):
        convert(source, out, progress=stop_at(4))
    assert_nothing_loadable(out)
    write_tiny_llava(source, seed=2)
    with pytest.raises(Stop):
        convert(source, out, progress=stop_at(3))
    convert(source, out, dtype="float16")
    expected = convert(source, tmp_path / "expected", dtype="float16")
    assert contents(out) == contents(expected)
