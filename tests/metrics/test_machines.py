"""Machines that lack something: a clear row, and no crash."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from deployable import finished

from qbench.errors import Unsupported
from qbench.metrics.energy import energy
from qbench.metrics.joules import counter
from qbench.metrics.latency import latency
from qbench.metrics.memory import memory
from qbench.metrics.parity import parity
from qbench.metrics.size import size
from qbench.metrics.throughput import throughput

NO_OPENVINO = "not deployable as integers: openvino is not installed (pip install 'qbench[openvino]')"


@pytest.fixture
def without_openvino(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)


@pytest.mark.usefixtures("without_openvino")
def test_without_openvino_another_runtime_is_taken(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    values = latency(finished(tmp_path), samples=5, warmup=1)
    assert values["runtime"] == "onnxruntime"
    assert values["considered"]["openvino"] == {"reason": NO_OPENVINO}
    assert parity(finished(tmp_path))["unable"]["openvino"] == NO_OPENVINO


@pytest.mark.usefixtures("without_openvino")
def test_without_any_runtime_each_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(Unsupported) as caught:
        latency(finished(tmp_path))
    assert f"openvino: {NO_OPENVINO}" in str(caught.value)
    assert "onnxruntime: not deployable as integers: onnxruntime is not installed" in str(caught.value)
    assert "torch: not deployable as integers: PyTorch has an integer kernel for none" in str(caught.value)
    with pytest.raises(Unsupported, match="openvino is not installed"):
        memory(finished(tmp_path))
    # The float network needs none.
    assert latency(finished(tmp_path, weights=False, inputs=False), samples=5, warmup=1)["runtime"] == "torch"


@pytest.mark.usefixtures("without_openvino")
def test_sizes_of_other_formats_have_their_reasons(tmp_path: Path) -> None:
    run = finished(tmp_path)
    run.artifact.write_bytes(b"anything")
    assert size(run, formats=("openvino",))["formats"]["openvino"] == {"reason": NO_OPENVINO}


def test_one_core_is_not_two(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    run = replace(finished(tmp_path), threads=1)
    with pytest.raises(Unsupported, match="threads=2, but this run may use 1 cores"):
        latency(run, threads=2)
    assert throughput(run, batch_size=2, samples=5, warmup=1)["threads"] == 1


def test_without_counters_nothing_is_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr("qbench.metrics.energy.deploy", lambda *_: pytest.fail("compiled"))
    monkeypatch.setattr("qbench.metrics.energy.counter", lambda device: counter(device, tmp_path))
    with pytest.raises(Unsupported, match=r"^not measurable here: no RAPL, no NVML$"):
        energy(finished(tmp_path))


def test_a_processor_without_vnni_is_measured_and_marked(tmp_path: Path) -> None:
    """oneDNN, which OpenVINO multiplies with, can be told to do without newer instructions."""
    pytest.importorskip("openvino")
    code = f"""
import json, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from deployable import finished
from qbench.machine import machine
from qbench.metrics.latency import latency
values = latency(finished(Path(sys.argv[1])), runtime="openvino", samples=5, warmup=1)
print(json.dumps({{"saturates": values["saturates"], "layers": values["integer_layers"], "machine": machine()}}))
"""
    limit = {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, env={**os.environ, **limit}, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    if "avx2" not in found["machine"]["cpu_flags"]:
        pytest.skip("this processor has no AVX2")
    assert found["saturates"] is True
    assert found["layers"] == 2
    assert found["machine"]["cpu_limits"] == limit
