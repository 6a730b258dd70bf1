"""Real time, in pairs, of what really runs."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from deployable import finished

from qbench.errors import Unsupported, UserError
from qbench.metrics.latency import interleave, latency, to_pyperf
from qbench.metrics.ratio import paired_ratio
from qbench.run import Measurement, Result


def test_raw_samples_of_both_networks_in_pairs(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    values = json.loads(json.dumps(latency(finished(tmp_path), samples=6, warmup=1)))
    assert [len(values[name]) for name in ("quantized", "float", "float_again")] == [6, 6, 6]
    assert all(0 < s < 1 for s in values["quantized"])
    assert (values["integer_layers"], values["claimed_layers"], values["compute_layers"]) == (2, 2, 2)
    assert values["agreement"]["images"] == values["agreement"]["same_first_guess"] == 4
    assert max(values["agreement"]["relative_difference"]) < 0.01
    assert len(values["agreement"]["noise"]) == 4


def test_a_runtime_with_integer_kernels_for_linear_layers_alone(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    values = latency(finished(tmp_path), runtime="onnxruntime", samples=5, warmup=1)
    assert (values["integer_layers"], values["claimed_layers"]) == (1, 2)
    assert values["saturates"] in (True, False)
    assert len(values["quantized"]) == 5


def test_the_float_reference_has_no_quantized_samples(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    values = latency(finished(tmp_path, weights=False, inputs=False), samples=5, warmup=1, batch_size=3)
    assert "quantized" not in values
    assert len(values["float"]) == len(values["float_again"]) == 5
    assert values["agreement"]["images"] == 3


def test_decoding_is_timed_with_the_network_where_it_is_asked_for(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    run = finished(tmp_path)
    with pytest.raises(Unsupported, match="decoding=true is for detectors"):
        latency(run, decoding=True, samples=5, warmup=1)
    seen: list[tuple[int, ...]] = []

    def decode(outputs: Any) -> list[Any]:
        time.sleep(0.002)
        seen.append(tuple(outputs.shape))
        return []

    run = replace(run, model=replace(run.model, decode=decode))
    values = latency(run, decoding=True, samples=5, warmup=1)
    assert set(seen) == {(1, 5)}
    assert min(values["quantized"] + values["float"]) > 0.002


def test_a_simulation_is_never_timed(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=r"^not deployable as integers: no input quantizers: weights only$"):
        latency(finished(tmp_path, inputs=False))


def test_more_threads_than_the_run_has_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="threads=64"):
        latency(finished(tmp_path), threads=64)


def test_the_order_rotates_and_each_round_has_one_sample_of_each() -> None:
    order: list[str] = []
    calls = {name: (lambda name=name: (order.append(name), time.sleep(0.003))) for name in "abc"}
    loops, times = interleave(calls, samples=6, warmup=1, seconds=60)
    assert loops == 1
    assert {name: len(series) for name, series in times.items()} == {"a": 6, "b": 6, "c": 6}
    assert "".join(order) == "abc" + "abcbcacab" * 2


def test_short_calls_are_repeated_within_a_sample() -> None:
    loops, times = interleave({"a": lambda: time.sleep(0.0002)}, samples=5, warmup=3, seconds=60)
    assert loops > 2
    assert all(0.0001 < s < 0.002 for s in times["a"][1:3])


def test_the_budget_ends_the_rounds() -> None:
    _, times = interleave({"a": lambda: time.sleep(0.01)}, samples=1000, warmup=1, seconds=0.1)
    assert 5 <= len(times["a"]) < 30


def test_ratio_of_a_known_answer() -> None:
    assert paired_ratio([1, 2, 3], [2, 4, 6]) == (0.5, 0.5, 0.5)
    ratios = list(range(1, 21))
    # n = 20: the sign test's 95 % interval is between the 6th and the 15th order statistic.
    assert paired_ratio(ratios, [1] * 20) == (10.5, 6, 15)
    assert paired_ratio([3, 1, 2], [1, 1, 1]) == (2, 1, 3)
    with pytest.raises(ValueError, match="paired"):
        paired_ratio([1.0], [])


def _result(values: dict[str, object]) -> Result:
    measured = Measurement(status="ok", unit="ms", direction="lower", values=values)
    return Result(
        key="0" * 12,
        label="digits/small/rtn/seed=0",
        identity={},
        recipe="rtn",
        status="ok",
        phase="done",
        started="2026-01-01T00:00:00+00:00",
        metrics={"latency[batch_size=8]": measured} if values else {},
    )


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
