"""Measured times are what pyperf's own tools read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pyperf
import pytest
from ended import ended, measured

from qbench.errors import UserError
from qbench.run import Result
from qbench.timings import to_pyperf, write_pyperf


def _result(values: dict[str, object]) -> Result:
    latency = {"latency[batch_size=8]": measured(**values)} if values else {}
    return ended(label="digits/small/rtn/seed=0", metrics=latency)


def test_pyperf_reads_the_samples(tmp_path: Path) -> None:
    for name, scale in (("a", 1.0), ("b", 0.5)):
        samples = [scale * (0.010 + 0.0001 * i) for i in range(20)]
        suite = to_pyperf(_result({"loops": 1, "quantized": samples, "float": [0.01] * 20}))
        suite.dump(str(tmp_path / f"{name}.json"))
    assert suite.get_benchmark_names() == [
        "digits/small/latency[batch_size=8]/quantized",
        "digits/small/latency[batch_size=8]/float",
    ]
    command = [sys.executable, "-m", "pyperf", "compare_to", str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    assert "2.00x faster" in subprocess.check_output(command, text=True)


def test_without_latency_there_is_nothing_for_pyperf() -> None:
    with pytest.raises(UserError, match="has no latency"):
        to_pyperf(_result({}))


def test_show_writes_them(tmp_path: Path) -> None:
    result = _result({"loops": 3, "quantized": [0.01] * 6, "float": [0.02] * 6, "float_again": [0.02] * 6})
    folder = tmp_path / "results" / "suite"
    folder.mkdir(parents=True)
    (folder / f"{result.key}.json").write_text(result.model_dump_json())
    command = [sys.executable, "-m", "qbench", "show", result.key, "--results", str(tmp_path / "results")]
    for _ in range(2):  # the second time the file is replaced
        subprocess.check_call([*command, "--pyperf", str(tmp_path / "times.json")])
    written = pyperf.BenchmarkSuite.load(str(tmp_path / "times.json")).get_benchmarks()
    assert [len(benchmark.get_values()) for benchmark in written] == [6, 6, 6]
    assert written[0].get_metadata()["loops"] == 3
    with pytest.raises(UserError, match="cannot be written"):
        write_pyperf(result, tmp_path / "no" / "such" / "folder.json")
