"""Learned rounding: its start, its end, and the grid that it keeps."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qbench.quant.encodings import Affine
from qbench.quant.soft_rounding import SoftRounding, fitted_grid, temperature


@pytest.fixture
def golden(shared: Path) -> dict[str, torch.Tensor]:
    with np.load(shared / "golden" / "baselines.npz") as arrays:
        return {name: torch.tensor(arrays[name]) for name in arrays.files if name.startswith(("brecq", "adaround"))}


def test_codes_and_start_are_those_of_the_reference(golden: dict[str, torch.Tensor]) -> None:
    weight = golden["brecq_W"]
    grid = Affine.nearest(weight, golden["brecq_delta_b4"], bits=4, zero_point=golden["brecq_zp_b4"])
    torch.testing.assert_close(grid.decode(), golden["brecq_Wq_b4"], rtol=1e-5, atol=1e-7)
    alpha = SoftRounding(weight, grid).alpha.detach().reshape(weight.shape)
    torch.testing.assert_close(alpha, golden["adaround_alpha0"], rtol=1e-5, atol=2e-6)


def test_the_grid_is_no_worse_than_the_reference(golden: dict[str, torch.Tensor]) -> None:
    weight = golden["brecq_W"]
    grid = fitted_grid(weight, 4, symmetric=False)
    own, reference = ((weight - q).abs().pow(2.4).sum((1, 2, 3)) for q in (grid.decode(), golden["brecq_Wq_b4"]))
    assert (own <= reference * 1.0001).all()
    torch.testing.assert_close(grid.scale.flatten(), golden["brecq_delta_b4"], rtol=0.15, atol=0)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), bits=st.integers(2, 8), symmetric=st.booleans(), axis=st.integers(0, 1))
def test_it_starts_as_the_weight_and_ends_next_to_it(seed: int, bits: int, symmetric: bool, axis: int) -> None:
    weight = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(seed))
    grid = fitted_grid(weight, bits, symmetric=symmetric, axis=axis)
    soft = SoftRounding(weight, grid)
    offset = 0 if grid.zero_point is None else grid.zero_point
    shape = [1, 1, 1, 1]
    shape[axis] = -1
    low, high = (((edge - offset) * grid.scale).reshape(shape) for edge in (grid.low, grid.high))
    torch.testing.assert_close(soft(weight), weight.clamp(low, high), rtol=1e-4, atol=1e-5)
    assert torch.equal(soft.encoding(weight).codes, grid.codes)
    with torch.no_grad():
        soft.alpha.copy_(torch.where(torch.rand_like(soft.alpha) < 0.5, -20.0, 20.0))
    assert torch.equal(soft(weight), soft.encoding(weight).decode())
    assert (soft.encoding(weight).codes - grid.codes).abs().max() <= 1
    assert soft.penalty(2.0).item() == pytest.approx(0, abs=1e-4)


def test_a_dead_channel_stays_zero() -> None:
    weight = torch.randn(3, 8)
    weight[1] = 0
    for symmetric in (True, False):
        grid = fitted_grid(weight, 3, symmetric=symmetric)
        assert not grid.decode()[1].any()
        assert SoftRounding(weight, grid).alpha.isfinite().all()


def test_the_temperature_falls_after_the_warm_up() -> None:
    betas = [temperature(step, 100) for step in range(100)]
    assert betas[:20] == [None] * 20
    assert betas[20] == 20
    assert all(a > b for a, b in pairwise(betas) if a is not None and b is not None)
    assert betas[-1] == pytest.approx(2.225)


def test_one_scale_for_a_tensor() -> None:
    grid = fitted_grid(torch.randn(4, 6), 4, symmetric=True, granularity="tensor")
    assert isinstance(grid, Affine)
    assert grid.scale.shape == (1, 1)
