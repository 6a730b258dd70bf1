"""Grids that end at the best of three percentiles."""

import numpy as np
import pytest
import torch

from qbench.quant.percentile_search import PERCENTILES, percentile_grids, percentile_top


def rows(count=6, n=4000):
    points = torch.randn(count, n, generator=torch.Generator().manual_seed(0)) + torch.arange(count)[:, None] - 2.0
    points[:, 0] *= 20  # an outlier
    return points


def quantized(points, scale, zero, bits):
    codes = ((points / scale).round() + zero).clamp(0, 2**bits - 1)
    return (codes - zero) * scale


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("around_zero", [True, False])
def test_the_best_of_the_three_is_taken(bits, around_zero):
    points = rows()
    scale, zero = percentile_grids(points, bits, around_zero=around_zero)
    for i, row in enumerate(points):
        errors = []
        for p in PERCENTILES:
            low, high = np.quantile(row.numpy(), [1 - p, p])
            if around_zero:
                low, high = min(low, 0), max(high, 0)
            step = (high - low) / (2**bits - 1)
            errors.append(float((quantized(row, step, round(-low / step), bits) - row).square().mean()))
        own = float((quantized(row, scale[i], zero[i], bits) - row).square().mean())
        assert own == pytest.approx(min(errors), rel=1e-4)
    assert (zero == zero.round()).all()
    if around_zero:
        assert ((zero >= 0) & (zero < 2**bits)).all()


@pytest.mark.parametrize("around_zero", [True, False])
def test_equal_numbers_are_exact(around_zero):
    points = torch.tensor([0.0, 3.3, -0.7])[:, None].expand(3, 50)
    scale, zero = percentile_grids(points, 4, around_zero=around_zero)
    assert torch.allclose(quantized(points, scale[:, None], zero[:, None], 4), points, atol=1e-6)


def test_the_top_with_the_least_error_is_that_of_the_authors(shared):
    from qbench.quant.log_quantizer import LogQuantizer

    golden = np.load(shared / "golden" / "baselines.npz")
    points = torch.from_numpy(golden["logsqrt2_x"])
    top = percentile_top(points, lambda x, top: LogQuantizer(4, 2, top)(x))
    assert top == pytest.approx(float(golden["logsqrt2_delta_b4"]), rel=1e-6)
