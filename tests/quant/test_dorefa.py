"""DoReFa-Net's formulas."""

import pytest
import torch
from torch import nn

from qbench.quant.dorefa import FixedInput, SignWeight, TanhWeight, rounded_gradient, rounded_gradients


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_weights_are_those_of_the_paper(bits: int) -> None:
    weight, n = torch.randn(5, 7), 2**bits - 1
    squashed = weight.tanh() / (2 * weight.tanh().abs().max()) + 0.5
    expected = 2 * (squashed * n).round() / n - 1
    torch.testing.assert_close(TanhWeight(weight, bits, unit=True)(weight), expected)
    top = weight.tanh().abs().max()
    torch.testing.assert_close(TanhWeight(weight, bits)(weight), expected * top)


def test_the_weight_gradient_is_that_of_the_function_without_rounding() -> None:
    weight = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    g = torch.randn(5, 7, dtype=torch.float64)
    TanhWeight(weight.detach(), 3, unit=True)(weight).backward(g)
    free = weight.detach().clone().requires_grad_()
    (free.tanh() / free.tanh().abs().max()).backward(g)
    torch.testing.assert_close(weight.grad, free.grad)


def test_one_bit_is_the_sign_times_the_mean_magnitude_of_the_layer() -> None:
    weight = torch.tensor([[1.0, -3.0], [0.0, 2.0]], requires_grad=True)
    quantized = SignWeight()(weight)
    assert quantized.tolist() == [[1.5, -1.5], [1.5, 1.5]]
    quantized.sum().backward()
    assert torch.equal(weight.grad, torch.ones(2, 2))


def test_inputs_are_those_of_the_paper() -> None:
    x = torch.tensor([[0.01, 0.3, 0.9, 1.7]], requires_grad=True)
    y = FixedInput(2, unit=True)(x)
    torch.testing.assert_close(y, torch.tensor([[0, 1 / 3, 1, 1]]))
    y.sum().backward()
    assert x.grad.tolist() == [[1, 1, 1, 0]]


def test_rounded_gradients_are_right_on_average_and_have_few_levels() -> None:
    grad = torch.randn(3, 50)
    drawn = torch.stack([rounded_gradient(grad, 3) for _ in range(4000)])
    step = 2 * grad.abs().amax(1, keepdim=True) / 7
    assert drawn[:, 0].unique().numel() <= 8
    assert ((drawn.mean(0) - grad).abs() < 0.05 * step).all()
    assert torch.equal(rounded_gradient(torch.zeros(2, 3), 3), torch.zeros(2, 3))


def test_gradients_are_rounded_only_meanwhile() -> None:
    layer, x = nn.Linear(4, 3), torch.randn(6, 4)

    def levels() -> int:
        x.requires_grad_().grad = None
        layer.zero_grad()
        layer(x).square().sum().backward()
        return max(row.unique().numel() for row in x.grad)

    free = layer(x)
    with rounded_gradients([layer], 2):
        assert torch.equal(layer(x), free)
        layer(x).square().sum().backward()
        own = layer.bias.grad.clone()
    assert not layer._forward_hooks
    levels()
    assert not torch.equal(layer.bias.grad, own)
