"""Blocks are found from what a network does, not from names."""

import pytest
import torch
from timm import create_model
from torch import Tensor, nn

from qbench.quant.blocks import blocks


class Residual(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.b(self.a(x).relu())
        return x + (y if mask is None else y * mask)


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Residual(), Residual()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x), torch.ones(()))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Residual()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.inner(x))


class Position(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Parameter(torch.zeros(1, 4, 8, 8))
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x + self.embed)


EXAMPLE = torch.zeros(1, 4, 8, 8)


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("test_resnet", ["layer1.0", "layer2.0", "layer3.0", "layer4.0"]),
        ("test_vit", [f"blocks.{i}" for i in range(6)]),
        ("test_efficientnet", ["blocks.1.0", "blocks.2.0", "blocks.3.0", "blocks.4.0"]),
    ],
)
def test_blocks_of_real_architectures(architecture: str, expected: list[str]) -> None:
    size = {"img_size": 32, "patch_size": 8} if architecture == "test_vit" else {}
    assert blocks(create_model(architecture, **size).eval(), torch.zeros(1, 3, 32, 32)) == expected


def test_residual_sums_are_found_without_sequences() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), Residual(), Residual())
    assert blocks(model, EXAMPLE) == ["1", "2"]
    holder = nn.Module()
    holder.one, holder.forward = Residual(), lambda x: holder.one(x)
    assert blocks(holder, EXAMPLE) == ["one"]


def test_what_is_called_twice_or_with_more_than_its_input_is_no_block() -> None:
    assert blocks(Twice(), EXAMPLE) == []
    assert blocks(Masked(), EXAMPLE) == ["first"]


def test_a_learned_position_is_no_residual_sum() -> None:
    assert blocks(nn.Sequential(Position()), EXAMPLE) == []


def test_plain_networks_have_no_blocks_and_keep_no_hooks() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1))
    assert blocks(model, EXAMPLE) == []
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
