import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qbench.quant.grids import exact_step
from qbench.quant.step_search import alternating_step, best_step, squared_error


def lsq_start(rows: Tensor, top: int) -> Tensor:
    return 2 * rows.abs().mean(1) / math.sqrt(top)


@pytest.mark.parametrize(("bits", "step", "error"), [(2, 1.224, 0.1902), (3, 0.651, 0.04686), (4, 0.3534, 0.01289)])
def test_both_searches_find_the_best_step_of_a_gaussian(bits: int, step: float, error: float) -> None:
    x, top = torch.randn(1, 1_000_000), 2 ** (bits - 1) - 1
    found = best_step(x, -top, top)
    assert found.item() == pytest.approx(step, rel=5e-3)
    assert squared_error(x, found, -top, top).item() / x.numel() == pytest.approx(error, rel=5e-3)
    part = x[:, :100_000]
    assert alternating_step(part, lsq_start(part, top), -top, top, turns=100).item() == pytest.approx(step, rel=0.02)


def test_the_best_step_of_a_gaussian_at_eight_bits() -> None:
    x = torch.randn(1, 1_000_000)
    assert best_step(x, -127, 127).item() == pytest.approx(0.0308, rel=0.01)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 999), bits=st.integers(2, 8), n=st.integers(1, 200))
def test_taking_turns_never_adds_error(seed: int, bits: int, n: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, top = torch.randn(3, n, generator=generator, dtype=torch.float64), 2 ** (bits - 1) - 1
    errors, step = [], lsq_start(x, top)
    for _ in range(6):
        errors.append(squared_error(x, step, -top - 1, top))
        step = alternating_step(x, step, -top - 1, top, turns=1)
    errors = torch.stack(errors)
    assert (errors.diff(dim=0) <= 1e-12).all()
    assert (squared_error(x, best_step(x, -top - 1, top), -top - 1, top) <= errors[-1] + 1e-12).all()


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 999), n=st.integers(1, 20), low=st.integers(-8, 0), high=st.integers(1, 7))
def test_the_exact_step_of_a_lopsided_range_is_the_minimum(seed: int, n: int, low: int, high: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, n, generator=generator, dtype=torch.float64)
    mass = torch.randint(0, 4, x.shape, generator=generator).double()
    once = x.repeat_interleave(mass.long().flatten(), dim=1)
    found = exact_step(x, high, bottom=low, mass=mass)
    grid = x.abs().amax() * torch.linspace(0.01, 3, 4000, dtype=torch.float64)
    least = squared_error(once.expand(len(grid), -1), grid, low, high).amin()
    assert squared_error(once, found, low, high) <= least + 1e-9


def test_long_rows_are_searched_as_histograms_and_zeros_get_a_step() -> None:
    x = torch.cat([torch.randn(1, 10_000) * torch.tensor([[1.0], [30.0]]), torch.zeros(1, 10_000)])
    found = best_step(x, -7, 7)
    exact = exact_step(x, 7)
    torch.testing.assert_close(found, exact, rtol=0.02, atol=0)
    errors = squared_error(x, found, -7, 7), squared_error(x, exact, -7, 7)
    assert (errors[0] <= errors[1] * 1.0005).all()
    assert found[2] == 1
