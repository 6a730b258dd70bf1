"""XNOR-Net's scale map K: brute force, gradients, and what layers it is for."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qbench.quant import structure
from qbench.quant.activations import quantize_input
from qbench.quant.binary import BinaryMeanInput, slope
from qbench.quant.scale_map import can_map


@pytest.mark.parametrize(("groups", "bias", "stride"), [(1, True, 2), (2, False, 1)])
def test_the_output_is_scaled_by_the_mean_magnitude_of_each_patch(groups: int, bias: bool, stride: int) -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3, stride, padding=1, groups=groups, bias=bias))
    x = torch.randn(2, 4, 7, 7)
    signs = F.conv2d(x.sign(), model[0].weight, None, stride, 1, 1, groups)
    averages = F.unfold(x.abs().mean(1, keepdim=True), 3, padding=1, stride=stride).mean(1)
    expected = signs * averages.reshape(2, 1, *signs.shape[2:])
    if bias:
        expected = expected + model[0].bias.reshape(-1, 1, 1)
    structure.apply(model, "scale_map", layer="0")
    quantize_input(model[0], BinaryMeanInput(1))
    torch.testing.assert_close(model(x), expected)


def test_gradients_reach_signs_only() -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 3))
    structure.apply(model, "scale_map", layer="0")
    quantize_input(model[0], BinaryMeanInput(1))
    x = torch.randn(1, 3, 5, 5, requires_grad=True)
    g = torch.randn(1, 2, 3, 3)
    model(x).backward(g)
    averages = F.avg_pool2d(x.detach().abs().mean(1, keepdim=True), 3, 1)
    expected = F.conv_transpose2d(g * averages, model[0].weight) * slope(x.detach(), "clip")
    torch.testing.assert_close(x.grad, expected)


def test_only_plain_convolutions_over_several_positions_have_a_map() -> None:
    assert can_map(nn.Conv1d(2, 2, 3))
    others = [nn.Conv2d(2, 2, 1), nn.Linear(2, 2), nn.ConvTranspose2d(2, 2, 3)]
    assert not any(can_map(layer) for layer in [*others, nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular")])
