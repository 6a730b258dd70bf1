"""Quantizers of two levels: known answers of the papers, and that what is deployed is what was trained."""

import copy

import pytest
import torch
from torch import nn

from qbench.quant.activations import build, describe, input_quantizer, quantize_input
from qbench.quant.audit import audit
from qbench.quant.binary import BinaryInput, BinaryMeanInput, BinaryWeight
from qbench.quant.binary_quantizer import BinaryMeanQuantizer, BinaryQuantizer
from qbench.quant.fakequant import deploy, quantize_weight
from qbench.quant.layers import encodings


def test_a_weight_is_its_sign_times_the_mean_magnitude_of_its_channel() -> None:
    weight = torch.tensor([[1.0, -3.0, 2.0], [0.5, 0.5, -0.2], [0.0, 0.0, 0.0]], requires_grad=True)
    quantized = BinaryWeight()(weight)
    torch.testing.assert_close(quantized, torch.tensor([[2.0, -2, 2], [0.4, 0.4, -0.4], [0, 0, 0]]))


def test_the_weight_gradient_is_that_of_the_paper() -> None:
    """g (alpha 1[|w| <= 1]) straight through the sign, and the mean of g sign(w) through alpha."""
    weight = torch.tensor([[0.5, -3.0, 1.0]], requires_grad=True)
    g = torch.tensor([[1.0, 2.0, 4.0]])
    BinaryWeight()(weight).backward(g)
    through_alpha = (1 - 2 + 4) / 3 * torch.tensor([[1.0, -1.0, 1.0]])
    torch.testing.assert_close(weight.grad, 1.5 * g * torch.tensor([[1.0, 0.0, 1.0]]) + through_alpha)


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 6, 3, groups=2), nn.Linear(7, 5), nn.ConvTranspose2d(4, 6, 3)])
def test_a_deployed_weight_is_what_the_training_saw(layer: nn.Module) -> None:
    layer = copy.deepcopy(layer)
    axis = 1 if isinstance(layer, nn.ConvTranspose2d) else 0
    quantize_weight(layer, BinaryWeight(axis))
    seen = layer.weight.detach().clone()
    deploy(layer)
    assert torch.equal(layer.weight, seen)
    (encoding,) = encodings(layer).values()
    assert encoding.nominal_bits == seen.numel()
    assert audit(layer) == {"weight": {"levels": 2, "used": 2}}


@pytest.mark.parametrize(("gradient", "expected"), [("clip", [0, 1, 1, 1, 0]), ("approx", [0, 1, 2, 0.5, 0])])
def test_the_input_gradient(gradient: str, expected: list[float]) -> None:
    x = torch.tensor([[-2.0, -0.5, 0.0, 0.75, 1.5]], requires_grad=True)
    quantizer = BinaryInput(gradient)
    y = quantizer(x)
    scale = x.detach().abs().mean()
    assert torch.equal(y, scale * torch.tensor([[-1.0, -1, 1, 1, 1]]))
    y.sum().backward()
    torch.testing.assert_close(x.grad, scale * torch.tensor([expected]))


def test_shifts_are_learned_channel_by_channel() -> None:
    quantizer = BinaryInput("approx", shifts=True)
    x = torch.randn(8, 3, 4, 4)
    y = quantizer(x)
    assert quantizer.shift.shape == (3, 1, 1)
    y[:, 1].sum().backward()
    slope = (2 - 2 * x[:, 1].abs()).clamp(min=0).sum()
    expected = -quantizer.scale * torch.stack([torch.zeros(()), slope, torch.zeros(())])
    torch.testing.assert_close(quantizer.shift.grad.flatten(), expected)


@pytest.mark.parametrize(
    "learned", [BinaryInput("clip"), BinaryInput("approx", shifts=True), BinaryMeanInput(1)], ids=str
)
def test_an_input_becomes_a_fixed_one_that_can_be_stored(learned: nn.Module) -> None:
    layer = nn.Conv2d(3, 4, 3)
    quantize_input(layer, learned)
    x = torch.randn(2, 3, 6, 6)
    layer(x)
    if getattr(learned, "shift", None) is not None:
        nn.init.normal_(learned.shift)
    expected = layer(x)
    quantize_input(layer, learned.deployed())
    assert torch.equal(layer(x), expected)
    fixed = input_quantizer(layer)
    again = build(describe(fixed))
    again.load_state_dict(fixed.state_dict())
    assert torch.equal(again(x), fixed(x))


def test_the_claimed_two_levels_are_true() -> None:
    x = torch.randn(5, 7, 3, 3)
    fixed = BinaryQuantizer((7, 1, 1))
    nn.init.normal_(fixed.shift)
    assert fixed(x).unique().numel() == fixed.levels == 2
    position = BinaryMeanQuantizer(1)(x)
    assert torch.equal(position.abs().amax(1), position.abs().amin(1))
    torch.testing.assert_close(position.abs()[:, 0], x.abs().mean(1))
    assert torch.equal(position >= 0, x >= 0)
    assert torch.equal(BinaryQuantizer()(torch.zeros(2)), torch.ones(2)), "0 has a level, too"
