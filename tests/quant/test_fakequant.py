import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qbench.quant.activations import StaticQuantizer, input_quantizer, quantize_input
from qbench.quant.encodings import Affine
from qbench.quant.fakequant import LearnedInput, LearnedStep, LearnedWeight, deploy, quantize_weight, reached
from qbench.quant.layers import encodings


def test_lsq_gradient_known_answer() -> None:
    x = torch.tensor([-3.0, -0.6, 0.4, 0.9, 2.0], requires_grad=True)
    expected = [-2.0, -0.4, -0.4, 0.1, 1.0]
    for i, value in enumerate(expected):
        scale = torch.ones((), requires_grad=True)
        y = LearnedStep.apply(x, scale, -2, 1, 1.0)
        assert y.tolist() == [-2.0, -1.0, 0.0, 1.0, 1.0]
        y[i].backward()
        assert scale.grad.item() == pytest.approx(value)
    x.grad = None
    LearnedStep.apply(x, torch.ones(()), -2, 1, 1.0).sum().backward()
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 999), bits=st.integers(2, 8), step=st.floats(0.01, 2.0), channels=st.booleans())
def test_gradients_are_those_of_the_surrogate_with_a_straight_through_round(
    seed: int, bits: int, step: float, channels: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(5, 3, 4, 4, generator=generator, dtype=torch.float64)
    weight = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    start = step * (torch.rand(5, 1, 1, 1, generator=generator, dtype=torch.float64) + 0.5)
    start = start if channels else start[:1].reshape(())
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1

    def surrogate(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        u = (x / scale).clamp(low, high)
        return (u + (u.round() - u).detach()) * scale

    found = []
    for function in (surrogate, lambda x, s: LearnedStep.apply(x, s, low, high, 1.0)):
        own, scale = x.clone().requires_grad_(), start.clone().requires_grad_()
        y = function(own, scale)
        (y * weight).sum().backward()
        found.append((y, own.grad, scale.grad))
    for expected, actual in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("bits", [2, 4])
def test_the_step_gradient_agrees_with_finite_differences_of_the_surrogate(bits: int) -> None:
    """The surrogate is differentiable because what rounding adds is held fixed."""
    x = torch.randn(200, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    low, high, at, shift = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1, 0.4, 1e-6
    rounding = (x / at).clamp(low, high).round() - (x / at).clamp(low, high)

    def surrogate(scale: float) -> float:
        return (((x / scale).clamp(low, high) + rounding) * scale).square().sum().item()

    scale = torch.tensor(at, dtype=torch.float64, requires_grad=True)
    LearnedStep.apply(x, scale, low, high, 1.0).square().sum().backward()
    assert scale.grad.item() == pytest.approx((surrogate(at + shift) - surrogate(at - shift)) / (2 * shift), rel=1e-5)


def test_the_gain_scales_the_step_gradient_only() -> None:
    x = torch.randn(8, requires_grad=True)
    grads = []
    for gain in (1.0, 0.25):
        scale = torch.tensor(0.3, requires_grad=True)
        x.grad = None
        LearnedStep.apply(x, scale, -2, 1, gain).square().sum().backward()
        grads.append((x.grad.clone(), scale.grad.item()))
    assert torch.equal(grads[0][0], grads[1][0])
    assert grads[1][1] == pytest.approx(grads[0][1] / 4)


def test_memory_format_does_not_change_the_gradient() -> None:
    x, g = torch.randn(2, 3, 5, 5), torch.randn(2, 3, 5, 5)
    found = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        own = x.clone(memory_format=memory_format).requires_grad_()
        scale = torch.tensor(0.3, requires_grad=True)
        LearnedStep.apply(own, scale, -2, 1, 1.0).backward(g)
        found.append((own.grad, scale.grad))
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("layer", [nn.Conv2d(4, 6, 3, groups=2), nn.Linear(7, 5), nn.ConvTranspose2d(4, 6, 3)])
def test_a_deployed_layer_is_what_the_training_saw(granularity: str, layer: nn.Module) -> None:
    layer = copy.deepcopy(layer)
    axis = 1 if isinstance(layer, nn.ConvTranspose2d) else 0
    plain = layer.weight
    quantize_weight(layer, LearnedWeight(layer.weight, 3, granularity, axis))
    seen = layer.weight.detach().clone()
    assert not torch.equal(seen, plain)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin.weight, seen)
    deploy(layer)
    assert torch.equal(layer.weight, seen)
    assert isinstance(layer.weight, nn.Parameter)
    (encoding,) = encodings(layer).values()
    assert isinstance(encoding, Affine)
    assert (encoding.low, encoding.high) == (-4, 3)
    assert encoding.scale.numel() == (1 if granularity == "tensor" else layer.weight.shape[axis])
    assert not encodings(twin), "a copy made during training is not touched"


def test_a_first_step_follows_the_paper_and_dead_channels_get_one() -> None:
    weight = torch.tensor([[1.0, -3.0], [0.0, 0.0]])
    scale = LearnedWeight(weight, 3, "channel").scale
    assert scale.flatten().tolist() == pytest.approx([2 * 2 / 3**0.5, 1.0])
    assert LearnedWeight(weight, 3, "tensor").scale.shape == (1, 1)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_learned_input_becomes_an_equal_fixed_one(signed: bool, bits: int) -> None:
    layer = nn.Linear(16, 4)
    quantize_input(layer, LearnedInput(bits))
    x = torch.randn(32, 16) if signed else torch.rand(32, 16)
    expected = layer(x)
    deploy(layer)
    fixed = input_quantizer(layer)
    assert isinstance(fixed, StaticQuantizer)
    assert (fixed.bits, fixed.symmetric) == (bits, signed)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-6)


def test_reached_layers() -> None:
    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.called, self.read, self.idle = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(self.called(x), self.read.weight)

    model = Partly()
    assert reached(model, torch.ones(1, 2)) == {"called"}
    assert not model.called._forward_pre_hooks
