"""LSQ+'s gradients and starts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qbench.quant.fakequant import LearnedInput
from qbench.quant.lsq_plus import OffsetInput, OffsetStep, three_deviations


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 999), bits=st.integers(1, 8), zero=st.floats(0, 1), step=st.floats(0.05, 1.0))
def test_gradients_are_those_of_the_paper(seed: int, bits: int, zero: float, step: float) -> None:
    """The surrogate has an offset of its own, at a multiple of the step, and rounds straight through."""
    generator = torch.Generator().manual_seed(seed)
    x, g = torch.randn(2, 200, generator=generator, dtype=torch.float64)
    high = 2**bits - 1
    begin = torch.tensor(step, dtype=torch.float64)
    found = []
    for exact in (False, True):
        own, scale = x.clone().requires_grad_(), begin.clone().requires_grad_()
        offset = (-round(zero * high) * begin).clone().requires_grad_()
        if exact:
            y = OffsetStep.apply(own, scale, offset, high, 1.0)
        else:
            u = ((own - offset) / scale).clamp(0, high)
            y = (u + (u.round() - u).detach()) * scale + offset
        (y * g).sum().backward()
        found.append((y, own.grad, scale.grad, offset.grad))
    for expected, actual in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected)


def test_without_an_offset_it_is_lsq() -> None:
    x = torch.rand(4, 50)
    plus, plain = OffsetInput(3), LearnedInput(3)
    plus(x), plain(x)
    with torch.no_grad():
        plus.offset.zero_()
        plus.scale.copy_(plain.scale)
    y, expected = plus(x), plain(x)
    y.square().sum().backward()
    expected.square().sum().backward()
    assert torch.equal(y, expected)
    torch.testing.assert_close(plus.scale.grad, plain.scale.grad)


def test_the_grid_begins_with_a_small_error_and_covers_what_is_negative() -> None:
    x = torch.nn.functional.silu(torch.randn(16, 200) * 2)
    quantizer = OffsetInput(4)
    error = (quantizer(x) - x).square().mean()
    assert -0.5 < quantizer.offset.item() < -0.1
    symmetric = LearnedInput(4)
    assert error < 0.5 * (symmetric(x) - x).square().mean()


def test_zero_always_has_a_code() -> None:
    quantizer = OffsetInput(2)
    quantizer(torch.rand(4, 8))
    for offset in (-100.0, 100.0):
        with torch.no_grad():
            quantizer.offset.fill_(offset)
        assert quantizer(torch.zeros(1)).item() == 0
        assert quantizer.deployed().zero_point.item() == (3 if offset < 0 else 0)


def test_weights_begin_with_three_deviations() -> None:
    rows = torch.tensor([[1.0, 3.0], [-3.0, -1.0]])
    assert three_deviations(rows, 7).tolist() == pytest.approx([5 / 8, 5 / 8])
