"""Joules from counters, against a made-up machine."""

from __future__ import annotations

import sys
import time
import types
from pathlib import Path

import pytest
from deployable import finished

from qbench.errors import Unsupported
from qbench.metrics import energy as module
from qbench.metrics.energy import alternate, energy, millijoules
from qbench.metrics.joules import Counter, counter, nvml, rapl


def _domain(root: Path, folder: str, name: str, microjoules: int, top: int = 262143328850) -> Path:
    path = root / folder
    path.mkdir(parents=True)
    (path / "name").write_text(f"{name}\n")
    (path / "max_energy_range_uj").write_text(f"{top}\n")
    (path / "energy_uj").write_text(f"{microjoules}\n")
    return path / "energy_uj"


@pytest.fixture
def powercap(tmp_path: Path) -> Path:
    root = tmp_path / "powercap"
    (root / "intel-rapl").mkdir(parents=True)
    _domain(root, "intel-rapl:0", "package-0", 1_000_000)
    _domain(root, "intel-rapl:0:0", "core", 500_000)
    _domain(root, "intel-rapl:0:1", "dram", 200_000)
    _domain(root, "intel-rapl:1", "psys", 9_000_000)
    return root


def test_packages_and_memory_are_added_and_their_parts_are_not(powercap: Path) -> None:
    meter = rapl(powercap)
    assert meter.name == "RAPL package-0 + package-0 dram"
    before = meter.read()
    for folder, value in (("intel-rapl:0", 4_000_000), ("intel-rapl:0:0", 3e9), ("intel-rapl:0:1", 700_000)):
        (powercap / folder / "energy_uj").write_text(str(int(value)))
    assert meter.read() - before == pytest.approx(3.5)


def test_a_counter_that_wraps_around(tmp_path: Path) -> None:
    file = _domain(tmp_path, "intel-rapl:0", "package-0", 9_000_000, top=9_999_999)
    meter = rapl(tmp_path)
    readings = []
    for value in (9_500_000, 500_000, 400_000):
        file.write_text(str(value))
        readings.append(meter.read())
    assert readings == pytest.approx([0.5, 1.5, 11.4])


def test_a_machine_without_counters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    for device in ("cpu", "cuda"):
        with pytest.raises(Unsupported, match=r"^not measurable here: no (RAPL|NVML), no (NVML|RAPL)$"):
            counter(device, tmp_path)  # type: ignore[arg-type]


def test_counters_that_may_not_be_read(powercap: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    read = Path.read_text

    def refuse(self: Path, *args: object, **kwargs: object) -> str:
        if self.name == "energy_uj":
            raise PermissionError
        return read(self)

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(Unsupported, match="not measurable here: RAPL may only be read by root"):
        counter("cpu", powercap)


def _nvml(millijoules: list[int]) -> types.SimpleNamespace:
    return types.SimpleNamespace(
        NVMLError=OSError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=lambda i: i,
        nvmlDeviceGetTotalEnergyConsumption=lambda _: millijoules.pop(0),
    )


def test_nvml_counts_millijoules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", _nvml([5000, 5000, 7500]))
    meter = nvml()
    assert -(meter.read() - meter.read()) == 2.5


def test_a_gpu_says_nothing_about_the_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", _nvml([1, 2, 3]))
    with pytest.raises(Unsupported, match="no RAPL, and NVML is not of the cpu"):
        counter("cpu", tmp_path)


def test_idle_power_is_subtracted() -> None:
    windows = {
        "idle": [{"joules": 10.0, "seconds": 1.0, "images": 0}] * 3,
        "float": [{"joules": 50.0, "seconds": 2.0, "images": 100}],
        "quantized": [{"joules": 25.0, "seconds": 1.0, "images": 100}],
    }
    assert millijoules(windows) == {"float": [300.0], "quantized": [150.0]}


def test_windows_take_turns() -> None:
    begin = time.perf_counter()
    meter = Counter("a lamp of 7 W", lambda: 7 * (time.perf_counter() - begin))
    windows = alternate({"a": lambda: time.sleep(0.001)}, meter, images=4, rounds=3, seconds=0.02)
    assert {name: len(measured) for name, measured in windows.items()} == {"idle": 3, "a": 3}
    for window in windows["a"]:
        assert window["joules"] == pytest.approx(7 * window["seconds"], rel=0.05)
        assert window["images"] % 4 == 0
        assert window["images"] > 0


def test_the_metric_on_a_machine_with_a_counter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino")
    monkeypatch.setattr(module, "counter", lambda _: Counter("a clock", time.perf_counter))
    values = energy(finished(tmp_path), rounds=3, seconds=0.01)
    assert set(values["windows"]) == {"idle", "quantized", "float", "float_again"}
    assert values["counter"] == "a clock"
    assert values["integer_layers"] == 2
