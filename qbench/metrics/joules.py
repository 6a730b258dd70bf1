"""Energy counters of the hardware: RAPL for processors, NVML for NVIDIA GPUs."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from qbench.errors import Unsupported

POWERCAP = Path("/sys/class/powercap")


@dataclass(frozen=True)
class Counter:
    """An energy counter: the difference of two readings is the energy between them."""

    name: str
    read: Callable[[], float]
    """Joules since some moment in the past."""


def counter(device: Literal["cpu", "cuda"], root: Path = POWERCAP) -> Counter:
    """The counter of what the device uses.

    Raises:
        Unsupported: the machine has none, or it may not be read.
    """
    own, other = (nvml, lambda: rapl(root)) if device == "cuda" else (lambda: rapl(root), nvml)
    try:
        return own()
    except Unsupported as error:
        reason = str(error)
    try:
        useless = other().name
    except Unsupported as error:
        raise Unsupported(f"not measurable here: {reason}, {error}") from None
    raise Unsupported(f"not measurable here: {reason}, and {useless} is not of the {device}, where the network runs")


@dataclass
class _Domain:
    """One RAPL domain; its counter starts again from 0 when it reaches its range."""

    folder: Path
    range: int
    last: int
    total: int = field(default=0)

    def joules(self) -> float:
        now = int((self.folder / "energy_uj").read_text())
        self.total += (now - self.last) % (self.range + 1)
        self.last = now
        return self.total / 1e6


def rapl(root: Path = POWERCAP) -> Counter:
    """The processor packages and their memory, through Linux' powercap interface.

    Args:
        root: of the sysfs tree.

    Raises:
        Unsupported: there are no such counters, or they may not be read.
    """
    folders: dict[str, Path] = {}
    for folder in sorted(root.glob("*rapl:*")):
        name = _text(folder / "name")
        # Cores and graphics are part of their package.
        if name.startswith("package") or name == "dram":
            parent = _text(root / folder.name.rpartition(":")[0] / "name") if name == "dram" else ""
            folders.setdefault(f"{parent} {name}".strip(), folder)
    if not folders:
        raise Unsupported("no RAPL")
    try:
        domains = [
            _Domain(folder, int(_text(folder / "max_energy_range_uj")), int((folder / "energy_uj").read_text()))
            for folder in folders.values()
        ]
    except PermissionError:
        raise Unsupported(
            "RAPL may only be read by root (chmod a+r /sys/class/powercap/*/energy_uj allows it)"
        ) from None
    return Counter("RAPL " + " + ".join(folders), lambda: sum(domain.joules() for domain in domains))


def _text(path: Path) -> str:
    return path.read_text().strip() if path.is_file() else ""


def nvml() -> Counter:
    """The first GPU that this process may use, through nvidia-ml-py.

    Raises:
        Unsupported: there is no GPU, no driver, or the package nvidia-ml-py is not installed.
    """
    try:
        pynvml = importlib.import_module("pynvml")
    except ImportError:
        raise Unsupported("no NVML") from None
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError as error:
        raise Unsupported(f"no NVML ({error})") from None
    # The driver counts millijoules.
    return Counter("NVML", lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000)
