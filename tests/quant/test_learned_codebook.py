"""Codebooks whose levels are learned."""

import pytest
import torch
from torch import nn

from qbench.quant.clustering import kmeans
from qbench.quant.encodings import Codebook
from qbench.quant.fakequant import deploy, quantize_weight
from qbench.quant.layers import encodings
from qbench.quant.learned_codebook import LearnedCodebook

ROWS = torch.tensor([[0.9, 1.1, -2.0, 0.0], [0.0, 1.0, -1.8, -2.2]])
LEVELS = torch.tensor([-2.0, 0.0, 1.0])


def test_a_level_gets_the_sum_of_the_gradients_of_its_members() -> None:
    quantizer = LearnedCodebook(Codebook.nearest(ROWS, LEVELS), fixed=True)
    weight = ROWS.clone().requires_grad_()
    y = quantizer(weight)
    assert torch.equal(y, torch.tensor([[1.0, 1, -2, 0], [0, 1, -2, -2]]))
    y.backward(torch.tensor([[1.0, 2, 4, 8], [16, 32, 64, 128]]))
    assert torch.equal(quantizer.levels.grad, torch.tensor([[4.0 + 64 + 128, 8 + 16, 1 + 2 + 32]]))
    assert weight.grad is None


def test_codes_are_redone_from_weights_that_learn() -> None:
    quantizer = LearnedCodebook(Codebook.nearest(ROWS, LEVELS), fixed=False)
    with torch.no_grad():
        quantizer.levels.copy_(torch.tensor([[1.0, -2.1, 0.3]]))  # no longer ascending
    weight = torch.tensor([[0.6, 0.7, -0.89, -0.91], [-9, 9, 0.3, 0]], requires_grad=True)
    y = quantizer(weight)
    torch.testing.assert_close(y, torch.tensor([[0.3, 1, 0.3, -2.1], [-2.1, 1, 0.3, 0.3]]))
    y.backward(torch.ones(2, 4))
    assert torch.equal(weight.grad, torch.ones(2, 4))
    assert torch.equal(quantizer.levels.grad, torch.tensor([[2.0, 2, 4]]))


@pytest.mark.parametrize("fixed", [True, False])
def test_pruned_weights_stay_zero(fixed: bool) -> None:
    quantizer = LearnedCodebook(Codebook.nearest(ROWS, LEVELS), fixed=fixed, zeros=True)
    weight = nn.Parameter(ROWS.clone())
    optimizer = torch.optim.SGD([weight, *quantizer.parameters()], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        quantizer(weight).sum().backward()
        optimizer.step()
    assert torch.equal(quantizer(weight) == 0, ROWS == 0)
    assert quantizer.levels[0, 0] != -2


@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_a_deployed_weight_is_what_the_training_saw(fixed: bool, granularity: str) -> None:
    layer = nn.ConvTranspose2d(4, 6, 3)
    rows = layer.weight.detach().movedim(1, 0).flatten(1)
    levels = kmeans(rows if granularity == "channel" else rows.reshape(1, -1), 4)
    quantize_weight(layer, LearnedCodebook(Codebook.nearest(layer.weight, levels, axis=1), fixed=fixed))
    with torch.no_grad():
        layer.parametrizations.weight[0].levels.add_(0.01 * torch.randn(levels.shape))
    seen = layer.weight.detach().clone()
    deploy(layer)
    assert torch.equal(layer.weight, seen)
    (encoding,) = encodings(layer).values()
    assert isinstance(encoding, Codebook)
    assert encoding.levels.shape == (len(levels), 1, 4)
