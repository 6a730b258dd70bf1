import pytest
import torch
from quantized import residual
from timm.layers import Conv2dSame
from torch import Tensor, nn

from qbench.errors import Unsupported
from qbench.registry import resolve
from qbench.verify.graph import Walk, trace


class Run(Walk[Tensor]):
    """The network itself."""

    def step(self, operation, x):
        return operation.function(x)

    def add(self, a, b):
        return a + b


class Forked(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x.relu_() if x.sum() > 0 else x
        return y + x


class Overwrites(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.relu_() + x


class Times(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


def test_the_operations_of_a_network_are_all_that_it_does() -> None:
    x = torch.randn(3, 3, 6, 6)
    model = residual()
    assert torch.equal(Run().run(trace(model), x.clone()), model(x))
    assert {operation.kind for operation in trace(model).operations} == {
        "linear", "norm", "relu", "extreme", "add", "monotone", "average", "shape",
    }  # fmt: skip
    body, last = trace(model).head()
    assert last is model.last
    torch.testing.assert_close(last(Run().run(body, x.clone())), model(x))


def test_residual_networks_of_timm() -> None:
    model = resolve("model", "digits_resnet")().load()
    x = torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(Run().run(trace(model), x.clone()), model(x))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (nn.Sequential(nn.Linear(2, 2), nn.SiLU()), r"no bounds for 1 \(SiLU\)"),
        (nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), r"no bounds for 1 \(LayerNorm\)"),
        (nn.Sequential(nn.BatchNorm1d(2).train()), r"0 \(BatchNorm1d in training mode\)"),
        (nn.Sequential(nn.Dropout().train()), r"0 \(Dropout in training mode\)"),
        (nn.Sequential(Conv2dSame(1, 1, 3)), r"0 \(Conv2dSame\)"),
        (nn.Sequential(nn.Linear(2, 2), Times()), r"no bounds for mul"),
        (nn.Sequential(nn.Linear(2, 2), Forked()), "cannot be traced at 1"),
        (Overwrites(), "relu_ overwrites"),
    ],
)
def test_what_there_are_no_bounds_for_is_named(model: nn.Module, reason: str) -> None:
    with pytest.raises(Unsupported, match=reason):
        trace(model)


def test_hooks_whose_effect_is_not_known_are_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].register_forward_hook(lambda *_: None)
    with pytest.raises(Unsupported, match=r"0 \(Linear with hooks\)"):
        trace(model)


def test_outputs_must_come_from_a_linear_layer() -> None:
    with pytest.raises(Unsupported, match="outputs come from 1"):
        trace(nn.Sequential(nn.Linear(2, 2), nn.ReLU())).head()
