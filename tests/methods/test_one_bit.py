"""Networks of signs: accuracy, structure, and that the artifact holds what was trained."""

import copy
from typing import Any

import pytest
import torch
from embedded import Digits
from test_lsq import make_data
from torch import nn

from qbench.errors import Unsupported
from qbench.methods.bireal import bireal
from qbench.methods.reactnet import reactnet
from qbench.methods.xnor import xnor
from qbench.quant import structure
from qbench.quant.activations import StaticQuantizer, input_quantizers
from qbench.quant.audit import audit
from qbench.quant.binary_quantizer import BinaryMeanQuantizer, BinaryQuantizer
from qbench.quant.layers import encodings, named_weight_layers
from qbench.quant.rectifiers import RPReLU
from qbench.quant.scale_map import ScaleMapConv2d
from qbench.quant.schedule import Schedule
from qbench.worker import bits


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Digits:
    return Digits("digits_resnet", tmp_path_factory.mktemp("digits"))


def test_binary_weights_keep_most_of_the_accuracy(digits: Digits) -> None:
    network = digits.trained("bwn", steps=25, batch_size=32)
    assert digits.accuracy(network) > 0.75 * digits.accuracy(digits.space.model.load().eval())
    assert digits.records["bwn"]["deployed_difference"] == 0
    levels = [entry["levels"] for entry in audit(network).values()]
    assert levels == [256, *[2] * (len(levels) - 2), 256]
    assert not input_quantizers(network)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "options"),
    [("xnor", {"steps": 70}), ("xnor", {"steps": 100, "scale_map": False}), ("bireal", {}), ("reactnet", {})],
)
def test_binary_weights_and_inputs_keep_most_of_the_accuracy(digits: Digits, method: str, options: Any) -> None:
    network = digits.trained(method, **{"steps": 50, "batch_size": 64, "lr": 0.005} | options)
    assert digits.accuracy(network) > 0.75 * digits.accuracy(digits.space.model.load().eval())
    assert digits.records[method]["deployed_difference"] <= 1e-5


@pytest.mark.parametrize(
    ("method", "kind", "branches"),
    [("xnor", BinaryMeanQuantizer, 0), ("bireal", BinaryQuantizer, 3), ("reactnet", BinaryQuantizer, 3)],
)
def test_all_but_the_edges_and_the_branches_are_signs(
    digits: Digits, method: str, kind: type[nn.Module], branches: int
) -> None:
    network = digits.trained(method, steps=1, batch_size=8)
    layers = named_weight_layers(network)
    quantizers = input_quantizers(network)
    assert quantizers.keys() == layers.keys()
    signs = [name for name, quantizer in quantizers.items() if isinstance(quantizer, kind)]
    assert len(signs) == len(layers) - 2 - branches
    others = [quantizer for name, quantizer in quantizers.items() if name not in signs]
    assert all(isinstance(quantizer, StaticQuantizer) and quantizer.bits == 8 for quantizer in others)
    claims = audit(network)
    assert all(claims[f"{name}.weight"] == {"levels": 2, "used": 2} for name in signs)
    assert bits(network)["activations"] == pytest.approx((len(signs) + 8 * len(others)) / len(layers))


def test_the_structure_is_that_of_each_paper(digits: Digits) -> None:
    networks = {name: digits.trained(name, steps=1, batch_size=8) for name in ("xnor", "bireal", "reactnet")}
    kinds = (nn.ReLU, RPReLU, ScaleMapConv2d)
    counts = {
        name: [sum(isinstance(module, kind) for module in network.modules()) for kind in kinds]
        for name, network in networks.items()
    }
    # One ReLU is left in front of the classifier.
    assert counts == {"xnor": [1, 0, 9], "bireal": [1, 0, 0], "reactnet": [1, 11, 0]}
    operations = {name: {entry["operation"] for entry in structure.record(n)} for name, n in networks.items()}
    assert operations["bireal"] == {"shortcuts", "drop_rectifier"}
    assert operations["reactnet"] == {"shortcuts", "rprelu"}


def test_thresholds_differ_from_channel_to_channel(digits: Digits) -> None:
    network = digits.trained("reactnet", steps=3, batch_size=8)
    quantizer = input_quantizers(network)["layer1.0.conv1"]
    assert isinstance(quantizer, BinaryQuantizer)
    assert quantizer.shift.shape == (32, 1, 1)
    assert quantizer.shift.unique().numel() > 1


def linear_network() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(768, 16), nn.BatchNorm1d(16), nn.Linear(16, 8), nn.Linear(8, 4)).eval()


def test_inputs_of_linear_layers_are_scaled_by_the_mean_magnitude_of_the_vector() -> None:
    data, _, _ = make_data()
    network = xnor(linear_network(), data, schedule=Schedule(steps=1))
    quantizer = input_quantizers(network)["3"]
    x = torch.randn(5, 16)
    torch.testing.assert_close(quantizer(x), x.sign() * x.abs().mean(1, keepdim=True))


@pytest.mark.parametrize(("method", "reason"), [(bireal, "no shortcut can be added"), (reactnet, "no float network")])
def test_what_is_not_supported_is_said(method: Any, reason: str) -> None:
    data, _, _ = make_data()
    with pytest.raises(Unsupported, match=reason):
        method(linear_network(), data)


def test_edges_can_be_signs_as_well_or_float() -> None:
    data, _, _ = make_data()
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten())
    network = nn.Sequential(*network, nn.Linear(576, 4)).eval()
    all_signs = xnor(copy.deepcopy(network), data, edge_bits=None, schedule=Schedule(steps=1))
    assert [q.kind for q in input_quantizers(all_signs).values()] == ["binary_mean"] * 3
    inner = xnor(copy.deepcopy(network), data, edge_bits=32, schedule=Schedule(steps=1))
    assert list(encodings(inner)) == ["3.weight"]
