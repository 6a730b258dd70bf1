"""Activation quantizers: what they compute, and that they are rebuilt from their description."""

import pytest
import torch
from torch import nn

from qbench.quant.activations import (
    ChannelQuantizer,
    DynamicQuantizer,
    StaticQuantizer,
    build,
    describe,
    input_quantizer,
    input_quantizers,
    quantize_input,
)


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("symmetric", "zero"), [(True, 0), (False, 0), (False, 3)])
def test_static(bits, symmetric, zero):
    x = gaussian(4, 7) * 3
    quantizer = StaticQuantizer(bits, symmetric, 0.1, zero)
    low = -(2 ** (bits - 1)) if symmetric else 0
    expected = ((x / 0.1).round() + zero).clamp(low, low + 2**bits - 1).sub(zero) * 0.1
    assert torch.allclose(quantizer(x), expected, atol=1e-6)
    assert torch.allclose(quantizer(quantizer(x)), quantizer(x))
    assert quantizer(x).unique().numel() <= 2**bits


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", ["tensor", "token"])
def test_dynamic_does_not_look_at_the_neighbours(symmetric, granularity):
    quantizer = DynamicQuantizer(4, symmetric, granularity)
    x = gaussian(5, 6, 9) * torch.logspace(-2, 2, 5).reshape(5, 1, 1)
    together = quantizer(x)
    assert torch.equal(together, torch.cat([quantizer(image[None]) for image in x]))
    axis = (2,) if granularity == "token" else (1, 2)
    span = x.amax(axis, keepdim=True).clamp(min=0) - x.amin(axis, keepdim=True).clamp(max=0)
    step = 2 * x.abs().amax(axis, keepdim=True) / 14 if symmetric else span / 15
    assert ((together - x).abs() <= 0.5001 * step + 1e-6).all() or not symmetric
    assert ((together - x).abs() <= 1.0001 * step + 1e-6).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_dynamic_of_nothing(symmetric):
    quantizer = DynamicQuantizer(8, symmetric)
    assert (quantizer(torch.zeros(2, 3)) == 0).all()
    assert torch.allclose(quantizer(torch.full((2, 3), 0.7)), torch.full((2, 3), 0.7))


@pytest.mark.parametrize(
    "quantizer", [StaticQuantizer(4, True, 0.3), StaticQuantizer(8, False, 0.2, 7), DynamicQuantizer(6, True, "token")]
)
def test_rebuilt_from_the_description(quantizer):
    again = build(describe(quantizer))
    again.load_state_dict(quantizer.state_dict())
    x = gaussian(3, 4)
    assert torch.equal(again(x), quantizer(x))


def test_attached_once_and_replaced():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    x = gaussian(4, 3)
    before = model(x)
    quantize_input(model[2], StaticQuantizer(2, False, 0.5))
    coarse = model(x)
    assert not torch.equal(coarse, before)
    quantize_input(model[2], StaticQuantizer(16, False, 1e-4))
    assert torch.allclose(model(x), before, atol=1e-3)
    assert list(input_quantizers(model)) == ["2"]
    assert input_quantizer(model[0]) is None
    assert len(model[2]._forward_pre_hooks) == 1


def test_static_quantizers_are_exported():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
    quantize_input(model[0], StaticQuantizer(8, False, 0.05, 128))
    x = gaussian(4, 3)
    traced = torch.jit.trace(model, x)
    assert torch.allclose(traced(x + 0.3), model(x + 0.3))


def test_a_scale_for_each_channel(tmp_path):
    quantizer = ChannelQuantizer(2, channels=2)
    quantizer.scale.copy_(torch.tensor([1.0, 0.5]))
    quantizer.zero_point.copy_(torch.tensor([0, 1]))
    x = torch.tensor([[-3.0, -3.0], [0.4, 0.4], [1.6, 0.6], [9.0, 9.0]])
    wanted = torch.tensor([[0.0, -0.5], [0.0, 0.5], [2.0, 0.5], [3.0, 1.0]])
    assert torch.equal(quantizer(x), wanted)
    assert torch.equal(quantizer(x[:, :, None, None]), wanted[:, :, None, None])
    again = build(describe(quantizer))
    again.load_state_dict(quantizer.state_dict())
    assert torch.equal(again(x), wanted)
