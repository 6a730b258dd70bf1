"""PACT's clipping and SAWB's levels."""

import pytest
import torch
from scipy.optimize import minimize_scalar

from qbench.quant.pact import COEFFICIENTS, ClippedInput, SawbWeight


def test_the_limit_gets_the_gradient_of_what_is_above() -> None:
    quantizer = ClippedInput(2, limit=3.0)
    x = torch.tensor([[0.2, 1.4, 2.9, 3.5, 8.0]], requires_grad=True)
    y = quantizer(x)
    torch.testing.assert_close(y, torch.tensor([[0.0, 1, 3, 3, 3]]))
    y.backward(torch.tensor([[1.0, 2, 4, 8, 16]]))
    assert x.grad.tolist() == [[1, 2, 4, 0, 0]]
    assert quantizer.limit.grad.item() == 8 + 16


def test_signed_inputs_are_clipped_on_both_sides() -> None:
    quantizer = ClippedInput(3, limit=3.0)
    x = torch.tensor([[-9.0, -1.0, 1.2, 9.0]], requires_grad=True)
    y = quantizer(x)
    torch.testing.assert_close(y, torch.tensor([[-4.0, -1, 1, 3]]))
    y.backward(torch.tensor([[3.0, 1, 1, 1]]))
    assert x.grad.tolist() == [[0, 1, 1, 0]]
    assert quantizer.limit.grad.item() == pytest.approx(1 - 4 / 3 * 3)


def test_the_limit_begins_where_the_error_is_least() -> None:
    x, errors = torch.randn(1, 5000).relu(), []
    quantizer = ClippedInput(2)
    y = quantizer(x)
    for factor in (0.8, 1.25):
        other = ClippedInput(2, limit=factor * quantizer.limit.item())
        errors.append((other(x) - x).square().mean())
    assert (y - x).square().mean() < min(errors)


@pytest.mark.parametrize("bits", sorted(COEFFICIENTS)[:4])
def test_sawb_has_nearly_the_least_error_for_a_gaussian(bits: int) -> None:
    x, n = torch.randn(1, 20_000), 2**bits - 1

    def error(top: float) -> float:
        share = (x / top).clamp(-1, 1)
        return float(((((share + 1) * n / 2).round() * 2 / n - 1) * top - x).square().mean())

    quantizer = SawbWeight(x, bits)
    best = minimize_scalar(error, bounds=(0.5, 5), method="bounded").fun
    assert float((quantizer(x) - x).square().mean()) <= 1.1 * best


def test_sawb_follows_the_weights_when_it_is_told() -> None:
    x = torch.randn(4, 500)
    quantizer = SawbWeight(x, 4)
    before = quantizer.scale.item()
    quantizer(2 * x)
    assert quantizer.scale.item() == before
    quantizer.update(2 * x)
    assert quantizer.scale.item() == pytest.approx(2 * before)
