"""ReLUs that are taken away, or replaced, in front of layers whose inputs are signs."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qbench.errors import Unsupported
from qbench.quant import structure
from qbench.quant.rectifiers import RPReLU, drop_rectifiers, replace_rectifiers

X = torch.randn(1, 3, 6, 6)


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(4, 4, 1), nn.ReLU6(), nn.Flatten(), nn.Linear(16, 2)
    ).eval()  # fmt: skip


def test_only_those_in_front_of_the_layers_go() -> None:
    model = network()
    drop_rectifiers(model, X, {"3"})
    assert [type(model[i]) for i in (1, 4)] == [nn.Identity, nn.ReLU6]
    assert structure.record(model) == [{"operation": "drop_rectifier", "module": "1"}]
    again = network()
    structure.replay(again, structure.record(model))
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(X), model(X))


def test_rprelu_is_that_of_the_paper_and_learns_channel_by_channel() -> None:
    model = network()
    replace_rectifiers(model, X, {"3"})
    rprelu = model[1]
    assert isinstance(rprelu, RPReLU)
    for parameter in rprelu.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 4, 5, 5)
    for channel in range(4):
        gamma, beta, zeta = (p[channel] for p in (rprelu.before, rprelu.slope, rprelu.after))
        expected = F.prelu(x[:, channel] - gamma, beta.reshape(1)) + zeta
        torch.testing.assert_close(rprelu(x)[:, channel], expected)


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x)))


def test_an_input_that_is_never_negative_is_refused() -> None:
    with pytest.raises(Unsupported, match="the input of second is never negative"):
        drop_rectifiers(Functional().eval(), X, {"second"})


def test_one_relu_at_places_with_different_channels() -> None:
    relu = nn.ReLU()
    model = nn.Sequential(nn.Conv2d(3, 4, 1), relu, nn.Conv2d(4, 5, 1), relu, nn.Conv2d(5, 2, 1)).eval()
    with pytest.raises(Unsupported, match=r"1 is called with \[4, 5\] channels"):
        replace_rectifiers(model, X, {"2", "4"})
    drop_rectifiers(model, X, {"2", "4"})
    assert isinstance(model[1], nn.Identity)
