"""Interrupted writing: nothing half-made is ever loadable, and going on gives the same arrays."""

from __future__ import annotations

import logging
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from quota_jax.checkpoint import CheckpointWriter, open_checkpoint
from quota_jax.errors import QuotaError
from tests.checkpoint_samples import (
    W4,
    assert_same,
    random_blocks,
    tiny_config,
    write,
    writer,
)

ROOT = Path(__file__).resolve().parent.parent

# Writes a checkpoint and kills itself, without any clean-up, at the n-th file system event after
# the writer was made (0: never). Prints the number of events.
KILLED = """
import os, signal, sys
from pathlib import Path
from tests.checkpoint_samples import W4, random_blocks, tiny_config, writer
config = tiny_config()
arrays = random_blocks(config, W4)
out, limit, count = writer(Path(sys.argv[1]), config, W4), int(sys.argv[2]), 0
def hook(event, arguments):
    global count
    if event == "open" or event.startswith(("os.", "shutil.")):
        count += 1
        if count == limit:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
with out:
    for name, params in arrays.items():
        if name not in out.finished:
            out.write_block(name, params)
    out.finish()
print(count)
"""


# A process that is killed adds nothing to the compilation cache: half an entry would stay.
ENVIRONMENT = {**os.environ, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1e9"}


def run_killed(path: Path, limit: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", KILLED, str(path), str(limit)],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
    )


def finish(path: Path, arrays, config, quantization=W4) -> frozenset[str]:
    """Resumes and completes; returns the blocks that did not have to be written again."""
    with writer(path, config, quantization) as out:
        done = out.finished
        for name in out.missing:
            out.write_block(name, arrays[name])
        out.finish()
    return done


def assert_complete(path: Path, arrays) -> None:
    checkpoint = open_checkpoint(path)
    checkpoint.verify_checksums()
    for name, params in arrays.items():
        assert_same(checkpoint.read_block(name), params)
    assert not path.with_name(path.name + ".partial").exists()


@pytest.mark.slow
def test_sigkill_at_random_points_leaves_nothing_or_a_resumable_rest(tmp_path):
    config = tiny_config()
    arrays = random_blocks(config, W4)
    unkilled = run_killed(tmp_path / "whole", 0)
    assert unkilled.returncode == 0, unkilled.stderr
    events = int(unkilled.stdout)
    assert_complete(tmp_path / "whole", arrays)

    rng = random.Random(20)
    # One point anywhere in each sixth of the run, and one among its last events (manifest, rename).
    points = [rng.randrange(i * events // 6, (i + 1) * events // 6) + 1 for i in range(6)]
    points.append(events - rng.randrange(2, 12))
    resumed = []
    for point in points:
        path = tmp_path / f"killed_{point}"
        killed = run_killed(path, point)
        if killed.returncode == 0 and int(killed.stdout) < point:
            # Orbax's threads make a few events more or less: this run ended before the point.
            assert point > events - 12
            assert_complete(path, arrays)
            continue
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        partial = path.with_name(path.name + ".partial")
        if path.exists():  # killed after the rename: then it is whole
            assert not partial.exists()
        else:
            for folder in (path, partial):
                with pytest.raises(QuotaError, match=r"unfinished|no such checkpoint"):
                    open_checkpoint(folder)
            resumed.append(len(finish(path, arrays, config)))
        assert_complete(path, arrays)
    # The points were spread well enough: early, middle and complete sets of blocks were taken over.
    assert min(resumed) < 3
    assert any(3 <= count < len(arrays) for count in resumed)


def test_sigkill_at_a_random_time(tmp_path):
    """Not at a call of ours but anywhere, TensorStore's threads included."""
    config = tiny_config()
    arrays = random_blocks(config, W4)
    rng = random.Random(7)
    for trial in range(3):
        path = tmp_path / f"killed_{trial}"
        partial = path.with_name(path.name + ".partial")
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(path), "0"],
            cwd=ROOT,
            env=ENVIRONMENT,
            stdout=subprocess.DEVNULL,
        )
        state = partial / "state"
        while not state.exists() and process.poll() is None and not path.exists():
            pass
        try:
            process.wait(timeout=rng.uniform(0, 0.15))
        except subprocess.TimeoutExpired:
            process.kill()
        process.wait()
        if not path.exists():
            with pytest.raises(QuotaError, match="unfinished"):
                open_checkpoint(partial)
            finish(path, arrays, config)
        assert_complete(path, arrays)


def test_an_exception_keeps_the_finished_blocks(tmp_path):
    config = tiny_config()
    arrays = random_blocks(config, W4)
    names = list(arrays)

    def interrupted():
        with writer(tmp_path / "ckpt", config, W4) as out:
            for name in names[:4]:
                out.write_block(name, arrays[name])
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        interrupted()
    assert not (tmp_path / "ckpt").exists()
    stamp = {f: f.stat().st_mtime_ns for f in (tmp_path / "ckpt.partial/state").rglob("*")}
    assert finish(tmp_path / "ckpt", arrays, config) == set(names[:4])
    assert_complete(tmp_path / "ckpt", arrays)
    for file, time in stamp.items():
        moved = tmp_path / "ckpt" / file.relative_to(tmp_path / "ckpt.partial")
        if moved.is_file():
            assert moved.stat().st_mtime_ns == time, "a finished block was written again"


@pytest.mark.parametrize("change", ["fingerprint", "quantization", "config"])
def test_another_source_starts_anew_and_says_so(tmp_path, caplog, change):
    config = tiny_config()
    with writer(tmp_path / "ckpt", config, W4) as out:
        out.write_block("head", random_blocks(config, W4)["head"])
    quantization, options = W4, {}
    if change == "fingerprint":
        options = {"fingerprint": "source-2"}
    elif change == "quantization":
        quantization = type(W4).parse("W4A8KV4")
    else:
        config = tiny_config(vocab=50)
    arrays = random_blocks(config, quantization, seed=1)
    with writer(tmp_path / "ckpt", config, quantization, **options) as out:
        assert out.finished == frozenset()
        assert "starting anew" in caplog.text
        for name, params in arrays.items():
            out.write_block(name, params)
        out.finish()
    assert_complete(tmp_path / "ckpt", arrays)


def test_damaged_and_half_written_blocks_are_written_again(tmp_path, caplog):
    config = tiny_config()
    arrays = random_blocks(config, W4)
    names = list(arrays)
    with writer(tmp_path / "ckpt", config, W4) as out:
        for name in names[:5]:
            out.write_block(name, arrays[name])
    state = tmp_path / "ckpt.partial" / "state"
    data = max(
        (f for f in (state / names[0]).rglob("*") if f.is_file()), key=lambda f: f.stat().st_size
    )
    flip(data)
    (tmp_path / "ckpt.partial" / ".journal" / f"{names[1]}.json").write_text("{")
    (tmp_path / "ckpt.partial" / ".journal" / f"{names[2]}.json").unlink()
    shutil.rmtree(state / names[3])
    (state / "leftover").mkdir()
    assert finish(tmp_path / "ckpt", arrays, config) == {names[4]}
    assert caplog.text.count("will be written again") == 3
    assert_complete(tmp_path / "ckpt", arrays)
    assert not (tmp_path / "ckpt" / "state" / "leftover").exists()


def test_one_writer_at_a_time(tmp_path):
    config = tiny_config()
    with writer(tmp_path / "ckpt", config):
        with pytest.raises(QuotaError, match="being written by another process"):
            writer(tmp_path / "ckpt", config).__enter__()
        other = subprocess.run(
            [sys.executable, "-c", KILLED, str(tmp_path / "ckpt"), "0"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert other.returncode == 1
        assert "being written by another process" in other.stderr
    with writer(tmp_path / "ckpt", config) as out:
        assert out.finished == frozenset()


def test_what_is_in_the_way_is_left_alone(tmp_path):
    config = tiny_config()
    arrays = random_blocks(config)
    for name in ("file", "folder", "link"):
        path = tmp_path / name
        path.mkdir() if name == "folder" else path.touch() if name == "file" else None
        if name == "link":
            path.symlink_to(tmp_path / "nowhere")
        with pytest.raises(QuotaError, match=f"{name} already exists"):
            writer(path, config)
    foreign = tmp_path / "ckpt.partial"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    with pytest.raises(QuotaError, match="not an unfinished checkpoint"):
        writer(tmp_path / "ckpt", config).__enter__()
    assert (foreign / "thesis.txt").read_text() == "mine"
    (tmp_path / "b.partial").symlink_to(foreign)
    with pytest.raises(QuotaError, match=r"b\.partial is in the way"):
        writer(tmp_path / "b", config).__enter__()
    with pytest.raises(QuotaError, match=r"d\.partial: names ending in \.partial are reserved"):
        writer(tmp_path / "d.partial", config)
    with pytest.raises(QuotaError, match="absent is not a folder"):
        writer(tmp_path / "absent" / "ckpt", config)
    with writer(tmp_path / "c", config) as out:
        for name, params in arrays.items():
            out.write_block(name, params)
        (tmp_path / "c").mkdir()
        with pytest.raises(QuotaError, match="c already exists"):
            out.finish()


def test_the_writer_is_only_usable_inside_its_with_block(tmp_path):
    config = tiny_config()
    out = writer(tmp_path / "ckpt", config)
    assert isinstance(out, CheckpointWriter)
    with pytest.raises(RuntimeError, match="outside its with block"):
        _ = out.finished
    write(tmp_path / "ckpt", config, random_blocks(config))
    with pytest.raises(QuotaError, match="already exists"):
        out.__enter__()
    assert not (tmp_path / "ckpt.partial").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_folder_is_named(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(QuotaError, match="cannot be written: Permission denied"):
        writer(tmp_path / "locked" / "ckpt", tiny_config()).__enter__()


def test_resuming_is_logged(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    config = tiny_config()
    with writer(tmp_path / "ckpt", config) as out:
        out.write_block("head", random_blocks(config)["head"])
    assert caplog.records == []
    with writer(tmp_path / "ckpt", config):
        assert "resuming, 1 of 10 blocks are done" in caplog.text


def flip(file: Path) -> None:
    """Inverts one byte in the middle of a file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(content)
