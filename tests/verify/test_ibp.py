"""Intervals hold for every sample, are exact for single inputs, and learn."""

import copy
from itertools import pairwise

import pytest
import torch
from quantized import COLOUR, linear, quantize, residual, sample
from torch import Tensor, nn

from qbench.quant.activations import quantize_input
from qbench.quant.fakequant import LearnedInput, LearnedWeight, quantize_weight
from qbench.quant.layers import weight_layers, weight_of
from qbench.verify.graph import trace
from qbench.verify.ibp import FLOAT32, Bounds, margins
from qbench.verify.interval import Interval


def plain(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    layers = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.MaxPool2d(2, 1), nn.Conv2d(8, 8, 2), nn.ReLU()
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4)).eval()


def images(count: int) -> Tensor:
    return torch.randint(0, 256, (count, 3, 6, 6), generator=torch.Generator().manual_seed(7)).float()


@pytest.mark.parametrize("make", [plain, residual])
@pytest.mark.parametrize("inputs", [False, True])
def test_no_sample_is_outside(make, inputs: bool) -> None:
    """4,000 samples for each of 3 images and 3 radii."""
    centres = images(3)
    model = quantize(make(1), COLOUR.normalize(images(16)), inputs=inputs)
    graph = trace(model)
    for radius in (1, 8, 64):
        low, high = (centres - radius).clamp(min=0), (centres + radius).clamp(max=255)
        box = Interval(*(COLOUR.normalize(end).double() for end in (low, high)))
        bounds = Bounds(FLOAT32).run(graph, box)
        for i in range(len(centres)):
            with torch.no_grad():
                logits = model(COLOUR.normalize(sample(low[i], high[i], 4000))).double()
            assert (logits >= bounds.low[i]).all()
            assert (logits <= bounds.high[i]).all()
            target = int(logits[0].argmax())
            apart = logits[:, target, None] - logits
            apart[:, target] = torch.inf
            lowest = margins(
                graph, Interval(box.low[i : i + 1], box.high[i : i + 1]), torch.tensor([target]), Bounds(FLOAT32)
            )
            assert (apart >= lowest).all()
            others = torch.arange(logits.shape[1]) != target
            assert (lowest[0, others] >= bounds.low[i, target] - bounds.high[i, others] - 1e-4).all()


@pytest.mark.parametrize("inputs", [False, True])
def test_a_single_input_has_the_network_s_answer(inputs: bool) -> None:
    x = COLOUR.normalize(images(8))
    model = quantize(plain(2), x, inputs=inputs)
    found = Bounds().run(trace(model), Interval(x, x))
    with torch.no_grad():
        wanted = model(x)
    assert torch.equal(found.low, wanted)
    assert torch.equal(found.high, wanted)
    model = quantize(residual(), x, inputs=False)
    found = Bounds().run(trace(model), Interval(x, x))
    for end in (found.low, found.high):  # batch norms are computed in another order
        torch.testing.assert_close(end, model(x))


def test_larger_boxes_have_wider_bounds() -> None:
    x = COLOUR.normalize(images(4))
    graph = trace(quantize(plain(2), x))
    widths = []
    for radius in (0.0, 0.01, 0.1, 1.0):
        bounds = Bounds()
        found = bounds.run(graph, Interval(x - radius, x + radius))
        widths.append(torch.stack([*bounds.widths, (found.high - found.low).mean()]))
    assert (widths[0] == 0).all()
    assert all((wider >= narrower).all() for narrower, wider in pairwise(widths))


def test_gradients_reach_weights_and_steps() -> None:
    x = COLOUR.normalize(images(4))
    model = plain(2)
    for layer in weight_layers(model):
        quantize_weight(layer, LearnedWeight(weight_of(layer), 4, "tensor"))
        quantize_input(layer, LearnedInput(4))
    model(x)
    found = margins(trace(model), Interval(x - 0.1, x + 0.1), torch.tensor([0, 1, 2, 3]), Bounds())
    found.clamp(max=0).sum().backward()
    assert found.isinf().sum() == 4
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all()
        assert parameter.grad.abs().sum() > 0, name


def test_margins_of_a_linear_network_are_exact() -> None:
    model = linear(0, 5, 3)
    x = torch.randn(6, 5)
    targets = torch.tensor([0, 1, 2, 0, 1, 2])
    lowest = margins(trace(copy.deepcopy(model)), Interval(x - 0.1, x + 0.2), targets, Bounds())
    weight, bias = model[1].weight, model[1].bias
    for i, target in enumerate(targets):
        for k in set(range(3)) - {int(target)}:
            rows = weight[target] - weight[k]
            worst = torch.where(rows > 0, x[i] - 0.1, x[i] + 0.2)
            torch.testing.assert_close(lowest[i, k], rows @ worst + bias[target] - bias[k])
