"""Memory of a process that runs the network's file, and nothing else."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from deployable import finished
from torch import nn

from qbench.errors import Unsupported
from qbench.metrics.memory import memory, peak_memory


@pytest.mark.parametrize("runtime", ["openvino", "onnxruntime"])
def test_both_networks_in_processes_of_their_own(runtime: str, tmp_path: Path) -> None:
    pytest.importorskip(runtime)
    values = memory(finished(tmp_path), runtime=runtime)  # type: ignore[arg-type]
    for name in ("quantized", "float"):
        assert 10 * 2**20 < values[name]["before"] <= values[name]["peak"] < 2**30


def test_a_large_network_takes_its_weights(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    small, large = (
        peak_memory(nn.Sequential(nn.Flatten(), nn.Linear(1024, n)), torch.zeros(1, 1, 32, 32), "onnxruntime", 1)
        for n in (8, 20_000)
    )
    assert large["peak"] - small["peak"] > 60 * 2**20


def test_the_float_reference_has_no_other_network(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    assert set(memory(finished(tmp_path, weights=False, inputs=False), runtime="onnxruntime")) == {"float"}


def test_what_openvino_only_simulates_has_none(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    with pytest.raises(Unsupported, match="weights only"):
        memory(finished(tmp_path, inputs=False))


def test_a_process_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    failed = subprocess.CompletedProcess([], 3, stdout="", stderr="Traceback\nImportError: no such thing\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(RuntimeError, match="exit code 3: ImportError: no such thing"):
        peak_memory(nn.Sequential(nn.Conv2d(1, 1, 1)), torch.zeros(1, 1, 4, 4), "onnxruntime", 1)
