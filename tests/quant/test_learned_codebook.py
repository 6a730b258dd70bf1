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


def test_a_level_gets_the_sum_of_the_gradients_of_its_members() -> None:
    quantizer = LearnedCodebook(ROWS + 3, 1)
    weight = ROWS.clone().requires_grad_()
    y = quantizer(weight)
    torch.testing.assert_close(y, torch.tensor([[3.6, 3.6, 1, 3.6], [3.6, 3.6, 1, 1]]))
    y.backward(torch.tensor([[1.0, 2, 4, 8], [16, 32, 64, 128]]))
    assert torch.equal(quantizer.levels.grad, torch.tensor([[4.0 + 64 + 128, 1 + 2 + 8 + 16 + 32]]))
    assert weight.grad is None


def test_codes_are_redone_from_weights_that_learn() -> None:
    quantizer = LearnedCodebook(torch.randn(2, 4), 2, fixed=False)
    with torch.no_grad():
        quantizer.levels.copy_(torch.tensor([[1.0, -2.1, 0.3, 50]]))  # no longer ascending
    weight = torch.tensor([[0.6, 0.7, -0.89, -0.91], [-9, 9, 0.3, 0]], requires_grad=True)
    y = quantizer(weight)
    torch.testing.assert_close(y, torch.tensor([[0.3, 1, 0.3, -2.1], [-2.1, 1, 0.3, 0.3]]))
    y.backward(torch.ones(2, 4))
    assert torch.equal(weight.grad, torch.ones(2, 4))
    assert torch.equal(quantizer.levels.grad, torch.tensor([[2.0, 2, 4, 0]]))


@pytest.mark.parametrize("fixed", [True, False])
def test_pruned_weights_stay_zero(fixed: bool) -> None:
    quantizer = LearnedCodebook(ROWS, 2, fixed=fixed)
    before = quantizer.levels.detach().clone()
    weight = nn.Parameter(ROWS.clone())
    optimizer = torch.optim.SGD([weight, *quantizer.parameters()], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        quantizer(weight).sum().backward()
        optimizer.step()
    assert torch.equal(quantizer(weight) == 0, ROWS == 0)
    assert (quantizer.levels[before == 0] == 0).all()
    assert (quantizer.levels != before).sum() > 1


def test_one_that_waits_lets_weights_pass_and_keeps_zeros() -> None:
    quantizer = LearnedCodebook(ROWS, 1, waits=True)
    weight = (ROWS + 0.25).requires_grad_()
    y = quantizer(weight)
    assert torch.equal(y, weight * (ROWS != 0))
    y.sum().backward()
    assert torch.equal(weight.grad, (ROWS != 0).float())
    quantizer.cluster(y)
    levels = quantizer(weight).unique()
    assert len(levels) == 2
    assert torch.equal(quantizer.levels.detach(), LearnedCodebook(y, 1).levels.detach())


@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_a_deployed_weight_is_what_the_training_saw(fixed: bool, granularity: str) -> None:
    layer = nn.ConvTranspose2d(4, 6, 3)
    rows = layer.weight.detach().movedim(1, 0).flatten(1)
    levels = kmeans(rows if granularity == "channel" else rows.reshape(1, -1), 4, "linear")
    quantizer = LearnedCodebook(layer.weight, 2, 1, granularity=granularity, fixed=fixed)
    assert torch.equal(quantizer.levels.detach(), levels)
    quantize_weight(layer, quantizer)
    with torch.no_grad():
        quantizer.levels.add_(0.01 * torch.randn(levels.shape))
    seen = layer.weight.detach().clone()
    deploy(layer)
    assert torch.equal(layer.weight, seen)
    (encoding,) = encodings(layer).values()
    assert isinstance(encoding, Codebook)
    assert encoding.levels.shape == (len(levels), 1, 4)
