"""Errors of layers against their bounds: of true methods, and by hand."""

import copy
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qbench.data import Batches, Data
from qbench.errors import Unsupported
from qbench.methods.gpfq import gpfq
from qbench.methods.spfq import spfq
from qbench.metrics.error_bound import error_bound, judge


class Noise:
    x = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, positions: Sequence[int]) -> Tensor:
        return self.x[list(positions)]


def measured(method: Any, **options: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5)
    model, records = nn.Sequential(*layers).eval(), {}
    batches = Batches(Noise(), torch.device("cpu"), batch_size=32)
    data = Data(batches, None, None, reference=copy.deepcopy(model), record=records.__setitem__)
    method(model, data, oversample=None, **options)
    return error_bound(SimpleNamespace(records=records))


CASES = [
    (gpfq, {"c": 3.0}),
    (gpfq, {"c": 3.0, "granularity": "channel", "act_order": True}),
    (gpfq, {"c": 3.0, "sparsity": "soft", "threshold": 0.01}),
    (gpfq, {"c": 3.0, "sparsity": "hard", "threshold": 0.05}),
    (gpfq, {"c": 3.0, "alphabet": "linspace_zero"}),
    (spfq, {"c": 3.0}),
    (spfq, {"alphabet": "infinite", "order": 3, "granularity": "channel"}),
]


@pytest.mark.parametrize(("method", "options"), CASES)
def test_errors_are_within_their_bounds(method: Any, options: dict[str, Any]) -> None:
    values = measured(method, bits=5, **options)
    assert values["applies_to"] == len(values["layers"]) == 3
    assert 0.01 < values["value"] <= 1
    for layer in values["layers"].values():
        assert layer["error"] <= layer["after"] * 1.0001 <= layer["bound"] * 1.0003
        assert layer["alignment"] <= layer["error"] * 3
    assert [layer["same_inputs"] for layer in values["layers"].values()] == [True, False, False]
    first = values["layers"]["0"]
    assert first["alignment"] == 0
    assert ("likely" in first) == (method is spfq)


@pytest.mark.parametrize("method", [gpfq, spfq])
def test_beyond_the_alphabet_only_the_second_bound_holds(method: Any) -> None:
    values = measured(method, bits=3, c=0.3)
    assert values["applies_to"] == 0
    assert "value" not in values
    for layer in values["layers"].values():
        assert "beyond the alphabet" in layer["reason"]
        assert layer["error"] <= layer["after"] * 1.0001


def test_the_bounds_by_hand() -> None:
    terms = {
        "energy": 10.0,
        "alignment": 1.0,
        "rounding": 4.0,
        "residuals": 2.0,
        "largest": 0.5,
        "outputs": 100,
        "saturated": 0.0,
        "same_inputs": False,
    }
    layer = judge("stochastic", 0.2, terms)
    assert (layer["bound"], layer["after"], layer["alignment"]) == (0.5, pytest.approx(0.3), 0.1)
    # 10 * 0.5 * sqrt(2 pi log(sqrt(2) * 100 / 0.01)), and the alignment.
    assert layer["likely"] == pytest.approx((1 + 38.755) / 10, rel=1e-3)
    assert judge("nearest", 0.0, terms | {"energy": 0.0})["reason"] == "the layer's output is 0"


def test_other_methods_have_no_bound() -> None:
    with pytest.raises(Unsupported, match="no method of this recipe"):
        error_bound(SimpleNamespace(records={"layer_error": {"0": 0.1}}))
