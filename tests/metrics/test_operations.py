"""Operations are counted, and the model of a chip is the table times the counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from deployable import finished
from torch import nn

from qbench.metrics.operations import Layer, as_float, bit_operations, count, operations, picojoules
from qbench.quant.activations import DynamicQuantizer, StaticQuantizer, quantize_input
from qbench.quant.encodings import Affine, Codebook
from qbench.quant.layers import encode, weight_of
from qbench.quant.matmuls import MatMul
from qbench.registry import resolve

CONV = Layer(
    macs=3 * 9 * 8 * 64, weights=8 * 3 * 9, weight_bits=32, inputs=3 * 64, input_bits=32, outputs=8 * 64, integers=False
)


def test_what_a_layer_does_with_an_image() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 5)).eval()
    layers = count(model, torch.zeros(1, 3, 8, 8))
    assert layers == {"0": CONV, "3": Layer(2560, 2560, 32, 512, 32, 5, integers=False)}


def test_widths_are_those_of_codes() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)).eval()
    encode(model[0], Affine.nearest(weight_of(model[0]), 0.1, bits=4))
    quantize_input(model[0], StaticQuantizer(8))
    encode(model[1], Codebook.nearest(weight_of(model[1]), torch.linspace(-1, 1, 8)))
    quantize_input(model[1], StaticQuantizer(8))
    encode(model[2], Affine.nearest(weight_of(model[2]), 0.1, bits=8))
    quantize_input(model[2], DynamicQuantizer(6))
    layers = count(model, torch.zeros(1, 16))
    found = [(round(layer.weight_bits, 1), layer.input_bits, layer.integers) for layer in layers.values()]
    # The symmetric grid of 4 bits has 15 levels.
    assert found == [(3.9, 8, True), (3.0, 8, False), (8.0, 6, False)]


def test_products_of_activations_have_no_weights() -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matmul = MatMul()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.matmul(x, x.transpose(1, 2))

    model = Product().eval()
    quantize_input(model.matmul.left, StaticQuantizer(8, True))
    quantize_input(model.matmul.right, StaticQuantizer(6, True))
    assert count(model, torch.zeros(1, 5, 6)) == {"matmul": Layer(150, 0, 6, 60, 8, 25, integers=True)}


def test_the_model_is_the_table_times_the_counts() -> None:
    integers = Layer(macs=1000, weights=100, weight_bits=8, inputs=10, input_bits=8, outputs=10, integers=True)
    assert bit_operations({"a": integers}) == 64_000
    energy = picojoules({"a": integers})
    assert energy["arithmetic"] == pytest.approx(1000 * (0.2 + 0.1))
    assert energy["weights"] == pytest.approx(100 * 8 / 64 * 1300)
    assert energy["inputs"] == pytest.approx(10 * 8 / 64 * 100)
    assert picojoules({"a": as_float(integers)})["arithmetic"] == pytest.approx(1000 * (3.7 + 0.9))
    narrow = Layer(macs=1000, weights=100, weight_bits=4, inputs=10, input_bits=8, outputs=10, integers=True)
    assert picojoules({"a": narrow})["arithmetic"] == pytest.approx(1000 * (0.1 + 0.1))


def test_the_metric_names_its_source(tmp_path: Path) -> None:
    values = json.loads(json.dumps(operations(finished(tmp_path))))
    assert "Horowitz" in values["source"]
    assert values["table"]["multiply int8"] == 0.2
    assert values["bops"] < values["float_bops"] / 15
    assert values["layers"]["0"]["macs"] == CONV.macs
    assert values["float_bops"] == 1024 * sum(layer["macs"] for layer in values["layers"].values())


def test_a_real_network_counts_what_coverage_counts() -> None:
    from qbench.metrics.coverage import macs

    model = resolve("model", "digits_vit")().load().eval()
    x = torch.zeros(1, 1, 32, 32)
    _, by_layer = macs(model, x)
    assert {name: layer.macs for name, layer in count(model, x).items()} == by_layer
