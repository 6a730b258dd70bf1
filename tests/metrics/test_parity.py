"""The deployed network's outcomes are measured, and differences that rounding does not explain are seen."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from deployable import finished
from torch import Tensor

from qbench.datasets.base import Boxes
from qbench.errors import Unsupported
from qbench.metrics import parity as module
from qbench.metrics.ap import match
from qbench.metrics.parity import parity
from qbench.models.base import Detections
from qbench.runtimes.base import Compiled, flatten, unflatten
from qbench.runtimes.choice import Candidate


def test_outcomes_of_every_image_by_every_runtime(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    run = finished(tmp_path)
    values = parity(run)
    arrays = values.pop("outcomes")
    values = json.loads(json.dumps(values))
    assert values["images"] == 13
    assert "PyTorch" in values["unable"]["torch"]
    found = values["runtimes"]["openvino"]
    assert (found["integer_layers"], found["compute_layers"], found["claimed_layers"]) == (2, 2, 2)
    assert len(found["sqnr_db"]) == len(values["noise_db"]) == 13
    assert min(found["sqnr_db"]) > 40
    assert arrays["openvino/prediction"].tolist() == run.outcomes["prediction"].tolist()
    assert arrays["openvino/correct"].tolist() == run.outcomes["correct"].tolist()
    assert found["flips"] == 0


def test_one_runtime_that_is_asked_for(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    values = parity(finished(tmp_path), runtime="openvino")
    assert list(values["runtimes"]) == ["openvino"]
    assert values["unable"] == {}


def _made(monkeypatch: pytest.MonkeyPatch, change: object) -> None:
    """A runtime that runs the network in PyTorch, and changes its outputs."""

    def candidates(_: str, network: torch.nn.Module, example: Tensor, threads: int) -> object:
        @torch.no_grad()
        def run(batch: np.ndarray) -> list[np.ndarray]:
            assert len(batch) == len(example)
            return [t.numpy() for t in flatten(change(network(torch.from_numpy(batch))))]  # type: ignore[operator]

        return [Candidate("made", None, Compiled(run, 1, 1, ("0",), {}))], {}  # type: ignore[arg-type]

    monkeypatch.setattr(module, "candidates", candidates)


def test_what_it_says_of_a_runtime_that_errs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = finished(tmp_path)
    _made(monkeypatch, lambda y: 1.1 * y)
    values = parity(run)
    assert values["runtimes"]["made"]["sqnr_db"] == pytest.approx([20] * 13, abs=1e-3)
    assert values["runtimes"]["made"]["flips"] == 0
    _made(monkeypatch, lambda y: -y)
    values = parity(run)
    assert values["runtimes"]["made"]["sqnr_db"] == pytest.approx([-20 * np.log10(2)] * 13, abs=1e-3)
    assert values["runtimes"]["made"]["flips"] == 13
    _made(monkeypatch, lambda y: y)
    assert parity(run)["runtimes"]["made"]["sqnr_db"] == pytest.approx([144.49] * 13, abs=0.01)


def test_detectors_keep_boxes_and_matches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = finished(tmp_path)
    targets = [Boxes(np.array([[1, 1, 4, 4]], dtype=np.float32), np.array([i % 5])) for i in range(13)]
    run.images.split = replace(run.images.split, targets=targets)

    def decode(outputs: Tensor) -> list[Detections]:
        box = torch.tensor([[1.0, 1.0, 4.0, 4.0]])
        return [Detections(box, row.max()[None], row.argmax()[None]) for row in outputs]

    run = replace(run, model=replace(run.model, task="detection", decode=decode))
    _made(monkeypatch, lambda y: y)
    values = parity(run)
    arrays = {name.removeprefix("made/"): array for name, array in values["outcomes"].items()}
    assert arrays["image"].tolist() == list(range(13))
    wanted = match(arrays, targets, 5).to_arrays()
    assert all(np.array_equal(arrays[name], array) for name, array in wanted.items())
    assert "flips" not in values["runtimes"]["made"]


def test_float_networks_have_nothing_to_compare(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=r"^nothing is quantized$"):
        parity(finished(tmp_path, weights=False, inputs=False))
    with pytest.raises(Unsupported, match="no input quantizers: weights only"):
        parity(finished(tmp_path, inputs=False))


def test_nested_outputs_are_put_together_again() -> None:
    outputs = {"a": [torch.zeros(1), (torch.ones(2), torch.ones(3))], "b": torch.zeros(4)}
    again = unflatten(outputs, flatten(outputs))
    assert [t.shape for t in flatten(again)] == [t.shape for t in flatten(outputs)]
    assert isinstance(again["a"], list)
    assert isinstance(again["a"][1], tuple)
