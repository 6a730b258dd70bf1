"""Batches on all cores."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from deployable import finished
from ended import ended, measured

from qbench.errors import Unsupported
from qbench.judges import judge_metrics
from qbench.metrics.throughput import throughput


def test_batches_on_all_cores_of_the_run(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    values = throughput(finished(tmp_path), batch_size=4, samples=5, warmup=1)
    assert (values["batch_size"], values["threads"]) == (4, 1)
    assert len(values["quantized"]) == len(values["float"]) == 5
    both = replace(finished(tmp_path), threads=2)
    assert throughput(both, batch_size=4, samples=5, warmup=1)["threads"] == 2
    with pytest.raises(Unsupported, match="threads=3, but this run may use 2"):
        throughput(both, threads=3)


def test_images_per_second_and_their_ratio() -> None:
    values = {"batch_size": 8, "quantized": [0.1, 0.2, 0.1], "float": [0.4, 0.8, 0.4], "float_again": [0.4] * 3}
    run = ended(metrics={"throughput": measured(**values)})
    cells, _ = judge_metrics([run])
    assert cells["images_per_second"] == pytest.approx(80)
    assert cells["float_images_per_second"] == pytest.approx(20)
    assert cells["throughput_ratio"].estimate == pytest.approx(4)
