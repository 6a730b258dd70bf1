"""What is computed once is read bit for bit, only for equal networks and images, and never trusted blindly."""

import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from qbench.quant.activations import StaticQuantizer, quantize_input
from qbench.sharing import Shared

IMAGES = ("pictures", 7)


def network(**changes: Any) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()).eval()
    if "bits" in changes:
        quantize_input(model[0], StaticQuantizer(changes["bits"], False, 1.0))
    if "shift" in changes:
        model[1].running_mean += changes["shift"]
    if "structure" in changes:
        model.__dict__["qbench_structure"] = changes["structure"]
    return model


class Computed:
    """Odd numbers, and how often they were asked for."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> dict[str, np.ndarray]:
        self.times += 1
        return {"file": np.random.default_rng(self.times).random(100), "a.b": np.array([np.nan, 0.1, -0.0])}


def test_computed_once_and_read_bit_for_bit(tmp_path: Path) -> None:
    compute = Computed()
    first = Shared(tmp_path).arrays("numbers", network(), IMAGES, compute)
    again = Shared(tmp_path).arrays("numbers", network(), IMAGES, compute)
    assert compute.times == 1
    assert first.keys() == again.keys() == {"file", "a.b"}
    assert all(first[key].tobytes() == again[key].tobytes() for key in first)
    assert first["file"].tobytes() == np.random.default_rng(1).random(100).tobytes()


@pytest.mark.parametrize(
    "other",
    [
        {"name": "others"},
        {"images": ("other pictures", 7)},
        {"origin": ["another model"]},
        {"network": network(bits=8)},
        {"network": network(shift=1e-6)},
        {"network": network(structure=[{"operation": "x"}])},
    ],
)
def test_nothing_is_shared_between_what_differs(tmp_path: Path, other: dict[str, Any]) -> None:
    compute = Computed()
    Shared(tmp_path, ["model"]).arrays("numbers", network(), IMAGES, compute)
    where = Shared(tmp_path, other.get("origin", ["model"]))
    where.arrays(other.get("name", "numbers"), other.get("network", network()), other.get("images", IMAGES), compute)
    assert compute.times == 2


def test_quantizers_differ_by_their_settings_too(tmp_path: Path) -> None:
    compute = Computed()
    for bits in (8, 4, 8):
        Shared(tmp_path).arrays("numbers", network(bits=bits), IMAGES, compute)
    assert compute.times == 2


@pytest.mark.parametrize("shared", [Shared(), Shared(Path("unused"))])
def test_without_a_folder_or_a_fingerprint_all_is_computed(shared: Shared) -> None:
    compute = Computed()
    for _ in range(2):
        shared.arrays("numbers", network(), IMAGES if shared._folder is None else ("", 7), compute)
    assert compute.times == 2
    assert not Path("unused").exists()


@pytest.mark.parametrize("harm", ["flip", "cut", "missing"])
def test_damage_is_noticed_and_mended(tmp_path: Path, harm: str) -> None:
    compute = Computed()
    Shared(tmp_path).arrays("numbers", network(), IMAGES, compute)
    (file,) = tmp_path.glob("*/arrays.npz")
    content = bytearray(file.read_bytes())
    if harm == "missing":
        file.unlink()
    elif harm == "flip":
        content[200] ^= 1
        file.write_bytes(content)
    else:
        file.write_bytes(content[:-50])
    mended = Shared(tmp_path).arrays("numbers", network(), IMAGES, compute)
    assert compute.times == 2
    assert mended["file"].tobytes() == np.random.default_rng(2).random(100).tobytes()
    Shared(tmp_path).arrays("numbers", network(), IMAGES, compute)
    assert compute.times == 2


def test_what_was_read_counts_as_if_it_had_been_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("qbench.sharing.time.perf_counter", lambda: clock[0])

    def slow() -> dict[str, np.ndarray]:
        clock[0] += 10
        return {}

    first, again = Shared(tmp_path), Shared(tmp_path)
    first.arrays("numbers", network(), IMAGES, slow)
    again.arrays("numbers", network(), IMAGES, slow)
    assert (first.seconds, first.images) == (0, 0)
    assert (again.seconds, again.images) == (10, 7)


def test_the_least_recently_used_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QBENCH_CACHE_GB", "0.00001")
    compute = Computed()
    for name in ("a", "b", "a"):
        Shared(tmp_path).arrays(name, network(), IMAGES, compute)
    assert compute.times == 3
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 1


def test_an_error_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail() -> dict[str, np.ndarray]:
        raise ValueError("not finite")

    with pytest.raises(ValueError, match="not finite"):
        Shared(tmp_path).arrays("numbers", network(), IMAGES, fail)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def _logged(folder: Path, log: Path) -> None:
    def compute() -> dict[str, np.ndarray]:
        with log.open("a") as file:
            file.write("x")
        return {"a": np.arange(1000)}

    found = Shared(folder).arrays("numbers", network(), IMAGES, compute)
    assert (found["a"] == np.arange(1000)).all()


def test_of_several_processes_one_computes(tmp_path: Path) -> None:
    log = tmp_path / "log"
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_logged, args=(tmp_path / "cache", log)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert log.read_text() == "x"
