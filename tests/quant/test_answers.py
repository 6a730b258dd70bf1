"""How far answers are apart: a known answer, and no gradient through what is wanted."""

import pytest
import torch

from qbench.quant.answers import are_class_scores, relative_error
from qbench.quant.distillation import divergence


def test_each_output_counts_relative_to_its_size() -> None:
    wanted = {"scores": torch.tensor([[3.0, 4.0]]), "boxes": [torch.full((1, 2, 2), 100.0)]}
    found = {"scores": torch.tensor([[3.0, 9.0]]), "boxes": [torch.full((1, 2, 2), 110.0)]}
    assert float(relative_error(found, wanted)) == pytest.approx((25 / 25 + 0.01) / 2)
    assert float(relative_error(wanted, wanted)) == 0
    assert float(divergence(found, wanted)) == float(relative_error(found, wanted))


def test_no_gradient_flows_through_what_is_wanted() -> None:
    x, y = (torch.randn(2, 3, 4, requires_grad=True) for _ in range(2))
    relative_error((x,), (y,)).backward()
    assert x.grad is not None
    assert y.grad is None


def test_class_scores_are_one_tensor_of_two_dimensions() -> None:
    assert are_class_scores(torch.zeros(2, 3))
    assert not are_class_scores(torch.zeros(2, 3, 4))
    assert not are_class_scores((torch.zeros(2, 3), torch.zeros(2, 4)))
