"""Shortcuts around convolutions: the network computes what the papers draw, and is rebuilt from what was recorded."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qbench.errors import Unsupported
from qbench.quant import structure
from qbench.quant.layers import named_weight_layers
from qbench.quant.rewiring import trace
from qbench.quant.shortcut_plan import ShortcutPlan


class Block(nn.Module):
    def __init__(self, inside: int, outside: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        changes = stride > 1 or inside != outside
        self.down = nn.Sequential(nn.Conv2d(inside, outside, 1, stride), nn.BatchNorm2d(outside)) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += x if self.down is None else self.down(x)
        return self.relu(y)


def randomized(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
    return model.eval()


def with_shortcuts(model: nn.Module, x: Tensor, *without: str) -> tuple[nn.Module, list[str]]:
    plan = ShortcutPlan(model, x[:1])
    return model, plan.apply(named_weight_layers(model).keys() - plan.branches() - set(without))


def test_a_residual_block_has_one_shortcut_for_each_convolution() -> None:
    model, x = randomized(nn.Sequential(Block(4, 4))), torch.randn(2, 4, 6, 6)
    model, done = with_shortcuts(model, x)
    block = model[0]
    middle = F.relu(block.bn1(block.conv1(x)) + x)
    torch.testing.assert_close(model(x), F.relu(block.bn2(block.conv2(middle)) + middle))
    assert done == ["0.conv1", "0.conv2"]


def test_the_branch_of_a_block_goes_around_the_convolution_that_changes_the_shape() -> None:
    model, x = randomized(nn.Sequential(Block(4, 6, 2))), torch.randn(2, 4, 6, 6)
    model, _ = with_shortcuts(model, x)
    block = model[0]
    middle = F.relu(block.bn1(block.conv1(x)) + block.down(x))
    torch.testing.assert_close(model(x), F.relu(block.bn2(block.conv2(middle)) + middle))


def test_a_block_that_shortcuts_do_not_span_keeps_its_sum() -> None:
    model, x = randomized(nn.Sequential(Block(4, 6, 2))), torch.randn(2, 4, 6, 6)
    model, done = with_shortcuts(model, x, "0.conv2")
    block = model[0]
    assert not done, "6 channels are no multiple of 4"
    middle = F.relu(block.bn1(block.conv1(x)))
    torch.testing.assert_close(model(x), F.relu(block.bn2(block.conv2(middle)) + block.down(x)))


def test_shapes_are_bridged_without_weights() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3, 2, padding=1), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4))
    x = torch.randn(2, 3, 7, 7)
    model, done = with_shortcuts(randomized(model), x)
    assert done == ["0"], "fewer channels are not bridged"
    pooled = F.avg_pool2d(x, 2, ceil_mode=True)
    middle = model[1](model[0](x)) + torch.cat([pooled, pooled], 1)
    torch.testing.assert_close(model(x), model[3](model[2](middle)))


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "resnet10t"])
def test_a_network_is_rebuilt_from_the_record(name: str) -> None:
    def build() -> nn.Module:
        return timm.create_model(name, num_classes=4).eval()

    x = torch.randn(2, 3, 32, 32)
    model, done = with_shortcuts(randomized(build()), x)
    assert len(done) > 5
    again = build()
    structure.replay(again, structure.record(model))
    again.load_state_dict(model.state_dict())
    for other in (again, copy.deepcopy(model)):
        assert torch.equal(other(x), model(x))
    model.train()(x).sum().backward()


def test_branches_are_found() -> None:
    model = timm.create_model("test_resnet").eval()
    expected = {f"layer{i}.0.downsample.1" for i in (2, 3, 4)}
    assert ShortcutPlan(model, torch.zeros(1, 3, 32, 32)).branches() == expected


def test_what_cannot_be_traced_is_said() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(Unsupported, match="the forward of Odd cannot be traced"):
        trace(Odd(), [])
