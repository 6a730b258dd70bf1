"""Weights of three levels."""

import copy

import pytest
import torch
from torch import nn

from qbench.quant.audit import audit
from qbench.quant.fakequant import deploy, quantize_weight
from qbench.quant.ternary import TernaryWeight, TrainedTernaryWeight

WEIGHT = torch.tensor([[1.0, -3.0, 0.2, 0.6], [-0.1, 0.1, 0.1, 0.5]])


def test_twn_known_answer() -> None:
    # Mean magnitude: 5.6 / 8, times 0.7.
    up = (1 + 3 + 0.6 + 0.5) / 4
    torch.testing.assert_close(TernaryWeight()(WEIGHT), torch.tensor([[up, -up, 0, up], [0, 0, 0, up]]))
    assert not TernaryWeight()(torch.zeros(2, 3)).any()


def test_twn_passes_the_gradient_on() -> None:
    weight = WEIGHT.clone().requires_grad_()
    g = torch.randn(2, 4)
    TernaryWeight()(weight).backward(g)
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


@pytest.mark.parametrize("kind", ["twn", "ttq"])
@pytest.mark.parametrize("layer", [nn.Conv2d(4, 6, 3), nn.Linear(7, 5), nn.ConvTranspose2d(4, 6, 3)])
def test_a_deployed_weight_is_what_the_training_saw(kind: str, layer: nn.Module) -> None:
    layer = copy.deepcopy(layer)
    quantize_weight(layer, TernaryWeight() if kind == "twn" else TrainedTernaryWeight(layer.weight, 0.3))
    seen = layer.weight.detach().clone()
    deploy(layer)
    assert torch.equal(layer.weight, seen)
    assert audit(layer) == {"weight": {"levels": 3, "used": 3}}
