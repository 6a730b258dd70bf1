"""Weights of three levels."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qbench.quant.audit import audit
from qbench.quant.fakequant import deploy, quantize_weight
from qbench.quant.ternary import TernaryWeight, TrainedTernaryWeight

WEIGHT = torch.tensor([[1.0, -3.0, 0.2, 0.6], [-0.1, 0.1, 0.1, 0.5]])


def test_twn_known_answer() -> None:
    # Mean magnitudes: 5.6 / 8 = 0.7, and 1.2 and 0.2 by channel.
    tensor, channel = (TernaryWeight(granularity)(WEIGHT) for granularity in ("tensor", "channel"))
    up = (1 + 3 + 0.6 + 0.5) / 4
    torch.testing.assert_close(tensor, torch.tensor([[up, -up, 0, up], [0, 0, 0, up]]))
    torch.testing.assert_close(channel, torch.tensor([[2.0, -2.0, 0, 0], [0, 0, 0, 0.5]]))


def test_twn_passes_the_gradient_on() -> None:
    weight = WEIGHT.clone().requires_grad_()
    g = torch.randn(2, 4)
    TernaryWeight("tensor")(weight).backward(g)
    assert torch.equal(weight.grad, g)


def test_ttq_gradients_are_those_of_the_paper() -> None:
    quantizer = TrainedTernaryWeight(WEIGHT, 0.15)
    assert quantizer.positive.item() == pytest.approx((1 + 0.6 + 0.5) / 3)
    assert quantizer.negative.item() == pytest.approx(3)
    weight = WEIGHT.clone().requires_grad_()
    g = torch.tensor([[1.0, 2, 4, 8], [16, 32, 64, 128]])
    quantizer(weight).backward(g)
    p, n = quantizer.positive.item(), quantizer.negative.item()
    torch.testing.assert_close(weight.grad, g * torch.tensor([[p, n, 1, p], [1, 1, 1, p]]))
    assert quantizer.positive.grad.item() == 1 + 8 + 128
    assert quantizer.negative.grad.item() == -2


@pytest.mark.parametrize("kind", ["tensor", "channel", "ttq"])
@pytest.mark.parametrize("layer", [nn.Conv2d(4, 6, 3), nn.Linear(7, 5), nn.ConvTranspose2d(4, 6, 3)])
def test_a_deployed_weight_is_what_the_training_saw(kind: Any, layer: nn.Module) -> None:
    layer = copy.deepcopy(layer)
    weight, axis = layer.weight, 1 if isinstance(layer, nn.ConvTranspose2d) else 0
    assert isinstance(weight, Tensor)
    with torch.no_grad():
        weight.select(axis, 0).zero_()
    quantize_weight(layer, TrainedTernaryWeight(weight, 0.05) if kind == "ttq" else TernaryWeight(kind, axis))
    seen = layer.weight.detach().clone()
    deploy(layer)
    assert torch.equal(layer.weight, seen)
    assert audit(layer) == {"weight": {"levels": 3, "used": 3}}
    assert not layer.weight.select(axis, 0).any()
