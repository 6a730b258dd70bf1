"""Mean inputs by batch-norm statistics: the clipped normal, and which layers it is known for."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from scipy import integrate, stats
from torch import Tensor, nn

from qbench.data import Batches, Data
from qbench.methods.equalize import equalize
from qbench.methods.fold_bn import fold_bn
from qbench.quant.channels import scale_inputs
from qbench.quant.expected_inputs import expected_inputs
from qbench.quant.layers import weight_of
from qbench.quant.norm_statistics import Normal

INF = float("inf")


@pytest.mark.parametrize("ends", [(0.0, INF), (0.0, 6.0), (-1.0, 1.0), (-INF, INF), (-INF, 2.0)])
def test_the_mean_of_a_clipped_normal_is_its_integral(ends: tuple[float, float]) -> None:
    means, stds = torch.tensor([-3.0, -0.2, 0.0, 1.5, 5.9, 9.0]).double(), torch.tensor([1.0, 0.3, 2, 1, 4, 0.1])
    normal = Normal(means, stds.double())
    got = normal.clipped_mean(*(torch.full_like(means, end) for end in ends))
    for mean, std, value in zip(means.tolist(), stds.tolist(), got.tolist(), strict=True):
        breaks = [end for end in ends if abs(end) < INF and abs(end - mean) < 10 * std]

        def weighted(x: float, at: float = mean, width: float = std) -> float:
            return min(max(x, ends[0]), ends[1]) * float(stats.norm.pdf(x, at, width))

        want, _ = integrate.quad(weighted, mean - 10 * std, mean + 10 * std, points=breaks or None, epsabs=1e-12)
        assert value == pytest.approx(want, abs=1e-8)


def test_a_constant_channel_is_clipped() -> None:
    means = torch.tensor([-1.0, 3.0, 7.0]).double()
    got = Normal(means, torch.zeros(3).double()).clipped_mean(torch.zeros(3).double(), torch.full_like(means, 6.0))
    torch.testing.assert_close(got, torch.tensor([0.0, 3.0, 6.0]).double())


def norm(channels: int) -> nn.BatchNorm2d:
    made = nn.BatchNorm2d(channels)
    nn.init.normal_(made.weight)
    nn.init.normal_(made.bias)
    nn.init.normal_(made.running_mean)
    nn.init.uniform_(made.running_var, 0.5, 2)
    return made


def behind(norm: nn.Module, low: float, high: float) -> Tensor:
    mean = norm.bias.detach().double()
    ends = (torch.full_like(mean, end) for end in (low, high))
    return Normal(mean, norm.weight.detach().double().abs()).clipped_mean(*ends)


class Net(nn.Module):
    """A layer, a norm, whatever is to be tested, and a reader."""

    def __init__(self, between: Any, reader: nn.Module | None = None) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, bias=False), norm(4)
        self.between, self.reader = between, reader or nn.Conv2d(4, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.reader(self.between(self.norm(self.conv(x))))


class Call(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Pictures:
    def __len__(self) -> int:
        return 4

    def batch(self, positions: Sequence[int]) -> Tensor:
        return torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))[list(positions)]


DATA = Data(Batches(Pictures(), torch.device("cpu")), None, nn.functional.cross_entropy)


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize(
    ("between", "reader", "ends"),
    [
        (nn.Identity(), None, (-INF, INF)),
        (nn.ReLU(), None, (0, INF)),
        (nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3, groups=4), (0, INF)),
        (nn.ReLU6(inplace=True), None, (0, 6)),
        (nn.Hardtanh(), None, (-1, 1)),
        (nn.Hardtanh(-2, 1), None, (-2, 1)),
        (nn.Hardtanh(-1, 3), None, (-1, 3)),
        (Call(lambda x: x.clamp(-1, 2)), None, (-1, 2)),
        (Call(lambda x: torch.clamp(x, max=0.5)), None, (-INF, 0.5)),
        (Call(lambda x: torch.relu(x).clamp(max=0.5)), None, (0, 0.5)),
        (nn.Sequential(nn.ReLU(), nn.ZeroPad2d(1)), None, (0, INF)),
        (nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()), nn.Linear(4, 2), (0, INF)),
        (Call(lambda x: torch.relu(x).mean((2, 3))), nn.Linear(4, 2), (0, INF)),
        (Call(lambda x: torch.relu(x).permute(0, 2, 3, 1)), nn.Linear(4, 2), (0, INF)),
    ],
)
def test_known_inputs(between: Any, reader: nn.Module | None, ends: tuple[float, float], folded: bool) -> None:
    torch.manual_seed(0)
    model = Net(between, reader).eval()
    want = behind(model.norm, *ends)
    if folded:
        fold_bn(model, DATA)
        assert isinstance(model.norm, nn.Identity)
    found = expected_inputs(model, DATA.example)
    assert found.keys() == {"reader"}
    torch.testing.assert_close(found["reader"], want)


@pytest.mark.parametrize(
    "between",
    [
        nn.MaxPool2d(2),
        nn.LeakyReLU(),
        nn.SiLU(),
        nn.Sequential(nn.AvgPool2d(2), nn.ReLU()),
        Call(lambda x: x + x.roll(1, 1)),
        Call(lambda x: torch.relu(x).mul_(2)),
        Call(lambda x: x.clamp(max=torch.tensor(1.0))),
        Call(lambda x: (x.view(x.shape).add_(1), x)[1]),
        Call(lambda x: x.transpose(2, 1).reshape(x.shape)),
        Call(lambda x: torch.cat([x[:, 2:], x[:, :2]], 1)),
    ],
)
def test_unknown_inputs(between: Any) -> None:
    torch.manual_seed(0)
    assert expected_inputs(Net(between).eval(), DATA.example) == {}


def test_a_layer_that_is_called_twice_has_no_mean() -> None:
    class Twice(Net):
        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.conv(x))
            return self.reader(y) + self.reader(torch.relu(y))

    assert expected_inputs(Twice(None).eval(), DATA.example) == {}


@pytest.mark.parametrize("absorb", [False, True])
def test_equalized_networks_have_the_same_means_in_other_units(absorb: bool) -> None:
    """What a reader makes of its mean input does not change, but for what was moved into its bias."""
    torch.manual_seed(0)
    model = Net(nn.ReLU6(), nn.Conv2d(4, 5, 1)).eval()
    with torch.no_grad():
        model.norm.weight.mul_(0.1)
        model.norm.bias.copy_(torch.tensor([0.5, 1.0, 3.0, 5.5]))
    fold_bn(model, DATA)
    other = equalize(copy.deepcopy(model), DATA, absorb=absorb)
    assert not torch.equal(weight_of(model.reader), weight_of(other.reader))

    def answer(network: nn.Module) -> Tensor:
        mean = expected_inputs(network, DATA.example)["reader"]
        product = scale_inputs(network.reader, weight_of(network.reader).double(), mean).flatten(1).sum(1)
        return product + network.reader.bias.detach().double()

    # What is absorbed is the least of the images at hand; the normal's tail goes below it.
    torch.testing.assert_close(answer(other), answer(model), rtol=0, atol=5e-3 if absorb else 1e-5)
