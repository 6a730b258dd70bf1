"""A deployed network that is not the one that was scored is shown as such."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from test_board import N, result

from qbench.board import tables
from qbench.markdown import frame, render
from qbench.metrics.ap import average_precision, match


def _parity(*, sqnr: float, noise: float, runtimes: tuple[str, ...] = ("openvino",)) -> dict[str, Any]:
    values = {"runtimes": {name: {"sqnr_db": [sqnr] * 3} for name in runtimes}, "noise_db": [noise] * 3}
    return {"status": "ok", "values": values}


def _table(deployed: dict[str, int], scored: int = 300, **metrics: Any) -> Any:
    run, correct = result("rtn[bits=8]", scored, **metrics)
    arrays = {"correct": correct} | {f"parity/{name}/correct": np.arange(N) < n for name, n in deployed.items()}
    (table,) = tables([run], {run.key: arrays}.__getitem__)
    return table


def test_both_scores_are_shown() -> None:
    table = _table({"openvino": 299}, parity=_parity(sqnr=31.2, noise=33))
    (row,) = table.rows
    assert row.cells["deployed_score"] == 299 / N
    assert row.cells["deployed_difference"].estimate == pytest.approx(-1 / N)
    assert row.warnings == []
    page = render([table], title="t")
    assert "74.75 (openvino, 31 dB)" in page
    assert "⚠" not in page


def test_a_score_that_is_another_raises_an_alarm() -> None:
    table = _table({"openvino": 280}, parity=_parity(sqnr=40, noise=40))
    assert "⚠ rtn[bits=8]: what openvino runs scores 70.00, which is -5.00 [" in render([table], title="t")
    assert "rtn[bits=8] ⚠" in render([table], title="t")
    assert "what openvino runs scores 70.00" in frame([table])["alarm"][0]


@pytest.mark.parametrize(
    ("sqnr", "noise", "loud"), [(20, 25, False), (20, 30, True), (35, 144, False), (29, 144, True)]
)
def test_noise_that_rounding_does_not_explain_raises_an_alarm(sqnr: float, noise: float, loud: bool) -> None:
    (row,) = _table({"openvino": 300}, parity=_parity(sqnr=sqnr, noise=noise)).rows
    assert bool(row.warnings) == loud
    if loud:
        assert f"answers with {sqnr:.1f} dB" in row.warnings[0]
        assert f"where rounding alone leaves {noise:.1f} dB" in row.warnings[0]


def test_the_runtime_whose_latency_was_measured_counts() -> None:
    parity = _parity(sqnr=40, noise=40, runtimes=("onnxruntime", "openvino"))
    both = {"onnxruntime": 290, "openvino": 300}
    assert _table(both, parity=parity).rows[0].cells["deployed_runtime"] == "onnxruntime"
    latency = {"float": [1.0], "float_again": [1.0], "quantized": [0.5], "integer_layers": 1, "compute_layers": 1}
    measured = {"status": "ok", "values": latency | {"runtime": "openvino"}}
    (row,) = _table(both, parity=parity, latency=measured).rows
    assert (row.cells["deployed_runtime"], row.cells["deployed_score"]) == ("openvino", 0.75)


def test_detectors_are_compared_by_their_matches() -> None:
    from qbench.datasets.base import Boxes

    targets = [Boxes(np.array([[0, 0, 9, 9]], dtype=np.float32), np.array([0])) for _ in range(20)]

    def arrays(found: int) -> dict[str, np.ndarray]:
        image = np.arange(found)
        boxes = np.tile(np.array([[0, 0, 9, 9]], dtype=np.float32), (found, 1))
        outcomes = {"image": image, "xyxy": boxes, "score": np.ones(found), "label": np.zeros(found, dtype=int)}
        matches = match(outcomes, targets, 1)
        assert average_precision(matches) == pytest.approx(found / 20, abs=0.01)
        return matches.to_arrays()

    run, _ = result("rtn[bits=8]", 0, parity=_parity(sqnr=40, noise=40))
    run.task = "detection"
    run.metrics["map"] = run.metrics["parity"].model_copy(update={"values": {"AP": 1.0, "AP50": 1.0, "AP75": 1.0}})
    kept = arrays(20) | {f"parity/openvino/{name}": array for name, array in arrays(10).items()}
    (table,) = tables([run], {run.key: kept}.__getitem__)
    assert table.rows[0].cells["deployed_difference"].estimate == pytest.approx(-0.5, abs=0.01)
    assert "scores 50" in table.rows[0].warnings[0]
