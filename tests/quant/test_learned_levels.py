"""APoT in training, the quantizer of given levels, and inputs whose range is watched."""

import pytest
import torch

from qbench.quant.learned_levels import LevelsInput, LevelsWeight, projected
from qbench.quant.level_quantizer import LevelQuantizer, nearest_level
from qbench.quant.levels import apot_levels, mirrored
from qbench.quant.range_input import RangeInput


def test_projection_and_its_gradients() -> None:
    levels = torch.tensor([-1.0, 0.0, 0.25, 1.0])
    scale = torch.tensor(2.0, requires_grad=True)
    x = torch.tensor([-3.0, -1.2, 0.3, 1.0, 5.0], requires_grad=True)
    y = projected(x, scale, levels)
    assert y.tolist() == [-2, -2, 0.5, 0.5, 2]
    expected = torch.tensor([-1, -1 + 0.6, 0.25 - 0.15, 0.25 - 0.5, 1])
    for i, value in enumerate(expected):
        (grad,) = torch.autograd.grad(y[i], scale, retain_graph=True)
        torch.testing.assert_close(grad, value)
    y.sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 0]
    x.grad = None
    projected(x, scale, levels, clips=False).sum().backward()
    assert x.grad.tolist() == [1, 1, 1, 1, 1]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_weights_are_normalised_and_on_sums_of_powers_of_two(bits: int) -> None:
    weight = 0.3 * torch.randn(8, 40) + 0.1
    quantizer = LevelsWeight(weight, bits)
    deviation = weight.std(correction=0)
    torch.testing.assert_close(quantizer.scale.detach(), 3 * deviation)
    shares = quantizer(weight) / quantizer.scale
    assert set(shares.flatten().tolist()) <= set(mirrored(apot_levels(bits - 1)).tolist())
    torch.testing.assert_close(quantizer(5 * weight - 1), quantizer(weight)), "whatever scale and mean weights get"


def test_inputs_begin_with_a_small_error_and_take_their_sign_from_the_first_batch() -> None:
    x = torch.randn(20, 50)
    signed, unsigned = LevelsInput(4), LevelsInput(4)
    error = (signed(x) - x).square().mean()
    assert error < 0.03
    assert len(signed.levels) == 15
    assert (unsigned(x.relu()) - x.relu()).square().mean() < error
    assert len(unsigned.levels) == 16


def test_the_nearest_of_fixed_levels() -> None:
    levels = torch.tensor([-1.0, 0.0, 0.5])
    assert nearest_level(torch.tensor([-9.0, -0.51, -0.5, 0.2, 0.3, 9]), levels).tolist() == [-1, -1, -1, 0, 0.5, 0.5]
    quantizer = LevelQuantizer(2, 3, levels, scale=2.0)
    assert quantizer.levels == 3
    assert quantizer(torch.tensor([0.4, 0.6, 4.0])).tolist() == [0, 1, 1]


def test_a_watched_range_follows_the_extremes_in_training_only() -> None:
    quantizer = RangeInput(8)
    x = torch.linspace(-1, 3, 257)[None]
    torch.testing.assert_close(quantizer(x), x, atol=4 / 255 / 2 + 1e-6, rtol=0)
    quantizer(3 * x)
    torch.testing.assert_close(quantizer.limits, torch.tensor([-1.02, 3.06]))
    quantizer.eval()(100 * x)
    torch.testing.assert_close(quantizer.limits, torch.tensor([-1.02, 3.06]))
    x.requires_grad_()
    quantizer(2 * x).sum().backward()
    inside = (2 * x.detach() > -1.02) & (2 * x.detach() < 3.06)
    assert ((x.grad > 0) == inside).float().mean() > 0.98


def test_a_range_without_negative_numbers_begins_at_zero() -> None:
    quantizer = RangeInput(4)
    quantizer(torch.rand(4, 4) + 2)
    assert quantizer.deployed().zero_point.item() == 0
    assert quantizer(torch.zeros(1)).item() == 0
