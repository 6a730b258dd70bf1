"""Sensitivities of layers, against brute force."""

import copy
from collections.abc import Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qbench.analysis.curvature import fisher_diagonals
from qbench.analysis.sensitivity import rounded, sensitivity
from qbench.data import Batches, Data, Training
from qbench.errors import Unsupported, UserError
from qbench.registry import resolve

WIDTHS = (8, 3)


class Noise:
    def __init__(self) -> None:
        self.x = torch.randn(10, 2, 6, 6, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, positions: Sequence[int]) -> Tensor:
        return self.x[list(positions)]


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(64, 3)).eval()


def data(labels: bool = False) -> Data:
    device = torch.device("cpu")
    train = Training(Noise(), [i % 3 for i in range(10)], device, None) if labels else None
    return Data(Batches(Noise(), device, 4), train, F.cross_entropy)


@pytest.fixture(scope="module")
def weights(network):
    return rounded(network, data(), resolve("method", "rtn"), WIDTHS)


def alone(network: nn.Module, weights: dict, name: str, width: int) -> nn.Module:
    """The network with one layer quantized."""
    changed = copy.deepcopy(network)
    changed.get_submodule(name).weight.data = weights[width][name]
    return changed


@torch.no_grad()
def table(function, network, weights) -> np.ndarray:
    return np.array([[float(function(alone(network, weights, n, w), n, w)) for w in WIDTHS] for n in ("0", "3")])


def test_weights_are_those_of_the_method(network, weights):
    for width in WIDTHS:
        expected = resolve("method", "rtn", {"bits": width})(copy.deepcopy(network), data())
        for name in ("0", "3"):
            assert torch.equal(weights[width][name], expected.get_submodule(name).weight)
    assert rounded(network, data(), resolve("method", "rtn"), (4,), ("0",))[4].keys() == {"3"}
    with pytest.raises(UserError, match="bits=1"):
        rounded(network, data(), resolve("method", "rtn"), (1,))


@torch.no_grad()
def test_kl_is_that_of_the_network_with_one_layer_quantized(network, weights):
    x = Noise().x[:7]

    def kl(changed: nn.Module, *_: object) -> Tensor:
        p, q = network(x).double().softmax(1), changed(x).double().softmax(1)
        return (p * (p / q).log()).sum(1).mean()

    found = sensitivity(network, weights, data(), "kl", 7)
    assert (found.layers, found.bits, found.notes["images"]) == (("0", "3"), WIDTHS, 7)
    np.testing.assert_allclose(found.values, table(kl, network, weights), rtol=1e-3)
    np.testing.assert_array_equal(found.nats, found.losses)
    np.testing.assert_array_equal(found.values, found.losses)


@torch.no_grad()
def test_loss_is_the_increase_on_labelled_images(network, weights):
    x, y = Noise().x, torch.arange(10) % 3
    expected = table(
        lambda changed, *_: F.cross_entropy(changed(x), y) - F.cross_entropy(network(x), y), network, weights
    )
    found = sensitivity(network, weights, data(labels=True), "loss", 99)
    assert found.notes["images"] == 10
    np.testing.assert_allclose(found.values, expected, atol=1e-6)
    with pytest.raises(UserError, match="labelled"):
        sensitivity(network, weights, data(), "loss", 10)


@torch.no_grad()
def test_sqnr_is_that_of_the_layers_output(network, weights):
    x = Noise().x
    inputs = {"0": x, "3": network[:3](x)}

    def decibel(changed: nn.Module, name: str, _: int) -> Tensor:
        wanted, got = network.get_submodule(name)(inputs[name]), changed.get_submodule(name)(inputs[name])
        return 10 * (wanted.square().sum() / (wanted - got).square().sum()).log10()

    found = sensitivity(network, weights, data(), "sqnr", 10)
    np.testing.assert_allclose(found.values, table(decibel, network, weights), rtol=1e-4)
    np.testing.assert_allclose(-10 * np.log10(found.losses), found.values)
    assert found.nats is None


def squares(network: nn.Module, weights: dict, factor) -> np.ndarray:
    return table(
        lambda _, n, w: ((network.get_submodule(n).weight - weights[w][n]) ** 2 * factor(n)).sum(), network, weights
    )


def test_hawq_is_mean_curvature_times_squared_error(network, weights):
    found = sensitivity(network, weights, data(), "hawq", 10)
    trace, sizes = found.notes["trace"], {"0": 72, "3": 192}
    np.testing.assert_allclose(found.values, squares(network, weights, lambda n: trace[n] / sizes[n]), rtol=1e-4)
    assert set(found.notes["probes"].values()) <= {10, 20, 30, 40, 50}
    assert all(0 < found.notes["standard_error"][n] < trace[n] for n in trace)
    np.testing.assert_allclose(found.nats, found.losses / 2)


def test_fisher_weights_squared_errors(network, weights):
    found = sensitivity(network, weights, data(), "fisher", 10)
    diagonals = fisher_diagonals(network, ["0", "3"], [Noise().x])
    np.testing.assert_allclose(found.values, squares(network, weights, diagonals.__getitem__), rtol=1e-4)


def test_the_network_is_left_as_it_was(network, weights):
    before = copy.deepcopy(network.state_dict())
    for measure in ("kl", "sqnr", "hawq", "fisher"):
        sensitivity(network, weights, data(), measure, 4)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_of_outputs_that_are_no_class_scores_the_relative_error_counts(network):
    convolution = network[:1].eval()
    weights = rounded(convolution, data(), resolve("method", "rtn"), (4,))
    x = Noise().x[:4]
    with torch.no_grad():
        floats, answers = convolution(x), copy.deepcopy(convolution)
        answers[0].weight.copy_(weights[4]["0"])
        expected = float((answers(x) - floats).square().sum() / floats.square().sum())
    assert sensitivity(convolution, weights, data(), "kl", 4).values[0, 0] == pytest.approx(expected, rel=1e-4)
    with pytest.raises(Unsupported, match="measure fisher"):
        sensitivity(convolution, weights, data(), "fisher", 4)
    assert sensitivity(convolution, weights, data(), "sqnr", 4).values[0, 0] > 10
