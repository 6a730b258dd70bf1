"""Real time, in pairs, of what really runs."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from deployable import finished

from qbench import registry
from qbench.errors import Unsupported
from qbench.metrics.latency import latency
from qbench.metrics.ratio import paired_ratio, quantile


def test_raw_samples_of_both_networks_in_pairs(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    values = json.loads(json.dumps(latency(finished(tmp_path), runtime="openvino", samples=6, warmup=1)))
    assert [len(values[name]) for name in ("quantized", "float", "float_again")] == [6, 6, 6]
    assert all(0 < s < 1 for s in values["quantized"])
    assert (values["integer_layers"], values["claimed_layers"], values["compute_layers"]) == (2, 2, 2)
    assert values["agreement"]["images"] == values["agreement"]["same_first_guess"] == 4
    assert max(values["agreement"]["relative_difference"]) < 0.01
    assert len(values["agreement"]["noise"]) == 4
    assert values["considered"][values["runtime"]]["integer_layers"] == 2
    assert values["preparing_seconds"] > 0


def test_left_to_itself_it_takes_the_fastest_and_says_why(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    values = latency(finished(tmp_path), samples=5, warmup=1)
    assert set(values["considered"]) == set(registry.index("runtime"))
    assert "reason" in values["considered"]["torch"]
    assert values["runtime"] == "openvino"  # onnxruntime leaves the convolution in float


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


def test_ratio_of_a_known_answer() -> None:
    assert paired_ratio([1, 2, 3], [2, 4, 6]) == (0.5, 0.5, 0.5)
    ratios = list(range(1, 21))
    # n = 20: the sign test's 95 % interval is between the 6th and the 15th order statistic.
    assert paired_ratio(ratios, [1] * 20) == (10.5, 6, 15)
    assert paired_ratio([3, 1, 2], [1, 1, 1]) == (2, 1, 3)
    with pytest.raises(ValueError, match="paired"):
        paired_ratio([1.0], [])


def test_quantiles_are_given_where_samples_suffice() -> None:
    assert quantile(range(28), 0.9) is None
    assert quantile(range(29), 0.9) == 26
    assert quantile(range(298), 0.99) is None
    assert quantile(range(299), 0.99) == 296
