"""Hessian traces and Fisher diagonals, against exact ones of a tiny network."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qbench.analysis.curvature import divergence, fisher_diagonals, hessian_traces
from qbench.errors import Unsupported

NAMES = ["0", "3"]


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 4)).eval()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(5, 1, 3, 3, generator=torch.Generator().manual_seed(1))


def exact_trace(network: nn.Module, name: str, images: torch.Tensor) -> float:
    weight = network.get_submodule(name).weight.detach()
    target = network(images).detach()

    def loss(values: torch.Tensor) -> torch.Tensor:
        outputs = torch.func.functional_call(network, {f"{name}.weight": values}, (images,))
        return F.kl_div(outputs.log_softmax(1), target.log_softmax(1), reduction="batchmean", log_target=True)

    return float(torch.func.hessian(loss)(weight).detach().reshape(weight.numel(), -1).trace())


def test_traces_are_those_of_the_exact_hessian(network, images):
    found = hessian_traces(network, NAMES, images.split(2), probes=1000, tolerance=0.05, seed=3)
    assert all(10 < found.probes[name] < 1000 for name in NAMES)
    for name in NAMES:
        exact = exact_trace(network, name, images)
        assert found.standard_error[name] <= 0.05 * found.mean[name]
        assert abs(found.mean[name] - exact) <= 4 * found.standard_error[name]


def test_probes_are_bounded_and_seeded(network, images):
    first, again, other = (hessian_traces(network, NAMES, [images], probes=25, tolerance=0, seed=s) for s in (0, 0, 1))
    assert first.probes == {"0": 25, "3": 25}
    assert first == again != other


def test_a_layer_that_plays_no_part_has_no_curvature(images):
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = nn.Linear(9, 3), nn.Linear(9, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x.flatten(1))

    found = hessian_traces(Spare(), ["used", "spare"], [images], probes=10)
    assert found.mean["used"] > 0
    assert found.mean["spare"] == 0


def test_a_layer_beside_one_of_much_greater_curvature(images):
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.much, self.little = nn.Linear(9, 3), nn.Linear(9, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.much(x.flatten(1)) + 1e-3 * self.little(x.flatten(1))

    torch.manual_seed(0)
    network = Branches()
    found = hessian_traces(network, ["much", "little"], [images], probes=50, tolerance=0)
    for name in ("much", "little"):
        assert found.mean[name] == pytest.approx(exact_trace(network, name, images), rel=0.5)


def test_fisher_is_the_mean_of_squared_gradients(network, images):
    found = fisher_diagonals(network, NAMES, images.split(2), seed=7)
    generator = torch.Generator().manual_seed(7)
    sums = dict.fromkeys(NAMES, 0.0)
    for image in images:
        outputs = network(image[None])[0]
        label = int(torch.multinomial(outputs.softmax(0), 1, generator=generator))
        loss = outputs.logsumexp(0) - outputs[label]
        for name in NAMES:
            (gradient,) = torch.autograd.grad(loss, network.get_submodule(name).weight, retain_graph=True)
            sums[name] = sums[name] + gradient**2
    for name in NAMES:
        torch.testing.assert_close(found[name], sums[name] / 5)


def test_the_fisher_diagonal_sums_to_the_trace_in_the_mean(network, images):
    many = images.repeat(200, 1, 1, 1)
    found = fisher_diagonals(network, NAMES, many.split(100))
    for name in NAMES:
        assert float(found[name].sum()) == pytest.approx(exact_trace(network, name, images), rel=0.1)


def test_the_network_is_left_as_it_was(network, images):
    before = [p.clone() for p in network.parameters()]
    hessian_traces(network, NAMES, [images], probes=2)
    fisher_diagonals(network, NAMES, [images])
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, network.parameters(), strict=True))


def test_divergence_is_that_of_the_predictions():
    p, q = torch.tensor([[0.5, 0.5], [0.9, 0.1]]), torch.tensor([[0.25, 0.75], [0.9, 0.1]])
    expected = (0.5 * torch.log(torch.tensor(2.0)) + 0.5 * torch.log(torch.tensor(2 / 3))) / 2
    assert float(divergence(q.log() + 3, p.log() - 1)) == pytest.approx(float(expected), abs=1e-6)


def test_the_divergence_of_other_outputs_is_their_relative_error():
    wanted = torch.randn(2, 3, 4)
    assert float(divergence(1.1 * wanted, wanted)) == pytest.approx(0.01)


def test_traces_of_other_outputs_are_those_of_their_relative_error():
    layer = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 1, bias=False)).requires_grad_(False).eval()
    x = torch.randn(4, 2, 5, 5)
    # 2 J'J / |y|^2, and every channel's outputs are the same inputs.
    expected = 2 * 3 * float(x.square().sum() / layer(x).square().sum())
    assert hessian_traces(layer, ["0"], [x], probes=400, tolerance=1e-9).mean["0"] == pytest.approx(expected, rel=0.1)
    with pytest.raises(Unsupported, match="measure fisher draws from class scores"):
        fisher_diagonals(layer, ["0"], [x])
