"""Bounds of what quantization changes, from above and from below."""

import copy
import json

import pytest
import torch
from quantized import COLOUR, GREY, finished, linear, quantize, residual
from torch import nn

from qbench.errors import Unsupported
from qbench.metrics.quantization_error import quantization_error
from qbench.quant import structure
from qbench.quant.layers import weight_layers


def two_pixels(seed: int, bits: int):
    pixels = torch.randint(0, 256, (6, 1, 1, 2), generator=torch.Generator().manual_seed(seed))
    floats = linear(seed, 2, 4, 3, 2, size=2.0)
    return finished(floats, quantize(copy.deepcopy(floats), GREY.normalize(pixels), bits), pixels, [0] * 6, GREY)


def greatest(one, i: int, radius: int) -> float:
    low, high = ((one.images.pixels([i]).flatten() + change).clamp(0, 255) for change in (-radius, radius))
    ranges = (torch.arange(a, b + 1) for a, b in zip(low.tolist(), high.tolist(), strict=True))
    x = GREY.normalize(torch.cartesian_prod(*ranges).view(-1, 1, 1, 2))
    with torch.no_grad():
        return float((one.quantized(x) - one.load_float()(x)).abs().max())


def test_the_program_decides_every_image_of_a_small_network() -> None:
    one = two_pixels(0, 4)
    true = [greatest(one, i, 8) for i in range(6)]
    bound = sorted(true)[3] * 0.999
    values = quantization_error(one, bound=bound, radius=8, seconds=60.0)
    assert json.loads(json.dumps(values)) == values
    assert values["program"] == ""
    assert values["state"] == ["proved" if each < bound else "falsified" for each in true]
    assert values["value"] == pytest.approx(50)
    for lower, wanted, upper in zip(values["lower"], true, values["upper"], strict=True):
        assert lower <= wanted + 1e-6
        assert wanted <= upper + 1e-4
    without = quantization_error(one, bound=bound, radius=8, seconds=0.0)
    assert set(without["state"]) <= {"falsified", "open", "proved"}
    assert all(a >= b - 1e-4 for a, b in zip(without["upper"], values["upper"], strict=True))
    assert "open" in without["state"]


def test_a_float_network_does_not_differ() -> None:
    one = two_pixels(0, 4)
    one.quantized = one.load_float()
    values = quantization_error(one, bound=1e-3, radius=2, images=2)
    assert values["state"] == ["proved", "proved"]
    assert all(values["by_intervals"])
    assert max(values["upper"]) < 1e-4
    assert values["lower"] == [0.0, 0.0]


def test_convolutions_and_folded_batch_norms() -> None:
    pixels = torch.randint(0, 256, (16, 3, 6, 6), generator=torch.Generator().manual_seed(0))
    floats = residual(1)
    model = copy.deepcopy(floats)
    structure.apply(model, "fold_bn", layer="first", norm="norm")
    one = finished(floats, quantize(model, COLOUR.normalize(pixels), 8), pixels, [0] * 16, COLOUR)
    values = quantization_error(one, bound=0.2, radius=1, images=2, seconds=1.0)
    assert values["program"].startswith("the exact program is for")
    assert values["state"] == ["proved", "proved"]
    assert all(0 < lower < upper < 0.2 for lower, upper in zip(values["lower"], values["upper"], strict=True))


def test_other_float_networks_are_refused() -> None:
    one = two_pixels(0, 4)
    one.load_float = lambda: linear(0, 2, 4, 2)
    with pytest.raises(Unsupported, match="structures differ"):
        quantization_error(one)


def test_structural_steps_that_change_answers_are_refused() -> None:
    one = two_pixels(0, 4)

    @structure.operation("halve")
    def halve(model: nn.Module) -> None:
        weight_layers(model)[0].weight.data.mul_(0.5)

    structure.apply(one.quantized, "halve")
    with pytest.raises(Unsupported, match="structural steps change"):
        quantization_error(one)
