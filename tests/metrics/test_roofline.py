"""Ceilings are measured, and what they allow is beside what was reached."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from deployable import finished

from qbench.metrics import roofline as module
from qbench.metrics.operations import Layer
from qbench.metrics.roofline import Ceilings, bounds, roofline


def test_each_layer_is_bound_by_what_is_slower() -> None:
    ceilings = Ceilings(integer_macs=4000.0, float_macs=1000.0, memory_bytes=100.0)
    heavy = Layer(macs=8000, weights=10, weight_bits=8, inputs=5, input_bits=8, outputs=5, integers=True)
    wide = Layer(macs=100, weights=400, weight_bits=32, inputs=5, input_bits=32, outputs=5, integers=False)
    assert bounds({"a": heavy}, ceilings, 1) == {"seconds": 2.0, "arithmetic": 1, "memory": 0}
    assert bounds({"a": wide}, ceilings, 1) == {"seconds": 16.4, "arithmetic": 0, "memory": 1}
    # Weights are read once for a batch.
    assert bounds({"a": wide}, ceilings, 10) == {"seconds": 20.0, "arithmetic": 0, "memory": 1}
    assert bounds({"a": heavy, "b": wide}, ceilings, 1)["seconds"] == 18.4


def test_expected_and_achieved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino")
    for name, value in (("_ROWS", 16), ("_COLUMNS", 64), ("_DEPTH", 64), ("_COPIED", 1 << 16)):
        monkeypatch.setattr(module, name, value)
    values = json.loads(json.dumps(roofline(finished(tmp_path), runtime="openvino", samples=5)))
    assert all(value > 0 for value in values["ceilings"].values())
    for name in ("quantized", "float"):
        expected = values["expected"][name]
        assert expected["seconds"] > 0
        assert expected["arithmetic"] + expected["memory"] == 2
        assert len(values[name]) == 5
    assert "quantized" not in roofline(finished(tmp_path, weights=False, inputs=False), samples=5)["expected"]
