"""Table 7: memory and power are read from the device, and said to be missing where it has none."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import re
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from converters import convert
from quota_jax.evaluate.tasks import TASKS
from quota_jax.quant.calibration_data import Sample
from quota_jax.reproduce import power
from quota_jax.reproduce.deployment_report import write_deployment
from quota_jax.reproduce.paper import PAPER
from quota_jax.reproduce.power import DeviceMeter, PowerMeter, visible_name
from quota_jax.reproduce.rows import FULL
from quota_jax.reproduce.study import Row, Study
from quota_jax.reproduce.tables import Table
from quota_jax.reproduce.weights import Weights
from tests.tiny_models import write_tiny_llava
from tests.tiny_task import TinyTask, write_questions


class Nvml:
    """NVML of one GPU that draws 250 W, and 1000 J a second by its energy counter."""

    def __init__(self, *, counts_energy: bool = True, tells_power: bool = True):
        self.counts_energy, self.tells_power = counts_energy, tells_power
        self.asked: list[Any] = []

    def nvmlInit_v2(self):
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, number, handle):
        self.asked.append(number)
        return 0 if number < 2 else 2

    def nvmlDeviceGetHandleByUUID(self, name, handle):
        self.asked.append(name)
        return 0

    def nvmlDeviceGetPowerUsage(self, handle, value):
        value._obj.value = 250_000
        return 0 if self.tells_power else 3

    def nvmlDeviceGetTotalEnergyConsumption(self, handle, value):
        value._obj.value = int(1e6 * time.perf_counter())
        return 0 if self.counts_energy else 3


def device(*, used: list[int] | None = None) -> Any:
    """A GPU whose memory in use takes these values in turn, the last one for good."""
    left = list(used or [])

    def memory_stats():
        if not left:
            return None
        return {"bytes_in_use": left.pop(0) if len(left) > 1 else left[0]}

    return SimpleNamespace(platform="gpu", local_hardware_id=1, memory_stats=memory_stats)


@pytest.mark.parametrize(("counts_energy", "watts"), [(True, 1000), (False, 250)])
def test_power_and_memory_of_a_device(monkeypatch, counts_energy: bool, watts: float) -> None:
    library = Nvml(counts_energy=counts_energy)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with DeviceMeter([device(used=[5, 70, 20])]) as meter:
        time.sleep(0.1)
    assert library.asked == [1]
    assert meter.peak_bytes == 70
    assert meter.watts == pytest.approx(watts, rel=0.05)
    assert 0.1 <= meter.seconds < 5


def test_what_a_device_does_not_tell_is_missing(monkeypatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Nvml(tells_power=False))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with DeviceMeter([device()]) as meter:
        pass
    assert (meter.has_power, meter.watts, meter.peak_bytes) == (False, None, None)
    assert PowerMeter.of(Nvml(), 7) is None

    def absent(name):
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", absent)
    assert PowerMeter.open(device()) is None


def test_devices_are_named_as_they_are_visible() -> None:
    assert visible_name(1, None) == 1
    assert visible_name(1, "3, 5") == 5
    assert visible_name(0, "GPU-8b2c") == "GPU-8b2c"
    assert visible_name(0, "MIG-8b2c") is None
    assert visible_name(1, "3") is None
    library = Nvml()
    assert PowerMeter.of(library, "GPU-8b2c") is not None
    assert library.asked == [b"GPU-8b2c"]


def test_who_measures_has_the_device_alone(tmp_path) -> None:
    study = Study(
        source=tmp_path, data=tmp_path, pool=[Sample(text="?")], num_samples=1, out=tmp_path / "out"
    )
    entered = threading.Event()

    def measure() -> None:
        with study._device(True):
            entered.set()

    with study._device(False), study._device(False):  # others share it
        waiting = threading.Thread(target=measure)
        waiting.start()
        assert not entered.wait(0.2)
    waiting.join(timeout=60)
    assert entered.is_set()


@pytest.mark.slow
def test_a_measured_run_answers_as_any_other(tmp_path, monkeypatch) -> None:
    """Its answers and scores are those of the plain run; on a CPU the table says what is missing,
    and on a device that tells, it has the figures."""
    convert(write_tiny_llava(tmp_path / "hf", num_layers=3, image_size=56), tmp_path / "source")
    monkeypatch.setitem(TASKS, "tiny", TinyTask())
    study = Study(
        source=tmp_path / "source",
        data=write_questions(tmp_path / "data", [1] * 6),
        pool=[Sample(text="what is a car ?")],
        num_samples=1,
        out=tmp_path / "out",
        tasks=("tiny",),
        batch_size=4,
        max_new_tokens=4,
        text_bucket=32,
    )
    low = Row(label="4 bits", weights=Weights(method="rtn", bits="W4A8KV4"))
    plain, rows = (FULL, low), [dataclasses.replace(row, measured=True) for row in (FULL, low)]
    told: list[str] = []
    assert study.run([*rows[:1], *plain], told.append, threads=2)
    assert told[-1] == "full precision (full_measured): measured"  # when nothing else runs
    monkeypatch.setattr(power.PowerMeter, "open", lambda device: PowerMeter.of(Nvml(), 0))
    monkeypatch.setattr("quota_jax.reproduce.deployment.MIN_SECONDS", 0.01)
    assert study.run(rows[1:], told.append)
    assert sum("measured" in line for line in told) == 2
    assert study.run(rows, lambda line: pytest.fail(line))
    for one, other in zip(plain, rows, strict=True):
        assert one.run_name != other.run_name
        paths = [study.folder(row) / "predictions.jsonl" for row in (one, other)]
        assert paths[0].read_bytes() == paths[1].read_bytes()

    unrun = Row(label="never run", blind=True, measured=True)
    table = Table(name="table7", title="Deployed", rows=(unrun, *rows), baseline=rows[0])
    provenance = {"command": "quota-jax reproduce table7"}
    found, text = write_deployment(
        study,
        table,
        tmp_path / "tables",
        provenance=provenance,
        paper=PAPER["table7"].markdown(),
    )
    content = json.loads(found.read_text())
    assert content["left out"] == ["1 of 3 rows not run: never run"]
    first, second = (row["deployment"] for row in content["rows"])
    assert first["tasks"]["tiny"]["watts"] is first["tasks"]["tiny"]["peak_bytes"] is None
    assert first["tasks"]["tiny"]["passes"] == 1
    assert second["tasks"]["tiny"]["watts"] == pytest.approx(1000, rel=0.05)
    assert second["file_bytes"] < first["file_bytes"]
    lines = text.read_text().splitlines()
    assert "| tiny | not measured | not measured |" in lines
    (power_line,) = (x for x in lines if re.fullmatch(r"\| tiny \| not measured \| [0-9.]+ \|", x))
    assert float(power_line.split()[-2]) == pytest.approx(1000, rel=0.05)
    assert any(line.startswith("| MME | 1767.46 | 1714.72 | 14.75 | 5.45 |") for line in lines)
