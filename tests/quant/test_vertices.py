"""Moves to vertices: what must hold after them, and the errors that they leave."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qbench.quant.vertices import principal_rows, to_vertex


def case(seed: int, n: int, d: int, m: int, groups: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.rand(groups, n, d, generator=generator, dtype=torch.float64) * 2 - 1
    return weight, torch.randn(groups, m, d, generator=generator, dtype=torch.float64)


def bound_of(weight: Tensor) -> Tensor:
    return weight.abs().amax(2, keepdim=True)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 5),
    d=st.integers(1, 60),
    m=st.integers(1, 12),
    groups=st.integers(1, 3),
    loose=st.booleans(),
)
def test_answers_stay_and_few_weights_are_free(seed: int, n: int, d: int, m: int, groups: int, loose: bool) -> None:
    weight, x = case(seed, n, d, m, groups)
    bound = bound_of(weight) * (1.5 if loose else 1)
    z = to_vertex(weight, principal_rows(x.mT @ x, d, tolerance=1e-12), bound)
    assert ((z - weight) @ x.mT).abs().max() < 1e-8
    assert (z.abs() <= bound).all()
    free = (z.abs() < bound).sum(2)
    assert (free <= min(m, d)).all()


def test_inputs_of_low_rank_and_dead_ones() -> None:
    weight, x = case(0, 4, 40, 3)
    x = torch.randn(1, 20, 3, dtype=torch.float64) @ x
    x[..., 5:9] = 0
    rows = principal_rows(x.mT @ x, 40, tolerance=1e-12)
    assert rows.shape == (1, 3, 40)
    z = to_vertex(weight, rows, bound_of(weight))
    assert ((z - weight) @ x.mT).abs().max() < 1e-8
    assert ((z.abs() < bound_of(weight)).sum(2) <= 3).all()


def test_inputs_of_full_rank_leave_no_room() -> None:
    weight, x = case(1, 3, 10, 30)
    assert torch.equal(to_vertex(weight, principal_rows(x.mT @ x, 10), bound_of(weight)), weight)


def test_weights_that_are_at_the_bound_stay() -> None:
    weight, x = case(2, 3, 20, 2)
    weight = weight.sign()
    assert torch.equal(to_vertex(weight, x, bound_of(weight)), weight)


def test_principal_rows_are_those_of_the_greatest_energy() -> None:
    generator = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64)).Q
    H = axes @ torch.diag(torch.tensor([1.0, 5.0, 3.0, 0.0, 2.0, 1e-9], dtype=torch.float64)) @ axes.T
    rows = principal_rows(H[None], 3)[0]
    torch.testing.assert_close((rows @ axes).abs(), torch.eye(6, dtype=torch.float64)[[1, 2, 4]], rtol=0, atol=1e-8)
    assert principal_rows(H[None], 6).shape == (1, 4, 6)


@pytest.mark.parametrize(
    ("d", "bits", "ours", "rounded"), [(1024, 1, 0.116, 0.706), (1024, 2, 0.022, 0.426), (256, 1, 0.331, 1.289)]
)
def test_errors_are_like_those_that_were_measured(d: int, bits: int, ours: float, rounded: float) -> None:
    """The figures are of one draw of uniform weights and 8 Gaussian samples: they are to lie among those of 100."""
    weight, x = case(0, 1, d, 8, groups=100)
    bound, top = bound_of(weight), 2**bits - 1
    z = to_vertex(weight, x, bound)

    def quantized(values: Tensor) -> Tensor:
        return ((values + bound) / (2 * bound) * top).round() / top * 2 * bound - bound

    def errors(values: Tensor) -> Tensor:
        return (((weight - quantized(values)) @ x.mT).norm(dim=2) / (weight @ x.mT).norm(dim=2)).flatten()

    for found, figure in ((errors(z), ours), (errors(weight), rounded)):
        assert found.quantile(0.02) < figure < found.quantile(0.98)
    assert errors(z).median() < 0.25 * errors(weight).median()
    error = ((weight - quantized(z)) @ x.mT).norm(dim=2)
    assert (error <= bound[..., 0] / top * 8 * x.norm(dim=1).amax(1, keepdim=True)).all()


def test_without_inputs_all_weights_are_at_the_bound() -> None:
    weight, _ = case(3, 3, 8, 2)
    rows = principal_rows(torch.zeros(1, 8, 8, dtype=torch.float64), 4)
    assert torch.equal(to_vertex(weight, rows, bound_of(weight)), bound_of(weight) * weight.sign())
